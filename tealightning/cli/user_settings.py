"""Flatten the settings that the user wrote: which file or option an error comes from, what was replaced."""

import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from tealightning.callbacks import Deadlines, HealthChecks, ResumableCheckpoint, RolloutCallback
from tealightning.cli.names import class_path, registry_of
from tealightning.data import PromptDataModule
from tealightning.estimators.base import ESTIMATORS
from tealightning.training.loss import PolicyGradientLoss
from tealightning.training.module import PostTrainingModule
from tealightning.types import SamplingConfig

SECTIONS: dict[str, type] = {
    "trainer": Trainer,
    "model": PostTrainingModule,
    "model.loss": PolicyGradientLoss,
    "data": PromptDataModule,
    "rollout": RolloutCallback,
    "rollout.sampling": SamplingConfig,
    "checkpoint": ResumableCheckpoint,
    "health": HealthChecks,
    "deadlines": Deadlines,
}
TOP_LEVEL = ("model", "data", "rollout", "checkpoint", "health", "deadlines", "trainer", "seed_everything", "ckpt_path")

_MODULES = {
    "optimizer": ["torch.optim"],
    "lr_scheduler": ["torch.optim.lr_scheduler"],
    "logger": ["lightning.pytorch.loggers"],
    "callbacks": ["tealightning.callbacks", "lightning.pytorch.callbacks"],
}
"""Last part of a setting that takes a class -> where the classes for it are."""


@dataclass(kw_only=True, slots=True)
class Setting:
    """One setting of a file or an option."""

    key: str  # dotted, without `init_args` and `class_path`: "model.estimator.target_n"
    value: Any  # of a class, its path
    source: str  # the file's name; empty for an option


def given_settings(args: Sequence[str]) -> list[Setting]:
    """Every setting of the configs and options in `args`, in their order; what cannot be read is left out."""
    settings: list[Setting] = []
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        if option in ("-c", "--config"):
            settings += _file_settings(value if equals else next(remaining, ""))
        elif option.startswith("--"):
            key = option.removeprefix("--").removesuffix("+").replace(".init_args.", ".").removesuffix(".class_path")
            settings.append(Setting(key=key, value=value if equals else next(remaining, ""), source=""))
    return settings


def _file_settings(path: str) -> Iterator[Setting]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    yield from flat_settings("", document, path)


def flat_settings(key: str, node: Any, source: str) -> Iterator[Setting]:
    if isinstance(node, list):
        for item in node:
            yield from flat_settings(key, item, source)
    if not isinstance(node, dict):
        yield Setting(key=key, value=node, source=source)
        return
    yield Setting(key=key, value=node.get("class_path", node), source=source)
    for name, value in node.items():
        if name == "init_args":
            yield from flat_settings(key, value, source)
        elif name != "class_path":
            yield from flat_settings(f"{key}.{name}".lstrip("."), value, source)


def with_a_fresh_estimator(args: Sequence[str]) -> list[str]:
    """`args`, and the options that reset what was set for an estimator that another one replaced.

    jsonargparse keeps the arguments that both classes have; `alpha` or `scale` mean something else in each, and a
    comparison would be of settings that nobody wrote. `target_n` stays: it says how many samples are deployed.
    """
    key = "model.estimator"
    settings = [s for s in given_settings(args) if f"{s.key}.".startswith(f"{key}.")]
    chosen: list[tuple[int, type]] = []  # position among the settings, class
    for position, setting in enumerate(settings):
        if setting.key == key and isinstance(setting.value, str):
            try:
                path = class_path(ESTIMATORS, setting.value)
            except ValueError:  # told when it is parsed
                return list(args)
            cls = class_of(key, [Setting(key=key, value=path, source="")])
            if cls is not None and (not chosen or chosen[-1][1] is not cls):
                chosen.append((position, cls))
    if len(chosen) < 2:
        return list(args)
    position, cls = chosen[-1]
    replaced, kept = ({s.key for s in part} for part in (settings[:position], settings[position:]))
    parameters = inspect.signature(cls).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if f"{key}.{name}" in replaced - kept and name != "target_n" and parameter.default is not parameter.empty
    }
    return [*args] + [
        f"--{key}.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in defaults.items()
    ]


def takes_class(key: str) -> bool:
    """True if the setting `key` is a class with its arguments."""
    return key in ("model", "data") or registry_of(key) is not None or bool(_modules_of(key))


def class_names(key: str) -> list[str]:
    """Names of the classes that the setting `key` could be."""
    registry = registry_of(key)
    if registry is not None:
        return [cls.__name__ for cls in registry.classes()]
    if key in SECTIONS:
        return [SECTIONS[key].__name__]
    modules = [importlib.import_module(module) for module in _modules_of(key)]
    classes = {name for module in modules for name, _ in inspect.getmembers(module, inspect.isclass)}
    return sorted(classes - {"Callback", "LRScheduler", "Logger", "Optimizer"})


def class_of(key: str, settings: Sequence[Setting]) -> type | None:
    """The class that `settings` give for `key`; None if there is none, or it cannot be imported."""
    paths = [s.value for s in settings if s.key == key and isinstance(s.value, str)]
    if not paths:
        return SECTIONS.get(key)
    registry = registry_of(key)
    module, _, name = paths[-1].rpartition(".")
    if not module and registry is not None:
        found: Any = next((cls for cls in registry.classes() if cls.__name__ == name), None)
    else:
        found = next((c for m in ([module] if module else _modules_of(key)) if (c := _attribute(m, name))), None)
    return found if inspect.isclass(found) else None


def _modules_of(key: str) -> list[str]:
    return _MODULES.get(key.rpartition(".")[2], [])


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
