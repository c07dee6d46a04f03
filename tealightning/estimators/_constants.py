"""Constants of `optimal_tea`: shipped for common group sizes, else computed once and kept on disk.

The file `optimal_tea.npz` beside this one holds the moments of `functional.optimal_tail.tail_moments`; it is written by
`tools/build_constants.py`. Other sizes go to `$TEALIGHTNING_CACHE` (default: `tealightning` in `$XDG_CACHE_HOME` or
`~/.cache`). Both make runs repeatable to the last bit whatever the versions of numpy and torch.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from tealightning.functional.normal_tail import TailScale
from tealightning.functional.optimal_tail import TailMoments, tail_moments

SHIPPED = Path(__file__).with_name("optimal_tea.npz")
FORMAT = 1
"""Part of the file names on disk: raise it when the meaning or the computation of the moments changes."""

_FIELDS = ("signal", "noise", "unrelated")


def constant_name(m: int, k: int, scale: TailScale) -> str:
    """Key of one set of constants: `m16-k4-tail_rms`."""
    return f"m{m}-k{k}-{scale}"


@lru_cache(maxsize=256)
def constants(m: int, k: int, scale: TailScale) -> TailMoments:
    """Moments for a group of m with a tail of k: shipped, from disk, or computed (a second or so) and saved."""
    name = constant_name(m, k, scale)
    with np.load(SHIPPED) as shipped:
        if f"{name}/signal" in shipped:
            return _unpack(shipped, f"{name}/")
    file = cache_folder() / f"optimal_tea-{FORMAT}-{name}.npz"
    # There may be no such file yet, or a broken one.
    with contextlib.suppress(OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile), np.load(file) as saved:
        return _unpack(saved)
    from tealightning.reliability.files import write_whole  # imports Lightning

    moments = tail_moments(m, k, scale)
    archive = io.BytesIO()
    np.savez(archive, **pack(moments))  # type: ignore[arg-type]
    with contextlib.suppress(OSError):  # a disk that takes no files costs the next process a second
        write_whole(file, archive.getvalue())  # ranks that compute the same constants never meet a half-written file
    return moments


def cache_folder() -> Path:
    """The folder of computed constants."""
    if own := os.environ.get("TEALIGHTNING_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tealightning"


def pack(moments: TailMoments, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays to save: of the symmetric noise matrices the upper triangle, of the unrelated one its diagonals."""
    n = len(moments.noise) // 2
    rows, columns = np.triu_indices(2 * n)
    blocks = moments.unrelated
    diagonals = np.stack([blocks.diagonal()[:n], blocks.diagonal()[n:], blocks[:n, n:].diagonal()])
    return {
        f"{prefix}signal": moments.signal,
        f"{prefix}noise": moments.noise[rows, columns],
        f"{prefix}unrelated": diagonals,
    }


def _unpack(arrays: Mapping[str, np.ndarray], prefix: str = "") -> TailMoments:
    signal, upper, diagonals = (np.asarray(arrays[f"{prefix}{field}"]) for field in _FIELDS)
    p = signal.shape[1]
    rows, columns = np.triu_indices(p)
    noise = np.zeros((p, p))
    noise[rows, columns] = noise[columns, rows] = upper
    linear, square, cross = (np.diag(d) for d in diagonals)
    return TailMoments(signal=signal, noise=noise, unrelated=np.block([[linear, cross], [cross, square]]))
