"""Checks of constructor arguments: each returns the value, or raises a UserError that names the argument."""

import math
from collections.abc import Callable, Sequence
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


def check_text(name: str, value: str) -> str:
    """`value` if it can be encoded: half a character is half of a pair that JSON escapes (`\\ud83d`), or a byte of a
    command line or file name that is no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character (a lone surrogate) at {error.start}: {value!r}.") from None
    return value


def check_share(name: str, value: float) -> float:
    """`value` if it is a share above 0, such as the tail level alpha or a probability mass."""
    return _check_number(name, value, "a number in (0, 1]", lambda number: 0 < number <= 1)


def check_finite(name: str, value: float) -> float:
    """`value` if it is a finite number."""
    return _check_number(name, value, "a finite number", math.isfinite)


def check_positive(name: str, value: float) -> float:
    """`value` if it is a finite number above 0."""
    return _check_number(name, value, "a finite number above 0", lambda number: 0 < number < math.inf)


def check_not_negative(name: str, value: float) -> float:
    """`value` if it is a finite number of at least 0."""
    return _check_number(name, value, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def _check_number(name: str, value: float, expected: str, is_valid: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
        raise UserError(f"{name} must be {expected}, got {value!r}.")
    return float(value)
