"""Resolve registered names in settings: `tea` or `TEA` for an estimator, an engine or a reward."""

import re
from collections.abc import Sequence
from typing import Any

from tealightning.errors import UserError
from tealightning.estimators.base import ESTIMATORS
from tealightning.registry import Registry
from tealightning.rewards.base import REWARDS
from tealightning.rollouts.base import ENGINES

_REGISTRIES = (
    (r"model\.estimator", ESTIMATORS),
    (r"rollout\.engine", ENGINES),
    (r"rollout\.reward(\.rewards\.[^.]+)*", REWARDS),
)


def registry_of(key: str) -> Registry | None:
    """The registry whose names the setting `key` takes: dotted, without `init_args`."""
    return next((registry for pattern, registry in _REGISTRIES if re.fullmatch(pattern, key)), None)


def class_path(registry: Registry, name: str) -> str:
    """`tea` and `TEA` as `tealightning.estimators.tea.TEA`; a dotted path, a file or JSON as it is.

    Raises:
        ValueError: for an unknown name, with the nearest valid ones.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        return name
    cls = registry.get(name)
    return f"{cls.__module__}.{cls.__qualname__}"


def _class_path(registry: Registry, name: str, key: str) -> str:
    try:
        return class_path(registry, name)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def canonical_args(args: Sequence[str]) -> list[str]:
    """`args` with registered names as class paths: of `--model.estimator=tea`, `--model.estimator tea` and
    `--model.estimator.help tea`. Everything else passes through.

    Raises:
        ValueError: for an unknown name, with the nearest valid ones.
    """
    result: list[str] = []
    expected: Registry | None = None  # by the option before
    for arg in args:
        option, equals, value = arg.partition("=")
        registry = registry_of(_dotted_key(option)) if option.startswith("--") else None
        if registry is not None and equals:
            arg = f"{option}={_class_path(registry, value, _dotted_key(option))}"
        elif expected is not None and not arg.startswith("-"):
            arg = _class_path(expected, arg, _dotted_key(result[-1]))
        result.append(arg)
        expected = None if equals else registry
    return result


def _dotted_key(option: str) -> str:
    key = option.removeprefix("--").replace(".init_args.", ".")
    return key.removesuffix(".class_path").removesuffix(".help")


def canonical_settings(settings: Any, key: str = "") -> Any:
    """A parsed YAML document with registered names as class paths.

    Raises:
        ValueError: for an unknown name, with the nearest valid ones; or for null in place of one.
    """
    registry = registry_of(key)
    if registry is not None and settings is None:
        raise UserError(f"{key} must be set, got null. Valid: {', '.join(registry.names())}.")
    if registry is not None and isinstance(settings, str):
        return _class_path(registry, settings, key)
    if not isinstance(settings, dict):
        return settings
    result = {}
    for name, value in settings.items():
        if name == "class_path" and registry is not None and isinstance(value, str):
            result[name] = _class_path(registry, value, key)
        else:
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            result[name] = canonical_settings(value, inner)
    return result
