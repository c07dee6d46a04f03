"""Metric of the tail fit: is a reward's upper tail what the tail estimators assume?"""

from typing import Any

import torch
from torch import Tensor

from tealightning.checks import check_integer, check_share
from tealightning.functional.tail import smallest_group
from tealightning.functional.tail_checks import check_tail, summarise
from tealightning.metrics.prompt_samples import PromptSamples


class TailFit(PromptSamples):
    """Checks of the upper tail of M samples a prompt, over prompts.

    `compute()` returns float64 scalars. About the upper `2 alpha`, which the tail estimators assume to be Gaussian, if
    it holds 4 samples (the part can be set by `tested_share`):

    - `tail_qq_r2`: squared correlation of the tail with Gaussian order statistics;
    - `tail_qq_rejected`: share of the prompts where it is below the 5% quantile of Gaussian samples (Gaussian: 0.05);
    - `tail_shape`, `tail_shape_se`: generalised Pareto shape, pooled over prompts, bias-corrected;
    - `tail_shape_gaussian`: what Gaussian samples of the same size have, about -0.41 at `alpha = 0.25`.

    About best-of-n at `n = M - m`, predicted from groups of m samples and measured on the M - m others, if `M >= 2m`:

    - `tail_prediction_error`, `tail_prediction_error_se`: predicted - measured, in standard deviations of the reward;
    - `tail_prediction_error_gaussian`: what it is for Gaussian rewards: the plug-in is biased low at a finite m;
    - `tail_coverage`: share of the groups whose 90% interval holds the measured value (Gaussian: 0.90).

    Always: `tail_ties`, share of the upper alpha's samples with a value that the prompt has more than once.

    Keys for which M is too small are left out, as `BestOfN` leaves out budgets beyond the samples; before any update
    all are NaN, and so is a standard error over a single prompt. A prompt without spread counts in the ties only.

    Args:
        m: Samples that best-of-n is predicted from; best the group size of training.
        alpha: Upper-tail level in (0, 1].
        tested_share: Upper share of the samples that is compared with a Gaussian, in (0, 1]; None = 2 alpha, at most 1.

    Example:
        >>> import torch
        >>> metric = TailFit(m=16)
        >>> metric.update(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
        >>> {key: round(value.item(), 2) for key, value in metric.compute().items() if "qq" in key}
        {'tail_qq_r2': 0.97, 'tail_qq_rejected': 0.05}
    """

    higher_is_better = None

    def __init__(self, m: int = 16, alpha: float = 0.25, tested_share: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = check_share("alpha", alpha)
        self.m = check_integer("m", m, smallest_group(alpha, 2))
        self.tested_share = None if tested_share is None else check_share("tested_share", tested_share)

    def compute(self) -> dict[str, Tensor]:
        """The keys that the class describes."""
        _, samples = self._pooled()
        if samples.isnan().all():
            return {key: torch.full((), float("nan"), dtype=torch.float64, device=self.device) for key in KEYS}
        found = summarise(check_tail(samples, m=self.m, alpha=self.alpha, tested_share=self.tested_share))
        return {key: value.to(self.device) for key, value in found.items()}


KEYS = (
    "tail_ties",
    "tail_qq_r2",
    "tail_qq_rejected",
    "tail_shape",
    "tail_shape_se",
    "tail_shape_gaussian",
    "tail_prediction_error",
    "tail_prediction_error_se",
    "tail_prediction_error_gaussian",
    "tail_coverage",
)
"""Every key, in the order of `summarise`."""
