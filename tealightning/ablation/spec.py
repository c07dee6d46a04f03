"""Ablation spec: the YAML file behind `tealightning compare -c FILE`, parsed and checked."""

import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tealightning.checks import check_integer
from tealightning.errors import UserError
from tealightning.registry import did_you_mean
from tealightning.strict_yaml import load_yaml

EQUAL = ("optimizer_steps", "rollouts", "generated_tokens", "trained_tokens")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Check a setting against a plain type, a union, a list or a mapping; other classes are not looked into."""
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        for entry, inner in value.items():
            _check_type(f"{key}.{entry}", inner, typing.get_args(hint)[1])
    if not _is_of_type(value, hint):
        name = inspect.formatannotation(hint).replace("typing.", "")
        raise UserError(f"{key} must be {name}, got {value!r}.")


def _is_of_type(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is_of_type(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_is_of_type(one, inner[0]) for one in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_is_of_type(name, inner[0]) and _is_of_type(one, inner[1]) for name, one in pairs)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint not in (str, types.NoneType) or isinstance(value, hint)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(kw_only=True, slots=True)
class EvaluationSpec:
    """How every policy is evaluated; the same prompts and sampling seeds for all variants."""

    # Best-of-n budgets; `max(ns)` completions are sampled a prompt.
    ns: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 128])
    # The n that p-values are corrected at and plots over training show; None = the largest.
    headline_n: int | None = None
    # Validation prompts, a multiple of `batch_size`; None = all. They make the main tables.
    prompts: int | None = None
    # Test prompts, likewise, evaluated once after training; 0 = none.
    held_out_prompts: int | None = 0
    batch_size: int = 8  # prompts
    # Rollout steps between evaluations during training; None = only the final one.
    every: int | None = None
    # A second reward that is only measured: a registered name, or `class_path` and `init_args`.
    gold: Any = None
    # Samples a prompt for the KL to the starting policy; 0 = none, None = 16 (at most max(ns)).
    kl_samples: int | None = None
    # Samples a prompt whose diversity is measured; None = likewise.
    diversity_samples: int | None = None
    # Where variants are compared at equal KL, in nats a completion; None = chosen from the runs.
    equal_kls: list[float] | None = None

    def __post_init__(self) -> None:
        wrong = [n for n in self.ns if not _is_count(n, 1)]
        if wrong or len(set(self.ns)) != len(self.ns) or not self.ns:
            raise UserError(f"evaluation.ns must hold different integers of at least 1, got {self.ns}.")
        self.ns = sorted(self.ns)
        self.headline_n = self.ns[-1] if self.headline_n is None else self.headline_n
        if self.headline_n not in self.ns:
            raise UserError(f"evaluation.headline_n must be one of ns {self.ns}, got {self.headline_n}.")
        check_integer("evaluation.batch_size", self.batch_size, 1)
        for name, least in (("kl_samples", 0), ("diversity_samples", 2)):
            most = max(least, self.ns[-1])
            value = min(16, most) if getattr(self, name) is None else getattr(self, name)
            if not _is_count(value, least) or value > most:
                raise UserError(
                    f"evaluation.{name} must be an integer from {least} to max(evaluation.ns)={most}, got {value!r}."
                )
            setattr(self, name, value)
        for name in ("prompts", "held_out_prompts"):
            value = getattr(self, name)
            if value is not None and (not _is_count(value, 0) or value % self.batch_size):
                raise UserError(
                    f"evaluation.{name} must be null (all) or a multiple of evaluation.batch_size "
                    f"({self.batch_size}), got {value!r}."
                )
        if self.prompts == 0:
            raise UserError("evaluation.prompts must not be 0: there would be nothing to compare.")
        if self.equal_kls is not None and not all(kl > 0 for kl in self.equal_kls):
            raise UserError(f"evaluation.equal_kls must hold numbers above 0, got {self.equal_kls}.")
        if self.every is not None:
            check_integer("evaluation.every", self.every, 1)


@dataclass(kw_only=True, slots=True)
class AblationSpec:
    """An ablation: variants of a base run, each trained with several seeds."""

    name: str  # letters, digits, `_ . + -`
    base: list[str]  # config files of `tealightning fit`; later ones win
    # name -> settings by dotted key, as on the command line (`model.estimator: tea`), values of any kind. `{m}` in a
    # value stands for a grid's value.
    variants: dict[str, dict[str, Any]]
    reference: str  # the variant that differences are taken to
    seeds: list[int]  # of sampling and of the order of the prompts, the same for all variants
    # What every run gets: exactly one of optimizer_steps, rollouts, generated_tokens, trained_tokens; and optionally
    # rollouts_per_step, from which `data.batch_size` follows as rollouts_per_step / group_size.
    equal: dict[str, int]
    out: str | None = None  # folder of runs and results; None = `runs/ablations/<name>`
    title: str | None = None  # of the report; None = the name
    description: str | None = None  # a paragraph for the report
    settings: dict[str, Any] = field(default_factory=dict)  # of every variant
    # name -> values. A variant that names `{m}` in its settings is run with every value of `m`.
    grid: dict[str, list[Any]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # name -> how tables and plots call a variant
    # Options of `tealightning playground`, built first where missing, such as `{world: prose, out: runs/prose}`.
    playgrounds: list[dict[str, Any]] = field(default_factory=list)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    retries: int = 0  # how often a failed run is tried again before it is reported
    confidence: float = 0.95  # of the intervals
    bootstrap_samples: int = 4000  # resamples behind them

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), *(("a variant's name", name) for name in self.variants)):
            if not _NAME.fullmatch(name):
                raise UserError(f"{what} must be made of letters, digits and _ . + -, got {name!r}.")
        for what in ("base", "variants"):
            if not getattr(self, what):
                raise UserError(f"{what} must name at least one {'config file' if what == 'base' else 'variant'}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(_is_count(s, 0) for s in self.seeds):
            raise UserError(f"seeds must be different integers of at least 0, got {self.seeds}.")
        if not 0.5 < self.confidence < 1:
            raise UserError(f"confidence must be between 0.5 and 1, got {self.confidence!r}.")
        check_integer("retries", self.retries, 0)
        check_integer("bootstrap_samples", self.bootstrap_samples, 100)
        for name, values in self.grid.items():
            if not values:
                raise UserError(f"grid.{name} must be a list of values, got {values!r}.")
        used = placeholders([self.settings, *self.variants.values()])
        if unknown := sorted(used - self.grid.keys()):
            raise UserError(f"{{{unknown[0]}}} is used in settings, and grid has no {unknown[0]!r}.")
        if unused := sorted(self.grid.keys() - used):
            raise UserError(f"grid.{unused[0]} has no effect: no setting contains {{{unused[0]}}}.")
        chosen = [name for name in EQUAL if name in self.equal]
        if len(chosen) != 1 or self.equal.keys() - {*EQUAL, "rollouts_per_step"}:
            raise UserError(
                f"equal must hold exactly one of {', '.join(EQUAL)} (and, if wanted, rollouts_per_step), got "
                f"{self.equal}."
            )
        for name, value in self.equal.items():
            check_integer(f"equal.{name}", value, 1)

    @property
    def folder(self) -> Path:
        """Where runs and results go."""
        return Path(self.out) if self.out is not None else Path("runs") / "ablations" / self.name

    @property
    def equal_what(self) -> str:
        """The name of what is held equal."""
        return next(name for name in EQUAL if name in self.equal)


def load_spec(path: Path) -> AblationSpec:
    """The ablation in a YAML file; a UserError names the file, the setting, what was expected and what came."""
    if not path.is_file():
        raise UserError(f"there is no ablation at {path}; configs/ablations/ has examples.")
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from error
    try:
        return parse_spec(settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_spec(settings: Any) -> AblationSpec:
    """The ablation that a YAML document describes."""
    spec = _checked(settings, AblationSpec, "an ablation")
    if "evaluation" in spec:
        spec["evaluation"] = EvaluationSpec(**_checked(spec["evaluation"], EvaluationSpec, "evaluation", "evaluation."))
    return AblationSpec(**spec)


def _checked(settings: Any, cls: type, what: str, prefix: str = "") -> dict[str, Any]:
    """`settings` if it is a mapping with fields of the dataclass of the right types, all required ones among them."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{what} must be a mapping of settings, got {str(settings)[:60]!r}.")
    hints = typing.get_type_hints(cls)
    for name in settings:
        if name not in hints:
            raise UserError(f"unknown setting {name!r} of {what}.{did_you_mean(str(name), hints)}")
    needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if settings.get(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}.")
    for name, value in settings.items():
        _check_type(f"{prefix}{name}", value, hints[name])
    return dict(settings)


def placeholders(value: Any) -> set[str]:
    """The names in braces in any text inside `value`."""
    if isinstance(value, str):
        return set(re.findall(r"\{(\w+)\}", value))
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return {name for one in inner for name in placeholders(one)}


def filled(value: Any, point: Mapping[str, Any]) -> Any:
    """`value` with every `{name}` replaced; a text that is nothing but `{name}` becomes the value itself."""
    if isinstance(value, Mapping):
        return {key: filled(inner, point) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, point) for inner in value]
    if isinstance(value, str):
        for name, replacement in point.items():
            if value == f"{{{name}}}":
                return replacement
            value = value.replace(f"{{{name}}}", str(replacement))
    return value
