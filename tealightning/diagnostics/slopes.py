"""Fit how fast a bias falls with the group size: control variates, and a log-log slope with its error.

At m = 512 the bias is a hundredth of the noise. What an estimator computes is, to first order, a mean over the group
of a function of the latent; group means of functions with known expectation explain most of its noise and, subtracted,
leave the expectation as it is.
"""

import math
from dataclasses import dataclass

import torch
from scipy.special import ndtri
from torch import Tensor

_TAIL_POWERS, _POWERS = 5, 4


def truncated_moments(threshold: float, highest: int) -> list[float]:
    """`E[z^p 1{z > t}]` for p = 0..highest, z standard normal: `I_p = t^(p-1) phi(t) + (p-1) I_(p-2)`."""
    density = math.exp(-0.5 * threshold**2) / math.sqrt(2 * math.pi)
    moments = [0.5 * math.erfc(threshold / math.sqrt(2)), density]
    for p in range(2, highest + 1):
        moments.append(threshold ** (p - 1) * density + (p - 1) * moments[p - 2])
    return moments[: highest + 1]


def group_controls(z: Tensor, alpha: float) -> Tensor:
    """Group means of functions of expectation 0: powers of z, and of z above its upper-alpha quantile.

    Args:
        z: [P, m] float64, standard normal latents.
        alpha: Where the tail begins, in (0, 1].

    Returns:
        [P, c] float64.
    """
    columns = []
    if alpha < 1:
        threshold = float(-ndtri(alpha))
        above = (z > threshold).double()
        for p, expected in enumerate(truncated_moments(threshold, _TAIL_POWERS)):
            columns.append((above * z**p).mean(1) - expected)
    for p in range(1, _POWERS + 1):
        expected = math.prod(range(1, p, 2)) if p % 2 == 0 else 0.0
        columns.append((z**p).mean(1) - expected)
    return torch.stack(columns, dim=1)


def controlled_mean(values: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` with what `controls` explain taken out, and its covariance matrix.

    The intercept of the regression of `values` on `controls`, whose expectations are 0.

    Args:
        values: [G, d] float64.
        controls: [G, c] float64.

    Returns:
        ([d], [d, d]) float64.
    """
    design = torch.cat([torch.ones_like(controls[:, :1]), controls], dim=1)
    scale = design.square().mean(0).sqrt()
    gram_inverse = torch.linalg.inv((design / scale).T @ (design / scale))
    coefficients = gram_inverse @ ((design / scale).T @ values)
    residuals = values - (design / scale) @ coefficients
    variance = residuals.T @ residuals / (len(values) - design.shape[1])
    return coefficients[0] / scale[0], variance * gram_inverse[0, 0]


@dataclass(kw_only=True, slots=True)
class SlopeFit:
    """`log y = intercept + slope * log x`."""

    slope: float
    slope_error: float  # from the errors of the points
    intercept: float
    points: int  # that took part
    misfit: float  # sqrt(chi^2 per degree of freedom), at least 1: how far the points lie off the line, in errors

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the slope, widened by the misfit: a curved relation has no sharp slope."""
        half = 1.96 * self.slope_error * self.misfit
        return self.slope - half, self.slope + half


def fit_log_slope(x: Tensor, y: Tensor, errors: Tensor, *, min_signal: float = 2.0) -> SlopeFit | None:
    """Weighted least squares of `log y` on `log x`, with `errors / y` as the standard errors of `log y`.

    Args:
        x: [n] float64, > 0.
        y: [n] float64.
        errors: [n] float64, standard errors of y.
        min_signal: Points below this many standard errors are left out: their logarithm is noise.

    Returns:
        The fit, or None with fewer than 2 usable points.
    """
    usable = (y > min_signal * errors) & (y > 0)
    if int(usable.sum()) < 2:
        return None
    log_x, log_y = x[usable].log(), y[usable].log()
    weights = (y[usable] / errors[usable].clamp(min=1e-300)).square()
    centre = (weights * log_x).sum() / weights.sum()
    spread = (weights * (log_x - centre).square()).sum()
    slope = (weights * (log_x - centre) * log_y).sum() / spread
    intercept = (weights * log_y).sum() / weights.sum() - slope * centre
    chi_square = (weights * (log_y - intercept - slope * log_x).square()).sum()
    freedom = max(1, int(usable.sum()) - 2)
    return SlopeFit(
        slope=float(slope),
        slope_error=float(spread.rsqrt()),
        intercept=float(intercept),
        points=int(usable.sum()),
        misfit=max(1.0, float((chi_square / freedom).sqrt())),
    )
