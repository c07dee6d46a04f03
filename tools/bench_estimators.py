"""Time of each estimator as a ratio to one `torch.sort` of the same rewards, on one thread; a table and one JSON line.

    python tools/bench_estimators.py
    python tools/bench_estimators.py --groups 1000000 --group-size 64 --estimators tea optimal_tea

Sort and estimator run in turn, so that a busy machine slows both; the ratio is that of the medians. The last column
fits `time ~ groups^exponent` over a range of 16: 1 is linear.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from tealightning.estimators import AdvantageEstimator, build_estimator, estimator_names


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio_to_sort(estimator: AdvantageEstimator, rewards: Tensor, repeats: int) -> tuple[float, float]:
    """(median seconds of the estimator, the same over the median seconds of a sort)."""
    estimator(rewards)  # constants are computed once
    times = [(seconds(lambda: torch.sort(rewards)), seconds(lambda: estimator(rewards))) for _ in range(repeats)]
    sort, own = (median(column) for column in zip(*times, strict=True))
    return own, own / sort


def growth_exponent(estimator: AdvantageEstimator, rewards: Tensor, repeats: int) -> float:
    """Exponent of the time in the number of groups, between a sixteenth of them and all."""
    few = rewards[: max(1, len(rewards) // 16)]
    times = [(seconds(lambda: estimator(few)), seconds(lambda: estimator(rewards))) for _ in range(repeats)]
    small, large = (min(column) for column in zip(*times, strict=True))
    return math.log(large / small) / math.log(len(rewards) / len(few))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=62_500)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--estimators", nargs="+", default=estimator_names(), choices=estimator_names(), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(options.groups, options.group_size, dtype=torch.float64, generator=generator)
    binary = {"pass_at_n", "grpo_lead"} & set(options.estimators)
    if binary:
        print(f"{', '.join(sorted(binary))}: timed on 0/1 rewards.")
    print(f"{options.groups} groups of {options.group_size}, float64, one thread, median of {options.repeats}\n")
    print(f"| {'estimator':<14} | ms     | over a sort | exponent |\n|{'-' * 16}|--------|-------------|----------|")
    ratios = {}
    for name in options.estimators:
        estimator = build_estimator(name)
        given = (rewards > 0).double() if name in binary else rewards
        given = given.abs() if estimator.lowest_reward == 0 else given
        own, ratios[name] = ratio_to_sort(estimator, given, options.repeats)
        exponent = growth_exponent(estimator, given, options.repeats)
        print(f"| {name:<14} | {own * 1e3:6.1f} | {ratios[name]:11.2f} | {exponent:8.2f} |", flush=True)
    print()
    print(json.dumps({"bench": "estimators", "groups": options.groups, "group_size": options.group_size} | ratios))


if __name__ == "__main__":
    main()
