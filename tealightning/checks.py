"""Checks of constructor arguments: each raises a UserError that names the argument."""

import math
from collections.abc import Sequence
from typing import TypeVar

from tealightning.errors import UserError

Name = TypeVar("Name", bound=str)


def check_integer(name: str, value: int, minimum: int) -> int:
    """`value` if it is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return value


def check_choice(name: str, value: Name, choices: Sequence[str]) -> Name:
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def check_alpha(alpha: float) -> float:
    """`alpha` if it is a tail level in (0, 1]."""
    if not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
        raise UserError(f"alpha must be a number in (0, 1], the upper share of each group that counts; got {alpha!r}.")
    return float(alpha)


def check_finite(name: str, value: float) -> float:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """`value` if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a finite number above 0, got {value!r}.")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """`value` if it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name} must be a finite number of at least 0, got {value!r}.")
    return float(value)
