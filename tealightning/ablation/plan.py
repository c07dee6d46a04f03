"""Expand a spec into runs: every (variant, seed) with the configuration that `tealightning fit` would take."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tealightning.ablation.spec import AblationSpec, filled, placeholders
from tealightning.errors import UserError

_CHANGES_NO_RESULT = ("ckpt_path", "checkpoint", "health", "deadlines")
"""Sections that decide what is saved of a run and when it is given up, not the result of one that finishes."""

_ADDED_LATER: dict[str, Any] = {
    "importance_mode": "token_truncate",
    "importance_min": 0.0,
    "chat_template_kwargs": None,
    "tools_column": "tools",
    "max_probe_diff": None,
    "share_prompts": True,
}
"""Settings that came later, with the value that changes nothing: a run with it is known by the same hash as before."""

Resolve = Callable[[Sequence[str]], dict[str, Any]]
"""Arguments of `tealightning fit` -> the configuration that they amount to; raises UserError where there is none."""


@dataclass(kw_only=True, slots=True)
class Variant:
    """One line of the tables: a variant at one point of the grid."""

    name: str  # as in tables: "tea" or "tea[m=16,n=64]"
    base: str  # as in the spec: "tea"
    settings: dict[str, Any]  # by dotted key
    reference: str | None  # name of the variant that it is compared with; None = it is a reference itself


@dataclass(kw_only=True, slots=True)
class Job:
    """One run: training a variant with a seed, or evaluating the policy that training starts from."""

    kind: Literal["fit", "start"]
    variant: str  # of a start: the first variant that needs it
    seed: int
    config: dict[str, Any]  # of `tealightning fit`, the run's folder left open
    hash: str  # of config and local inputs
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant if self.kind == 'fit' else 'starting policy'}, seed {self.seed}"


@dataclass(kw_only=True, slots=True)
class Plan:
    """All runs of an ablation."""

    spec: AblationSpec
    variants: list[Variant]
    jobs: dict[tuple[str, int], Job]  # (variant, seed) -> its training run
    starts: dict[tuple[str, int], Job]  # (variant, seed) -> the evaluation that its run is paired with

    @property
    def all_jobs(self) -> list[Job]:
        """Every run once: evaluations of starting policies first, then seed by seed, so that an unfinished ablation has
        whole comparisons."""
        starts = {job.folder: job for job in self.starts.values()}
        by_seed = sorted(self.jobs.values(), key=lambda job: self.spec.seeds.index(job.seed))
        return [*starts.values(), *by_seed]


def expand(spec: AblationSpec) -> list[Variant]:
    """The variants at every point of the grid that they use; a UserError if they cannot be compared."""
    if spec.reference not in spec.variants:
        raise UserError(f"reference must be one of the variants {', '.join(spec.variants)}, got {spec.reference!r}.")

    def named(base: str, point: Mapping[str, Any]) -> str:
        return f"{base}[{','.join(f'{axis}={value}' for axis, value in point.items())}]" if point else base

    merged = {name: {**spec.settings, **settings} for name, settings in spec.variants.items()}
    axes = {name: [a for a in spec.grid if a in placeholders(settings)] for name, settings in merged.items()}
    reference_axes = axes[spec.reference]
    variants = []
    for base, settings in merged.items():
        if missing := [axis for axis in reference_axes if axis not in axes[base]]:
            raise UserError(
                f"the reference {spec.reference} differs along {{{missing[0]}}} and {base} does not: there is nothing "
                "to compare it with."
            )
        for values in itertools.product(*(spec.grid[axis] for axis in axes[base])):
            point = dict(zip(axes[base], values, strict=True))
            name, reference = named(base, point), named(spec.reference, {axis: point[axis] for axis in reference_axes})
            other = None if name == reference else reference
            own = filled(settings, point)
            variants.append(Variant(name=name, base=base, settings=own, reference=other))
    return variants


def make_plan(spec: AblationSpec, resolve: Resolve, notify: Callable[[Variant], None] = lambda variant: None) -> Plan:
    """Resolve and check every variant, before anything runs, and `notify` before each; an error names the variant."""
    plan = Plan(spec=spec, variants=expand(spec), jobs={}, starts={})
    fingerprints: dict[str, str] = {}

    def job(kind: Literal["fit", "start"], variant: str, seed: int, config: dict[str, Any]) -> Job:
        digest = config_hash(config, fingerprints)
        name = re.sub(r"[^A-Za-z0-9.+-]+", "_", variant).strip("_") if kind == "fit" else "start"
        folder = spec.folder / "runs" / name / f"seed{seed}-{digest}"
        return Job(kind=kind, variant=variant, seed=seed, config=config, hash=digest, folder=folder)

    for variant in plan.variants:
        notify(variant)
        try:
            config = run_config(spec, resolve(arguments(spec, variant)))
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from error
        except Exception as error:
            error.add_note(f"(in variant {variant.name})")
            raise
        for seed in spec.seeds:
            seeded = with_seed(config, seed)
            plan.jobs[variant.name, seed] = job("fit", variant.name, seed, seeded)
            plan.starts[variant.name, seed] = job("start", variant.name, seed, start_config(seeded))
    return plan


def arguments(spec: AblationSpec, variant: Variant) -> list[str]:
    """Arguments of `tealightning fit` for the variant, without what the ablation imposes."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in variant.settings.items()}
    return [*(part for path in spec.base for part in ("-c", path)), *(f"--{key}={text}" for key, text in texts.items())]


