"""max@k against subset enumeration, and unbiasedness against exact expectations."""

import itertools
import math

import pytest
import torch

from tealightning.estimators import MaxAtK, MeanReward
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.max_at_k import max_at_k_gains


def enumerated(rewards: list[float], k: int, baseline: str) -> list[float]:
    """The definition: every subset of size k that rollout i is in."""
    m = len(rewards)
    advantages = []
    for i in range(m):
        total = 0.0
        for subset in itertools.combinations(range(m), k):
            if i not in subset:
                continue
            others = [rewards[j] for j in subset if j != i]
            total += max(rewards[j] for j in subset) - (max(others) if baseline == "loo_minus_one" else 0.0)
        advantages.append(m * total / math.comb(m, k))
    return advantages


@pytest.mark.parametrize("baseline", ["loo_minus_one", "none"])
@pytest.mark.parametrize("k", [2, 3, 5, 7])
def test_max_at_k_equals_subset_enumeration(k, baseline):
    generator = torch.Generator().manual_seed(k)
    distinct = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    tied = torch.randint(0, 3, (3, 7), generator=generator).double()
    rewards = torch.cat([distinct, tied])
    expected = torch.tensor([enumerated(row, k, baseline) for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(MaxAtK(k=k, baseline=baseline)(rewards), expected, rtol=0, atol=1e-12)


def test_max_at_k_with_the_whole_group_pays_the_lead_of_the_best():
    rewards = torch.tensor([[1.0, 4.0, 2.5, 0.0]], dtype=torch.float64)
    assert MaxAtK()(rewards).tolist() == [[0.0, 4 * 1.5, 0.0, 0.0]]


def test_max_at_k_with_k_1_is_leave_one_out():
    rewards = torch.tensor([[1.0, 4.0, 2.5, 0.0]], dtype=torch.float64)
    assert MaxAtK(k=1)(rewards).tolist() == MeanReward(baseline="loo")(rewards).tolist()


def test_max_at_k_gives_tied_rewards_identical_advantages():
    rewards = torch.tensor([[0.1, 0.7, 0.3, 0.7, 0.1, 0.7]], dtype=torch.float64)
    for baseline in ("loo_minus_one", "none"):
        advantages = MaxAtK(k=3, baseline=baseline)(rewards)[0]
        assert advantages[1] == advantages[3] == advantages[5]
        assert advantages[0] == advantages[4]


@pytest.mark.parametrize("k", [2, 64, 4096, 8192])
def test_max_at_k_stays_finite_in_huge_groups_and_sums_to_the_estimate(k):
    """Without a baseline, (1/m) sum_i A_i counts each subset's maximum k times: k * best-of-k."""
    rewards = torch.randn(2, 8192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = MaxAtK(k=k, baseline="none")(rewards)
    assert torch.isfinite(MaxAtK(k=k)(rewards)).all()
    torch.testing.assert_close(advantages.mean(dim=1), k * best_of_n(rewards, [k])[:, 0], rtol=1e-9, atol=0)


OUTCOMES = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
LOGITS = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64)


def exact_gradient(k: int) -> torch.Tensor:
    """Gradient of E[max of k] in the logits of a policy over three outcomes, from the sum over all k-tuples."""
    logits = LOGITS.clone().requires_grad_()
    probabilities = logits.softmax(0)
    tuples = torch.cartesian_prod(*[torch.arange(3)] * k).view(-1, k)
    (probabilities[tuples].prod(1) * OUTCOMES[tuples].amax(1)).sum().backward()
    return logits.grad


def expected_estimate(estimator, m: int) -> torch.Tensor:
    """E[(1/m) sum_i A_i grad log pi(y_i)] over all 3^m groups."""
    probabilities = LOGITS.softmax(0)
    groups = torch.cartesian_prod(*[torch.arange(3)] * m)
    scores = torch.eye(3, dtype=torch.float64)[groups] - probabilities
    advantages = estimator(OUTCOMES[groups])
    return (probabilities[groups].prod(1)[:, None] * (advantages[..., None] * scores).mean(1)).sum(0)


@pytest.mark.parametrize("baseline", ["loo_minus_one", "none"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_max_at_k_is_unbiased(k, baseline):
    torch.testing.assert_close(expected_estimate(MaxAtK(k=k, baseline=baseline), 5), exact_gradient(k))


@pytest.mark.parametrize(("baseline", "share"), [("loo", 1.0), ("none", 1.0), ("mean", 0.8)])
def test_mean_reward_is_unbiased_up_to_its_documented_factor(baseline, share):
    torch.testing.assert_close(expected_estimate(MeanReward(baseline=baseline), 5), share * exact_gradient(1))


# ---------------------------------------------------------------- standardised weights


@pytest.mark.parametrize("baseline", ["loo_minus_one", "none"])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_group_std_standardises_the_weights(k, baseline):
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    weights = MaxAtK(k=k, baseline=baseline)(rewards)
    expected = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True)
    torch.testing.assert_close(MaxAtK(k=k, baseline=baseline, scale="group_std")(rewards), expected)


def test_group_std_at_half_the_group_by_hand():
    """k = 2 of 3: the gaps 1 and 3 count 1 and 2 times: weights 0, 1, 7."""
    rewards = torch.tensor([[4.0, 0.0, 1.0]], dtype=torch.float64)
    assert MaxAtK(k=2)(rewards).tolist() == [[7.0, 0.0, 1.0]]
    expected = torch.tensor([[13.0, -8.0, -5.0]], dtype=torch.float64) / 129**0.5  # mean 8/3, variance 129/9
    torch.testing.assert_close(MaxAtK(k=2, scale="group_std")(rewards), expected)


def test_group_std_with_the_whole_group_does_not_see_the_lead():
    for best in (2.0, 1000.0):
        advantages = MaxAtK(scale="group_std")(torch.tensor([[1.0, best, 0.0, 0.0]], dtype=torch.float64))
        assert advantages[0].tolist() == pytest.approx([-0.5, 1.5, -0.5, -0.5])
    assert MaxAtK(scale="group_std")(torch.tensor([[1.0, 2.0, 2.0, 0.0]])).tolist() == [[0.0] * 4]


def test_group_std_without_a_baseline_needs_subsets_smaller_than_the_group():
    with pytest.raises(ValueError, match="k must be an integer below group_size"):
        MaxAtK(baseline="none", scale="group_std")
    with pytest.raises(ValueError, match=r"group_size=4: raise group_size to 5 or more, or lower k \(now 4\)"):
        MaxAtK(k=4, baseline="none", scale="group_std")(torch.zeros(1, 4))
    assert max_at_k_gains(torch.tensor([[0.1, 0.7, 1e6]]).double(), 3).tolist() == [[0.0, 0.0, 0.0]]


def test_group_std_has_no_off_policy_form():
    estimator = MaxAtK(k=2, scale="group_std")
    assert MaxAtK(k=2).has_off_policy_form and not estimator.has_off_policy_form
    with pytest.raises(ValueError, match="no off-policy form with scale=group_std; set scale=none"):
        estimator.off_policy(torch.randn(2, 8), torch.ones(2, 8))
