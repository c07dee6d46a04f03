"""GRPO with an exponential utility: the larger beta, the more the best of a group count."""

import torch
from torch import Tensor

from tealightning.checks import check_positive
from tealightning.estimators.grpo import GRPO
from tealightning.functional.moments import centred
from tealightning.registry import register


@register
class RsGRPO(GRPO):
    """Risk-sensitive GRPO (arXiv 2509.24261), with the sample standard deviation:

        A_i = (1/beta) (exp(beta z_i) / mean_j exp(beta z_j) - 1),     z = (R - mean)/(std + eps)

    The gradient of `(1/beta) log E[exp(beta z)]` with the group's own mean in the denominator; beta -> 0 is GRPO.
    Biased: the standardisation and the denominator depend on the rollout itself. Between -1/beta and (m-1)/beta,
    whatever the rewards. A constant group gets zeros. Deviation: rewards are standardised first, so that beta has no
    unit; the authors' code takes rewards of 0 and 1 as they are.

    Args:
        beta: How much the top counts, > 0.
    """

    objective = "log E[exp(beta z)]/beta (biased)"

    def __init__(self, *, beta: float = 2.0, eps: float = 1e-4) -> None:
        self.beta = check_positive("beta", beta)
        super().__init__(eps=eps)

    def compute(self, rewards: Tensor) -> Tensor:
        standardised = super().compute(rewards)
        # Exponents below 0 do not overflow, and `exp(x) - 1` keeps the digits of a small beta.
        exponents = self.beta * (standardised - standardised.amax(dim=1, keepdim=True))
        return centred(torch.expm1(exponents)) / (self.beta * exponents.exp().mean(dim=1, keepdim=True))