def run_config(spec: AblationSpec, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the ablation's evaluation and budget; loggers and seeds come later."""
    config = copy.deepcopy(config)
    evaluation, what = spec.evaluation, spec.equal_what
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    model |= {"ns": list(evaluation.ns), "extrapolate_ns": []}
    data["val_batch_size"] = evaluation.batch_size
    if (per_step := spec.equal.get("rollouts_per_step")) is not None:
        group_size = config["rollout"]["group_size"]
        if per_step % group_size:
            raise UserError(f"equal.rollouts_per_step={per_step} is no multiple of rollout.group_size={group_size}.")
        data["batch_size"] = per_step // group_size

    def batches(prompts: int | None) -> int | float:
        """Lightning's limit: batches, or the whole split."""
        return 1.0 if prompts is None else prompts // evaluation.batch_size

    limits = {} if what == "optimizer_steps" else {what: spec.equal[what]}
    recorded = {name: getattr(evaluation, name) for name in ("gold", "kl_samples", "diversity_samples")}
    kept = [
        own for own in trainer.get("callbacks") or [] if not own["class_path"].endswith((".BestOfNReport", ".Budget"))
    ]
    config["trainer"] = trainer | {
        "max_steps": spec.equal[what] if what == "optimizer_steps" else -1,
        "max_epochs": -1,
        "max_time": None,
        "num_sanity_val_steps": 0,
        "val_check_interval": 1.0 if evaluation.every is None else evaluation.every,
        "check_val_every_n_epoch": 10**9 if evaluation.every is None else None,
        "limit_val_batches": batches(evaluation.prompts),
        "limit_test_batches": batches(evaluation.held_out_prompts),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "fast_dev_run": False,
        "callbacks": [
            *kept,
            {"class_path": "tealightning.Budget", "init_args": limits},
            {"class_path": "tealightning.EvaluationRecord", "init_args": recorded},
        ],
    }
    return config


def with_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """`config` for one seed: of the samples and of the order of the prompts. The same for all variants, which are
    thereby paired; evaluation seeds depend on it and on the prompt alone."""
    config = copy.deepcopy(config)
    config["seed_everything"] = seed
    config["data"]["init_args"]["seed"] = seed
    return config


def start_config(config: dict[str, Any]) -> dict[str, Any]:
    """The evaluation of the policy that training with `config` starts from: nothing in it depends on training."""
    config = copy.deepcopy(config)
    needed = ("policy", "reference", "dtype", "trust_remote_code", "ns", "micro_batch_tokens", "micro_batch_size")
    init_args = config["model"]["init_args"]
    config["model"]["init_args"] = {key: init_args[key] for key in needed if key in init_args} | {
        "estimator": {"class_path": "tealightning.estimators.MeanReward"},
        "reference": None,
    }
    config["data"]["init_args"] |= {"batch_size": config["data"]["init_args"]["val_batch_size"]}
    config["rollout"]["group_size"] = 16
    record = config["trainer"]["callbacks"][-1]
    config["trainer"] |= {"callbacks": [record], "max_steps": 0, "val_check_interval": None}
    return config


def with_folder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with the run's own folder as that of its first logger; loggers elsewhere (wandb) come behind it."""
    there = config["trainer"].get("logger")
    others = [logger for logger in (there if isinstance(there, list) else [there]) if isinstance(logger, dict)]
    remote = [logger for logger in others if not logger["class_path"].endswith(("CSVLogger", "TensorBoardLogger"))]
    own = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    return config | {"trainer": config["trainer"] | {"logger": [own, *remote]}}


def config_hash(config: Mapping[str, Any], fingerprints: dict[str, str]) -> str:
    """12 hex digits of the configuration and of the local files that it names, whose digests are kept in
    `fingerprints`, by path."""
    read = [config["model"], config["data"], config["rollout"], config["trainer"]["callbacks"]]  # no folder of a logger
    paths = sorted({text for text in _texts(read) if _is_local(text)})
    for path in paths:
        fingerprints[path] = fingerprints.get(path) or _fingerprint(Path(path))
    inputs = {path: fingerprints[path] for path in paths}
    settings = _without_additions({key: value for key, value in config.items() if key not in _CHANGES_NO_RESULT})
    return hashlib.sha256(json.dumps([settings, inputs], sort_keys=True, default=str).encode()).hexdigest()[:12]


def _without_additions(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if key not in _ADDED_LATER or inner != _ADDED_LATER[key]}
        return {key: _without_additions(inner) for key, inner in kept.items()}
    return [_without_additions(inner) for inner in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _is_local(text: str) -> bool:
    """True for something with a slash or a suffix that exists: not for a word that happens to be a folder's name."""
    return bool(re.search(r"[/.]", text)) and len(text) < 4096 and "\0" not in text and Path(text).exists()


def _fingerprint(path: Path) -> str:
    """Digest of the contents of a file, or of the names and contents of the files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''} ".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
