"""Groups of 0/1 rewards: the policy gradient of pass@N, the probability of at least one success in N.

`outcomes` are [P, m] float64, 0 or 1; the success probability is p ~ Beta(prior_successes, prior_failures).
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def _miss_moments(others: int, power: int, prior_successes: float, prior_failures: float) -> tuple[float, ...]:
    """`E[(1-p)^power]` given f = 0..others failures among `others` rollouts:

        prod_{j=0}^{power-1} (prior_failures + f + j) / (prior_successes + prior_failures + others + j)

    Multiplied from the last j down, so that with the prior (0, 1 - power), where one factor is exactly 0 as soon as
    f < power, all factors before that zero are below 1 and nothing overflows.
    """
    failures = torch.arange(others + 1, dtype=torch.float64)[:, None]
    step = torch.arange(power, dtype=torch.float64).flip(0)
    factors = (prior_failures + failures + step) / (prior_successes + prior_failures + others + step)
    if power == 0:
        return (1.0,) * (others + 1)
    return tuple(factors.cumprod(dim=1)[:, -1].tolist())


def pass_at_n_factors(outcomes: Tensor, target_n: int, *, prior_successes: float, prior_failures: float) -> Tensor:
    """Expected derivative of pass@N for every rollout, in [0, N] for a positive prior:

        N * E[(1-p)^(N-1) | the other m-1 outcomes]

    `N (1-p)^(N-1)` is the derivative of pass@N, `1 - (1-p)^N`. Any real prior will do whose sum with m - 1 is positive
    (else a ValueError: the moment does not exist); `(0, 2 - N)` gives `N C(f, N-1)/C(m-1, N-1)` with f failures among
    the others, the unbiased estimate for N <= m.

    >>> outcomes = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    >>> pass_at_n_factors(outcomes, 2, prior_successes=1, prior_failures=1)
    tensor([[1.5000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    others = outcomes.shape[-1] - 1
    if prior_successes + prior_failures + others <= 0:
        raise ValueError(
            f"prior_successes + prior_failures must be above 1 - m = {-others} for m={others + 1} rollouts, got "
            f"{prior_successes} + {prior_failures}; the prior (0, 2 - target_n) needs target_n <= m."
        )
    moments = _miss_moments(others, target_n - 1, float(prior_successes), float(prior_failures))
    table = outcomes.new_tensor(moments) * target_n
    failed = 1 - outcomes
    return table[(failed.sum(dim=-1, keepdim=True) - failed).long()]


def pass_at_n_weights(
    outcomes: Tensor, target_n: int, *, prior_successes: float, prior_failures: float, baseline: str = "none"
) -> Tensor:
    """Policy-gradient weights of pass@N, with the factors of `pass_at_n_factors`; failures get exactly 0:

        A_i = R_i * factor_i

    With `baseline="loo"` the mean of the others' outcomes is subtracted from `R_i` (m >= 2), for the same expectation:
    factor and baseline of rollout i know the others only. Zeros if all outcomes are equal. Where p is large the weights
    become smaller; where it is small they hardly change, as the others seldom succeed.

    >>> outcomes = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    >>> pass_at_n_weights(outcomes, 2, prior_successes=1, prior_failures=1)
    tensor([[1.5000, 0.0000, 0.0000]], dtype=torch.float64)
    >>> pass_at_n_weights(outcomes, 2, prior_successes=1, prior_failures=1, baseline="loo")
    tensor([[ 1.5000, -0.5000, -0.5000]], dtype=torch.float64)
    """
    factors = pass_at_n_factors(outcomes, target_n, prior_successes=prior_successes, prior_failures=prior_failures)
    if baseline == "none":
        return outcomes * factors
    others = (outcomes.sum(dim=-1, keepdim=True) - outcomes) / (outcomes.shape[-1] - 1)
    return (outcomes - others) * factors
