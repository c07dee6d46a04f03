"""Names on the command line: snake_case names of estimators, engines and rewards, and errors that name the nearest."""

import difflib
import inspect
import re
from collections.abc import Sequence

from lightning.pytorch import Trainer

from tealightning.callbacks import RolloutCallback
from tealightning.data import PromptDataModule
from tealightning.estimators.base import ESTIMATORS
from tealightning.loss import PolicyGradientLoss
from tealightning.module import PostTrainingModule
from tealightning.registry import Registry
from tealightning.rewards.base import REWARDS
from tealightning.rollouts.base import ENGINES
from tealightning.types import SamplingConfig

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


def shorten_error(message: str) -> str:
    """A parser's message without its nesting, and with the nearest valid names where a name is unknown."""
    if match := re.search(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", message):
        return _unknown_key(match[1] or match[2])
    if match := re.search(r"[Uu]nrecognized arguments: --(\S+)", message):
        return _unknown_key(match[1].partition("=")[0])
    if match := re.search(r"Problem with given class_path '([^']+)'|Expected a dot import path string: (\S+)", message):
        return _unknown_class(match[1] or match[2], message)
    reasons = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    told = [r for r in reasons if not r.startswith(_NESTING)]
    return " ".join(told).replace("typing.Literal", "one of ")


_NESTING = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value:",
)


def _unknown_key(key: str) -> str:
    """A message about the first part of a dotted `key` that is no setting of anything."""
    valid = _valid_keys()
    parts = key.split(".")
    part = next((p for p in parts if p not in valid), parts[-1])
    near = difflib.get_close_matches(part, valid, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"Unknown setting {key!r}.{hint} `tealightning fit --help` lists the settings."


def _unknown_class(class_path: str, message: str) -> str:
    classes = {cls.__name__ for registry in REGISTRIES.values() for cls in registry.classes()} | set(_SECTIONS)
    name = class_path.rpartition(".")[2]
    near = difflib.get_close_matches(name.lower(), {c.lower(): c for c in classes}, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in sorted(classes) if c.lower() in near)}?" if near else ""
    reason = re.search(rf"class_path '{re.escape(class_path)}':\s*(.+)", message)
    detail = f" ({reason[1].strip()})" if reason else ""
    return f"Unknown class {class_path!r}{detail}.{hint} Your own file: --import my_file.py."


def _valid_keys() -> set[str]:
    """The name of every setting of every section and registered class."""
    classes: list[type] = [cls for registry in REGISTRIES.values() for cls in registry.classes()]
    classes += _SECTIONS.values()
    keys = {key for cls in classes for key in inspect.signature(cls).parameters}
    return keys | {"model", "data", "rollout", "trainer", "seed_everything", "ckpt_path", "class_path", "init_args"}


_SECTIONS: dict[str, type] = {
    cls.__name__: cls
    for cls in (Trainer, PostTrainingModule, PolicyGradientLoss, PromptDataModule, RolloutCallback, SamplingConfig)
}
