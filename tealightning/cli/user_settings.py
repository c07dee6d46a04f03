"""Settings as the user wrote them: which file or option sets a key, registered names in place of class paths."""

import contextlib
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from tealightning import callbacks
from tealightning.data import PromptDataModule
from tealightning.errors import UserError
from tealightning.estimators.base import ESTIMATORS
from tealightning.registry import Registry, snake_case
from tealightning.rewards.base import REWARDS
from tealightning.rollouts.base import ENGINES
from tealightning.training.micro_batches import PolicyGradientLoss
from tealightning.training.module import PostTrainingModule
from tealightning.training.schedules import SCHEDULES, WarmupSchedule
from tealightning.types import SamplingConfig

SECTIONS: dict[str, type] = {
    "trainer": Trainer,
    "model": PostTrainingModule,
    "model.loss": PolicyGradientLoss,
    "data": PromptDataModule,
    "rollout": callbacks.RolloutCallback,
    "rollout.sampling": SamplingConfig,
    "checkpoint": callbacks.ResumableCheckpoint,
    "health": callbacks.HealthChecks,
    "deadlines": callbacks.Deadlines,
}
TOP_LEVEL = (*(key for key in SECTIONS if "." not in key), "seed_everything", "ckpt_path")

_MODULES = {
    "optimizer": ["torch.optim", "tealightning.training.optimizers"],
    "lr_scheduler": ["tealightning.training.schedules", "torch.optim.lr_scheduler"],
    "logger": ["lightning.pytorch.loggers"],
    "callbacks": ["tealightning.callbacks", "lightning.pytorch.callbacks"],
}
"""Last part of a setting that takes a class -> where the classes for it are."""

_REGISTRIES = (
    (r"model\.estimator", ESTIMATORS),
    (r"rollout\.engine", ENGINES),
    (r"rollout\.reward(\.rewards\.[^.]+)*", REWARDS),
)
"""Pattern of a setting -> the registry whose names it takes."""

_WARMUP = f"{WarmupSchedule.__module__}.{WarmupSchedule.__qualname__}"


@dataclass(kw_only=True, slots=True)
class Setting:
    """One setting of a file or an option."""

    key: str  # dotted, without `init_args` and `class_path`: "model.estimator.target_n"
    value: Any  # of a class, its path
    file: str  # that sets it; empty for an option


def settings_of(args: Sequence[str]) -> list[Setting]:
    """Every setting of the configs and options in `args`, in their order; what cannot be read is left out."""
    settings: list[Setting] = []
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        if option in ("-c", "--config"):
            path = value if equals else next(remaining, "")
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
                settings += flat_settings("", yaml.safe_load(Path(path).read_text(encoding="utf-8")), path)
        elif option.startswith("--"):
            value = value if equals else next(remaining, "")
            settings.append(Setting(key=_dotted_key(option), value=value, file=""))
    return settings


def _dotted_key(option: str) -> str:
    key = option.removeprefix("--").removesuffix("+").replace(".init_args.", ".")
    return key.removesuffix(".class_path").removesuffix(".help")


def inner_key(key: str, name: str) -> str:
    """The key of the entry `name` in the mapping at `key`."""
    return key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip(".")


def flat_settings(key: str, node: Any, file: str) -> Iterator[Setting]:
    """The settings in `node`, a value or a nested document at `key`, each under its whole key."""
    for item in node if isinstance(node, list) else ():
        yield from flat_settings(key, item, file)
    entries = node if isinstance(node, dict) else {}
    yield Setting(key=key, value=entries.get("class_path", node), file=file)
    for name, value in entries.items():
        if name != "class_path":
            yield from flat_settings(inner_key(key, name), value, file)


def with_estimator_defaults(args: Sequence[str]) -> list[str]:
    """`args`, and the options that reset what was set for an estimator that another one replaced.

    jsonargparse keeps the arguments that both classes have; `alpha` or `scale` mean something else in each, and a
    comparison would be of settings that nobody wrote. `target_n` stays: it says how many samples are deployed.
    """
    key = "model.estimator"
    classes: list[type] = []
    earlier, own = set[str](), set[str]()  # keys set before the last class was chosen, and after
    for setting in settings_of(args):
        cls = class_of(key, [setting])
        if cls is not None and cls not in classes[-1:]:
            classes.append(cls)
            earlier, own = earlier | own, set()
        own.add(setting.key)
    if len(classes) < 2:
        return list(args)
    reset = earlier - own - {f"{key}.target_n"}
    parameters = [p for p in inspect.signature(classes[-1]).parameters.values() if f"{key}.{p.name}" in reset]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in defaults.items()}
    return [*args, *(f"--{key}.{name}={text}" for name, text in texts.items())]


def takes_class(key: str) -> bool:
    """True if the setting `key` is a class with its arguments."""
    return key in ("model", "data") or registry_of(key) is not None or bool(_modules_of(key))


