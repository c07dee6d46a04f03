"""Inner epochs with exact off-policy advantages, against the surrogate written out over subsets and differentiated."""

import itertools
import math

import pytest
import torch
from module_fixtures import make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama

from tealightning import PolicyGradientLoss, PostTrainingModule
from tealightning.estimators import build_estimator

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
LR = 3e-4


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, estimator, *, correction="exact", inner_epochs=2, **loss):
    return PostTrainingModule(
        policy=policy,
        estimator=estimator,
        loss=PolicyGradientLoss(reduction="constant", constant=1.0, **loss),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
        gradient_clip_norm=None,
        advantage_scale="none",
        inner_epochs=inner_epochs,
        inner_epoch_correction=correction,
    )


def completion_log_probs(model, rollouts) -> torch.Tensor:
    """[P, m] log-probs of whole completions, row by row."""
    rows = []
    for row in range(rollouts.rewards.numel()):
        tp, t = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -tp:], rollouts.completion_ids[row, :t]])
        log_probs = model(ids[None]).logits[0, tp - 1 : -1].log_softmax(-1)
        rows.append(log_probs.gather(1, ids[tp:, None]).sum())
    return torch.stack(rows).view_as(rollouts.rewards)


def surrogate(log_probs: torch.Tensor, sampled: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Mean over prompts of `C(m,k)^-1 sum_I prod_I (pi/mu) max R_I`, an unbiased estimate of E_pi[max of k]."""
    ratios = (log_probs - sampled).exp()
    subsets = list(itertools.combinations(range(rewards.shape[1]), k))
    values = [ratios[:, list(chosen)].prod(1) * rewards[:, list(chosen)].amax(1) for chosen in subsets]
    return torch.stack(values).mean(0).mean()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_second_inner_epoch_follows_the_gradient_of_the_off_policy_surrogate(policy, k):
    rollouts = make_rollouts(REWARDS)
    _, gradients = run_steps(
        module_of(policy, build_estimator("max_at_k", k=k, baseline="none"), inner_epochs=3), [make_batch(rollouts)]
    )
    model = tiny_llama()
    sampled = completion_log_probs(model, rollouts).detach()
    for found in gradients:
        model.zero_grad()
        (-surrogate(completion_log_probs(model, rollouts), sampled, rollouts.rewards, k)).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert expected.abs().max() > 0.1
        assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.01)


def test_clipping_gives_another_gradient_once_the_policy_has_moved(policy):
    batch = make_batch(make_rollouts(REWARDS))
    estimator = build_estimator("max_at_k", k=2)
    _, exact = run_steps(module_of(policy, estimator), [batch])
    _, clipped = run_steps(module_of(policy, estimator, correction="clip"), [batch])
    assert torch.equal(exact[0], clipped[0])
    assert not torch.allclose(exact[1], clipped[1], rtol=0.01)


def test_unscorable_rollouts_take_no_part(policy):
    ragged = make_rollouts([[2.0, math.nan, 0.5, -1.0], [0.0, 3.0, math.nan, math.nan]])
    _, gradients = run_steps(module_of(policy, build_estimator("max_at_k", k=2)), [make_batch(ragged)])
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        ("grpo", {}, "inner_epoch_correction=exact needs an estimator with an off-policy form"),
        (("max_at_k", {"k": 2, "scale": "group_std"}), {}, r"max_at_k with scale=none\), got MaxAtK\(k=2"),
        ("max_at_k", {"importance_cap": 2.0}, "set one of them only"),
        ("max_at_k", {"correction": "exactly"}, "inner_epoch_correction must be one of clip, exact"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(policy, estimator, settings, message):
    name, arguments = (estimator, {}) if isinstance(estimator, str) else estimator
    with pytest.raises(ValueError, match=message):
        module_of(policy, build_estimator(name, **arguments), **settings)


def test_a_setting_without_effect_is_warned_about(policy):
    with pytest.warns(UserWarning, match="no effect with inner_epochs=1"):
        module_of(policy, build_estimator("max_at_k"), inner_epochs=1)


def test_an_estimator_without_such_a_form_says_so():
    with pytest.raises(ValueError, match="grpo has no off-policy form"):
        build_estimator("grpo").off_policy(torch.randn(2, 8), torch.ones(2, 8))


def test_huge_ratios_stay_finite():
    rewards = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = torch.full_like(rewards, math.exp(700))
    for baseline in ("none", "loo_minus_one"):
        assert torch.isfinite(build_estimator("max_at_k", baseline=baseline).off_policy(rewards, ratios)).all()
