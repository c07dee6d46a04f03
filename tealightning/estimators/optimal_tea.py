"""The least noisy of the exactly unbiased tail-extrapolated gradients, and its constants.

`tools/build_constants.py` writes the moments for common group sizes into `optimal_tea.npz` beside this file. Others are
computed once and kept in `$TEALIGHTNING_CACHE` (default: `tealightning` in `$XDG_CACHE_HOME` or `~/.cache`). Both make
runs repeatable to the last bit whatever the versions of numpy and torch.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tealightning.checks import check_choice, check_not_negative
from tealightning.estimators._tail import TailEstimator
from tealightning.functional.normal_tail import TailScale
from tealightning.functional.optimal_tail import TailMoments, optimal_coefficients, optimal_weights, tail_moments
from tealightning.functional.tail import tail_size
from tealightning.registry import register

SHIPPED = Path(__file__).with_name("optimal_tea.npz")
FORMAT = 1
"""Part of the file names on disk: raise it when the meaning or the computation of the moments changes."""


@register
class OptimalTEA(TailEstimator):
    """Rank coefficients for the top `k = ceil(alpha m)` rollouts, exactly 0 for the others (and for the k-th):

        A_(j) = a_j e_j + b_j e_j^2 / s,     j < k

    `e_j = R_(j) - R_(k)` is the excess over the k-th reward and `s` a spread of the group. Among all coefficients for
    which this is exactly unbiased for `E[max of N]` under Gaussian rewards, those with the least noise (this project's
    own; see `functional.optimal_tail.optimal_coefficients`). Equal rewards get equal advantages. A tail without spread
    gets zeros.

    Args:
        alpha: Upper-tail level in (0, 1]; 1 uses the whole group and assumes that all of it is Gaussian.
        scale: What `s` is: `tail_rms`, the root mean square of the excesses; `tail_std`, their standard deviation
            (needs a tail of 5); `group_std`, the standard deviation of the whole group.
        lam: How many directions of parameter space the reward does not depend on count for one that it does. Large for
            a language model; the noise hardly changes beyond 100.
        scale_weight: Share of the spread's pull that is followed: 1 is best-of-N, 0 the mean reward. Below 1 trades
            bias for noise where the spread is hard to move.
    """

    def __init__(
        self,
        *,
        target_n: int = 128,
        alpha: float = 0.25,
        scale: Literal["tail_rms", "tail_std", "group_std"] = "tail_rms",
        lam: float = 100.0,
        scale_weight: float = 1.0,
    ) -> None:
        super().__init__(target_n=target_n, alpha=alpha)
        self.scale: TailScale = check_choice("scale", scale, ("tail_rms", "tail_std", "group_std"))
        self.lam = check_not_negative("lam", lam)
        self.scale_weight = check_not_negative("scale_weight", scale_weight)

    @property
    def min_tail(self) -> int:
        """Smallest k for which `s` says anything and `E[1/s^2]` exists: 3, and 5 for `tail_std`, which is a standard
        deviation of k - 1 values and can be arbitrarily small beside them."""
        return 5 if self.scale == "tail_std" else 3

    def compute(self, rewards: Tensor) -> Tensor:
        m = rewards.shape[1]
        k = tail_size(self.alpha, m)
        coefficients = _coefficients(m, k, self.scale, self.target_n, self.lam, self.scale_weight)
        return optimal_weights(rewards, coefficients, self.scale)


@lru_cache(maxsize=256)
def _coefficients(m: int, k: int, scale: TailScale, target_n: int, lam: float, scale_weight: float) -> Tensor:
    """[2, k-1] float64."""
    return torch.from_numpy(
        optimal_coefficients(constants(m, k, scale), target_n=target_n, lam=lam, scale_weight=scale_weight)
    )


@lru_cache(maxsize=256)
def constants(m: int, k: int, scale: TailScale) -> TailMoments:
    """Moments for a group of m with a tail of k: shipped, from disk, or computed (a second or so) and saved."""
    name = constant_name(m, k, scale)
    with np.load(SHIPPED) as shipped:
        if f"{name}/signal" in shipped:
            return _unpack(shipped, f"{name}/")
    own = os.environ.get("TEALIGHTNING_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tealightning"
    file = folder / f"optimal_tea-{FORMAT}-{name}.npz"
    # There may be no such file yet, or a broken one.
    with contextlib.suppress(OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile), np.load(file) as saved:
        return _unpack(saved)
    from tealightning.reliability.files import write_whole  # imports Lightning

    packed = pack(tail_moments(m, k, scale))
    archive = io.BytesIO()
    np.savez(archive, **packed)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):  # a disk that takes no files costs the next process a second
        write_whole(file, archive.getvalue())  # ranks that compute the same constants never meet a half-written file
    return _unpack(packed)  # what the next process reads, to the last bit


def constant_name(m: int, k: int, scale: TailScale) -> str:
    """Key of one set of constants: `m16-k4-tail_rms`."""
    return f"m{m}-k{k}-{scale}"


def pack(moments: TailMoments, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays to save: of the symmetric noise matrices the upper triangle, of the unrelated one its diagonals."""
    n = len(moments.noise) // 2
    blocks = moments.unrelated
    diagonals = np.stack([blocks.diagonal()[:n], blocks.diagonal()[n:], blocks[:n, n:].diagonal()])
    upper = moments.noise[np.triu_indices(2 * n)]
    return {f"{prefix}signal": moments.signal, f"{prefix}noise": upper, f"{prefix}unrelated": diagonals}


def _unpack(arrays: Mapping[str, np.ndarray], prefix: str = "") -> TailMoments:
    signal, upper, diagonals = (np.asarray(arrays[f"{prefix}{field}"]) for field in ("signal", "noise", "unrelated"))
    p = signal.shape[1]
    rows, columns = np.triu_indices(p)
    noise = np.zeros((p, p))
    noise[rows, columns] = noise[columns, rows] = upper
    linear, square, cross = (np.diag(d) for d in diagonals)
    return TailMoments(signal=signal, noise=noise, unrelated=np.block([[linear, cross], [cross, square]]))
