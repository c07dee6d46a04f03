"""Bias of the estimators by exact enumeration: every group that a softmax policy over six outcomes can draw.

`UNBIASED` lists what must equal the gradient of its objective to 1e-10, `BIASED` what must miss it by more than 1e-3:
the check is known to see a bias.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from tealightning.estimators import build_estimator
from tealightning.functional.binary import pass_at_n_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*the tail has 2 rollouts:UserWarning")

LOGITS = torch.tensor([0.2, -0.4, 0.1, 0.5, -0.9, 0.0], dtype=torch.float64)
GRADED = torch.tensor([0.3, -1.0, 2.0, 0.9, 3.5, 0.3], dtype=torch.float64)  # a tie, and the best is rare
BINARY = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
SIZES = (4, 5)


@lru_cache
def tuples(size: int) -> Tensor:
    """All 6^size sequences of outcomes."""
    return torch.cartesian_prod(*[torch.arange(6)] * size).view(-1, size)


def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient in the logits of an objective of the outcome probabilities."""
    logits = LOGITS.clone().requires_grad_()
    objective(logits.softmax(0)).backward()
    assert logits.grad is not None
    return logits.grad


def max_of(k: int, rewards: Tensor = GRADED) -> Callable[[Tensor], Tensor]:
    """E[max of k] as a function of the probabilities: the sum over all k-tuples."""
    return lambda probabilities: (probabilities[tuples(k)].prod(1) * rewards[tuples(k)].amax(1)).sum()


def sum_of_max(terms: int, rewards: Tensor = GRADED) -> Callable[[Tensor], Tensor]:
    """sum_{k <= terms} (1/k) E[max of k]."""
    return lambda probabilities: sum(max_of(k, rewards)(probabilities) / k for k in range(1, terms + 1))


def mean(probabilities: Tensor) -> Tensor:
    return (probabilities * GRADED).sum()


def expected_estimate(estimate: Callable[[Tensor], Tensor], m: int, rewards: Tensor = GRADED) -> Tensor:
    """E[(1/m) sum_i A_i grad log pi(y_i)] over all groups of m."""
    probabilities = LOGITS.softmax(0)
    groups = tuples(m)
    scores = torch.eye(6, dtype=torch.float64)[groups] - probabilities
    advantages = estimate(rewards[groups])
    return (probabilities[groups].prod(1)[:, None] * (advantages[..., None] * scores).mean(1)).sum(0)


UNBIASED: list[tuple[str, dict, Callable[[int], Callable]]] = [
    ("mean_reward", {"baseline": "none"}, lambda m: mean),
    ("mean_reward", {"baseline": "loo"}, lambda m: mean),
    ("mean_reward", {"baseline": "mean"}, lambda m: lambda p: (m - 1) / m * mean(p)),  # its documented factor
    *[
        ("max_at_k", {"k": k, "baseline": baseline}, lambda m, k=k: max_of(k))
        for k in (1, 2, 3, 4)
        for baseline in ("loo_minus_one", "none")
    ],
    ("max_at_k", {}, max_of),
    ("max_at_k", {"baseline": "none"}, max_of),
    ("tail_rl", {}, lambda m: sum_of_max(m - 1)),
    ("chow_bon_rl", {"baseline": "none"}, max_of),
    ("chow_bon_rl", {"baseline": "mean"}, lambda m: lambda p: max_of(m)(p) - mean(p)),
]

BIASED: list[tuple[str, dict, Callable[[int], Callable]]] = [  # N = m where there is one
    ("mean_reward", {"baseline": "mean"}, lambda m: mean),
    ("grpo", {}, lambda m: mean),
    ("bon_max_mean", {}, max_of),
    ("tail_rl", {}, sum_of_max),
    ("max_at_k", {"k": 2, "scale": "group_std"}, lambda m: max_of(2)),
    ("rs_grpo", {}, lambda m: mean),
    ("chow_bon_rl", {"baseline": "mean"}, max_of),
    ("cat_bon", {"target_n": "m"}, max_of),
    ("entropic", {}, max_of),
    ("entropic", {"beta": 1.0}, lambda m: lambda p: (p * GRADED.exp()).sum().log()),
    ("infalign", {}, max_of),
    ("grpo_lead", {}, lambda m: mean),
    ("direct", {"target_n": "m", "alpha": 1.0}, max_of),
    ("direct", {"target_n": "m", "alpha": 0.5}, max_of),
    ("tea", {"target_n": "m", "alpha": 1.0}, max_of),
    ("prefix_tea", {"target_n": "m", "alpha": 1.0}, max_of),
]


def gap(name: str, kwargs: dict, objective: Callable[[int], Callable], m: int) -> float:
    """Largest difference between the expected estimate and the gradient."""
    estimator = build_estimator(name, **{key: m if value == "m" else value for key, value in kwargs.items()})
    return (expected_estimate(estimator, m) - gradient(objective(m))).abs().max().item()


def ids(rows: list) -> list[str]:
    return [f"{name}-{kwargs}" for name, kwargs, _ in rows]


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize(("name", "kwargs", "objective"), UNBIASED, ids=ids(UNBIASED))
def test_estimator_is_unbiased(name, kwargs, objective, m):
    assert gap(name, kwargs, objective, m) < 1e-10


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize(("name", "kwargs", "objective"), BIASED, ids=ids(BIASED))
def test_estimator_is_biased(name, kwargs, objective, m):
    assert gap(name, kwargs, objective, m) > 1e-3


@pytest.mark.parametrize("m", SIZES)
def test_max_rl_follows_the_sum_of_pass_at_k_below_m_and_the_log_likelihood_no_further(m):
    estimate = expected_estimate(build_estimator("max_rl", eps=1e-13), m, BINARY)
    assert (estimate - gradient(sum_of_max(m - 1, BINARY))).abs().max() < 1e-10
    log_likelihood = gradient(lambda probabilities: (probabilities * BINARY).sum().log())
    assert (estimate - log_likelihood).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [pass_at_n_weights, partial(pass_at_n_weights, baseline="loo")])
@pytest.mark.parametrize("m", SIZES)
def test_pass_at_n_is_unbiased_with_the_improper_prior_and_biased_with_a_proper_one(weights, m):
    for target_n in range(1, m + 1):
        truth = gradient(max_of(target_n, BINARY))

        def bias(a: float, b: float, n: int = target_n, truth: Tensor = truth) -> float:
            prior = {"prior_successes": a, "prior_failures": b}
            return (expected_estimate(lambda r: weights(r, n, **prior), m, BINARY) - truth).abs().max().item()

        assert bias(0.0, 2.0 - target_n) < 1e-10
        assert target_n == 1 or bias(1.0, 1.0) > 1e-3  # pass@1 has no factor to estimate


@pytest.mark.parametrize("m", SIZES)
def test_the_objective_of_pass_at_n_is_the_probability_of_a_success(m):
    def pass_at_m(probabilities: Tensor) -> Tensor:
        return 1 - (1 - (probabilities * BINARY).sum()) ** m

    torch.testing.assert_close(gradient(max_of(m, BINARY)), gradient(pass_at_m))
