"""Convert intervals to the plain numbers of `results.json`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tealightning.functional.statistics import Interval, crossed_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """Means over seeds and prompts with intervals."""

    confidence: float
    samples: int

    def interval(self, values: Tensor) -> Interval:
        """Of [S, Q, C] values."""
        return crossed_interval(values, confidence=self.confidence, samples=self.samples)

    def __call__(self, values: Tensor) -> list[dict[str, float | None]]:
        """C estimates of [S, Q, C] values."""
        return self.rows(self.interval(values))

    def curve(self, values: Tensor, ns: Sequence[int]) -> list[dict[str, Any]]:
        """An estimate for each n of [S, Q, len(ns)] values."""
        return [{"n": n} | row for n, row in zip(ns, self(values), strict=True)]

    def rows(self, interval: Interval) -> list[dict[str, float | None]]:
        """The interval's columns, one dict each."""
        columns = {
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "se": interval.standard_error,
        }
        lists = {name: numbers(values) for name, values in columns.items()}
        return [{name: values[i] for name, values in lists.items()} for i in range(len(interval.mean))]


def numbers(values: Tensor) -> list[float | None]:
    """Plain numbers, None for what is none: JSON knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]
