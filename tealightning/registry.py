"""Registries: one per extension point, each keyed by the snake_case of the class name.

`register` is the whole extension API: decorate a subclass of `AdvantageEstimator`, `Reward` or
`RolloutEngine` and it is known by name everywhere (command line, tables, tests).
"""

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from tealightning.errors import UserError, WrongClassError

T = TypeVar("T", bound=type)

_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake_case(class_name: str) -> str:
    """`PrefixTEA` -> `prefix_tea`, `MaxAtK` -> `max_at_k`, `GRPO` -> `grpo`."""
    return _WORD_STARTS.sub("_", class_name).lower()


def did_you_mean(name: str, valid: Iterable[str], *, list_up_to: int | None = None) -> str:
    """The end of an error message about an unknown `name`: the nearest valid names, then all of them, unless they are
    more than `list_up_to`."""
    by_lower = {v.lower(): v for v in sorted(valid)}
    near = [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    is_listed = list_up_to is None or len(by_lower) <= list_up_to
    return hint + (f" Valid: {', '.join(by_lower.values())}." if is_listed else "")


class Registry:
    """Classes of one kind by snake_case name; `kind` is what they are, for messages ("estimator")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def add(self, cls: T) -> T:
        """Make `cls` known under the snake_case of its name; a name that another class has is a UserError."""
        name = snake_case(cls.__name__)
        known = self._classes.get(name)
        same_source = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if known is not None and not same_source:  # a re-imported module may register its class again
            raise UserError(f"{self.kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}.")
        self._classes[name] = cls
        return cls

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)

    def classes(self) -> list[type]:
        """All classes, in the order of `names`."""
        return [self._classes[name] for name in self.names()]

    def get(self, name: str) -> type:
        """The class called `name` (snake_case, or the class name itself); an unknown one is a UserError."""
        cls = self._classes.get(name) or self._classes.get(snake_case(name))
        if cls is None:
            raise UserError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._classes)}")
        return cls

    def build(self, name: str, **kwargs: Any) -> Any:
        """`get(name)(**kwargs)`; an unknown name or parameter is a ValueError naming the valid ones."""
        cls = self.get(name)
        parameters = inspect.signature(cls).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in kwargs:
            if key not in parameters and not takes_any:
                valid = ", ".join(parameters) or "none"
                raise UserError(f"{self.kind} {name!r} has no parameter {key!r}. Its parameters: {valid}.")
        return cls(**kwargs)


def register(cls: T) -> T:
    """Class decorator: add an estimator, reward or engine to the registry of its base class.

    Raises:
        WrongClassError: if the class derives from none of the extension points.
    """
    registry = getattr(cls, "registry", None)
    if not isinstance(registry, Registry):
        raise WrongClassError(
            f"@register takes a subclass of AdvantageEstimator, Reward or RolloutEngine, and {cls.__name__} is none."
        )
    return registry.add(cls)
