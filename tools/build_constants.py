"""Write the constants of `optimal_tea` that the package ships: tealightning/estimators/optimal_tea.npz.

python tools/build_constants.py
"""

import numpy as np
from tqdm import tqdm

from tealightning.estimators.optimal_tea import SHIPPED, OptimalTEA, constant_name, pack
from tealightning.functional.optimal_tail import tail_moments
from tealightning.functional.tail import tail_size

GROUP_SIZES = (8, 12, 16, 24, 32, 48, 64)
ALPHAS = (0.25, 0.5, 1.0)


def main() -> None:
    """Compute and save every (m, k, scale) that works."""
    cases = [
        (m, k, scale)
        for m in GROUP_SIZES
        for k in sorted({tail_size(alpha, m) for alpha in ALPHAS})
        for scale in ("tail_rms", "tail_std", "group_std")
        if k >= OptimalTEA(scale=scale).min_tail
        and (k < m or scale == "group_std")  # the whole group: the recommended setting
    ]
    arrays: dict[str, np.ndarray] = {}
    for m, k, scale in tqdm(cases, desc="constants"):
        arrays |= pack(tail_moments(m, k, scale), f"{constant_name(m, k, scale)}/")
    np.savez_compressed(SHIPPED, **arrays)
    print(f"{len(cases)} sets of constants in {SHIPPED}, {SHIPPED.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