def class_names(key: str) -> list[str]:
    """Names of the classes that the setting `key` could be."""
    if (registry := registry_of(key)) is not None:
        return [cls.__name__ for cls in registry.classes()]
    if key in SECTIONS:
        return [SECTIONS[key].__name__]
    modules = [importlib.import_module(module) for module in _modules_of(key)]
    classes = {name for module in modules for name in _public(module) if inspect.isclass(getattr(module, name, None))}
    classes |= set(SCHEDULES) if key == "model.lr_scheduler" else set()
    return sorted(classes - {"Callback", "LRScheduler", "Logger", "Optimizer"})


def _public(module: Any) -> Sequence[str]:
    return getattr(module, "__all__", dir(module))


def _optimizer_class_path(key: str, name: str) -> str:
    """`SGD` as `torch.optim.SGD`: by the name alone the parser finds several classes, once another package has one of
    that name. ReduceLROnPlateau is Lightning's, which takes the `monitor` that torch's lacks."""
    if name == "torch.optim.lr_scheduler.ReduceLROnPlateau":
        name = name.rpartition(".")[2]
    modules = _modules_of(key) if key in ("model.optimizer", "model.lr_scheduler") else []
    found = [module for module in modules if name in _public(importlib.import_module(module))]
    return f"{found[0]}.{name}" if found else name


def _with_schedule_name(settings: Any) -> Any:
    """A schedule of transformers by its name, `cosine`, as the class that has them all, with that name."""
    name = settings.get("class_path") if isinstance(settings, dict) else settings
    if name not in SCHEDULES:
        return settings
    given = settings.get("init_args") or {} if isinstance(settings, dict) else {}
    return {"class_path": _WARMUP, "init_args": {"name": name, **given}}


def class_of(key: str, settings: Sequence[Setting]) -> type | None:
    """The class that `settings` give for `key`; None if there is none, or it cannot be imported."""
    paths = [s.value for s in settings if s.key == key and isinstance(s.value, str)]
    if not paths:
        return SECTIONS.get(key)
    registry = registry_of(key)
    module, _, name = paths[-1].rpartition(".")
    if not module and registry is not None:
        return next((cls for cls in registry.classes() if name in (cls.__name__, snake_case(cls.__name__))), None)
    candidates = (imported_class(f"{m}.{name}") for m in ([module] if module else _modules_of(key)))
    return next(filter(None, candidates), None)


def imported_class(path: str) -> type | None:
    """The class at a dotted path; None if there is none."""
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if inspect.isclass(found) else None


def _modules_of(key: str) -> list[str]:
    return _MODULES.get(key.rpartition(".")[2], [])


def registry_of(key: str) -> Registry | None:
    """The registry whose names the setting `key` takes: dotted, without `init_args`."""
    return next((registry for pattern, registry in _REGISTRIES if re.fullmatch(pattern, key)), None)


def _class_path(registry: Registry, name: str, key: str) -> str:
    """`tea` and `TEA` as `tealightning.estimators.tea.TEA`; a dotted path, a file or JSON as it is."""
    if not name.isidentifier():
        return name
    try:
        cls = registry.get(name)
    except UserError as error:
        raise UserError(f"{key}: {error}", key=key) from None
    return f"{cls.__module__}.{cls.__qualname__}"


def canonical_args(args: Sequence[str]) -> list[str]:
    """`args` with registered names, and names of optimizers and schedules, as class paths: of `--model.estimator=tea`,
    `--model.estimator tea` and `--model.estimator.help tea`. Everything else passes through."""
    words: list[str] = []
    remaining = list(reversed(args))
    while remaining:
        option, equals, value = (word := remaining.pop()).partition("=")
        key, registry = _dotted_key(option), registry_of(_dotted_key(option))
        is_class = word.startswith("--") and (registry is not None or key in ("model.optimizer", "model.lr_scheduler"))
        if is_class and not equals and remaining and not remaining[-1].startswith("-"):
            words.append(word)
            option, value = "", remaining.pop()
        elif not is_class or not equals:
            words.append(word)
            continue
        path = _class_path(registry, value, key) if registry is not None else _optimizer_class_path(key, value)
        path = _WARMUP if (is_schedule := key == "model.lr_scheduler" and value in SCHEDULES) else path
        words.append(f"{option}={path}" if option else path)
        words += [f"--{key}.name={value}"] if is_schedule else []
    return words


def canonical_settings(settings: Any, key: str = "") -> Any:
    """A parsed YAML document with registered names as class paths; null in place of one is refused."""
    registry = registry_of(key)
    if key == "model.lr_scheduler":
        settings = _with_schedule_name(settings)
    if isinstance(settings, str):
        settings = _optimizer_class_path(key, settings)
    if registry is not None and settings is None:
        raise UserError(f"{key} must be set, got null. Valid: {', '.join(registry.names())}.")
    if registry is not None and isinstance(settings, str):
        return _class_path(registry, settings, key)
    if not isinstance(settings, dict):
        return settings
    return {name: canonical_settings(value, inner_key(key, name)) for name, value in settings.items()}
