"""Names on the command line: snake_case names of estimators, engines and rewards, and errors that name the nearest."""

import re
from collections.abc import Sequence

from tealightning.estimators import ESTIMATORS
from tealightning.registry import Registry
from tealightning.rewards.base import REWARDS
from tealightning.rollouts.base import ENGINES

REGISTRIES: dict[str, Registry] = {
    "model.estimator": ESTIMATORS,
    "model.init_args.estimator": ESTIMATORS,
    "rollout.engine": ENGINES,
    "rollout.reward": REWARDS,
}


def canonical_args(args: Sequence[str]) -> list[str]:
    """`args` with registered names of estimators, engines and rewards as full class paths.

    `--model.estimator=tea` and `--model.estimator=TEA` both become `--model.estimator=tealightning.estimators.tea.TEA`.
    Dotted class paths and anything that is no option of this kind pass through.

    Raises:
        ValueError: for an unknown name, with the nearest valid ones.
    """
    result: list[str] = []
    expects: Registry | None = None
    for arg in args:
        key, equals, value = arg.partition("=")
        registry = REGISTRIES.get(key.removeprefix("--")) if key.startswith("--") else None
        if expects is not None:
            result.append(_class_path(expects, arg))
        elif registry is not None and equals:
            result.append(f"{key}={_class_path(registry, value)}")
        else:
            result.append(arg)
        expects = registry if registry is not None and not equals else None
    return result


def _class_path(registry: Registry, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", value):
        return value  # a dotted class path, a JSON object, a file
    cls = registry.get(value)
    return f"{cls.__module__}.{cls.__qualname__}"
