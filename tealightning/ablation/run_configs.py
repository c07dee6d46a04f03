"""Derive the configuration of each run of an ablation, and the hash that the run is known by."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tealightning.ablation.spec import AblationSpec
from tealightning.errors import UserError

_SMALL_FILE_BYTES = 64 * 2**20
_CHANGES_NO_RESULT = ("ckpt_path", "checkpoint", "health", "deadlines")
"""Sections that decide what is kept of a run and when it is given up, not what comes out of one that is finished."""


def run_config(spec: AblationSpec, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the ablation's evaluation and budget; loggers and seeds come later.

    Raises:
        ValueError: if rollouts_per_step does not divide, or the group is too small.
    """
    config = copy.deepcopy(config)
    evaluation = spec.evaluation
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    model["ns"] = list(evaluation.ns)
    model["extrapolate_ns"] = []
    data["val_batch_size"] = evaluation.batch_size
    if (per_step := spec.equal.get("rollouts_per_step")) is not None:
        group_size = config["rollout"]["group_size"]
        if per_step % group_size:
            raise UserError(f"equal.rollouts_per_step={per_step} is no multiple of rollout.group_size={group_size}.")
        data["batch_size"] = per_step // group_size
    what = spec.equal_what
    limits = {} if what == "optimizer_steps" else {what: spec.equal[what]}
    trainer |= {
        "max_steps": spec.equal[what] if what == "optimizer_steps" else -1,
        "max_epochs": -1,
        "max_time": None,
        "num_sanity_val_steps": 0,
        "val_check_interval": evaluation.every,
        "check_val_every_n_epoch": None,
        "limit_val_batches": _batches(evaluation.prompts, evaluation.batch_size),
        "limit_test_batches": _batches(evaluation.held_out_prompts, evaluation.batch_size),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "fast_dev_run": False,
    }
    if evaluation.every is None:
        trainer |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 10**9}
    kept = [c for c in trainer.get("callbacks") or [] if not c["class_path"].endswith((".BestOfNReport", ".Budget"))]
    trainer["callbacks"] = [
        *kept,
        {"class_path": "tealightning.Budget", "init_args": limits},
        {"class_path": "tealightning.EvaluationRecord", "init_args": _record_args(spec)},
    ]
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
    kept = ("policy", "reference", "dtype", "trust_remote_code", "ns", "micro_batch_tokens", "micro_batch_size")
    init_args = config["model"]["init_args"]
    config["model"]["init_args"] = {key: init_args[key] for key in kept if key in init_args} | {
        "estimator": {"class_path": "tealightning.estimators.MeanReward"}
    }
    config["model"]["init_args"]["reference"] = None
    config["data"]["init_args"] |= {"batch_size": config["data"]["init_args"]["val_batch_size"]}
    config["rollout"]["group_size"] = 16
    record = config["trainer"]["callbacks"][-1]
    config["trainer"] |= {"callbacks": [record], "max_steps": 0, "val_check_interval": None}
    return config


def with_folder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with the run's own folder as that of its first logger; loggers elsewhere (wandb) are kept behind it."""
    config = copy.deepcopy(config)
    there = config["trainer"].get("logger")
    others = [logger for logger in (there if isinstance(there, list) else [there]) if isinstance(logger, dict)]
    kept = [logger for logger in others if not logger["class_path"].endswith(("CSVLogger", "TensorBoardLogger"))]
    own = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    config["trainer"]["logger"] = [own, *kept]
    return config


def config_hash(config: Mapping[str, Any], fingerprints: dict[str, str]) -> str:
    """12 hex digits of the configuration and of the local files that it names.

    Args:
        config: As `run_config` gives it.
        fingerprints: Digests of files and folders seen before, by path; filled.
    """
    read = [config["model"], config["data"], config["rollout"], config["trainer"]["callbacks"]]  # no folder of a logger
    paths = sorted({text for text in _texts(read) if _is_local(text)})
    inputs = {path: fingerprints.setdefault(path, _fingerprint(Path(path))) for path in paths}
    settings = {key: value for key, value in config.items() if key not in _CHANGES_NO_RESULT}
    return hashlib.sha256(json.dumps([settings, inputs], sort_keys=True, default=str).encode()).hexdigest()[:12]


def _record_args(spec: AblationSpec) -> dict[str, Any]:
    evaluation = spec.evaluation
    return {
        "gold": evaluation.gold,
        "kl_samples": evaluation.kl_samples,
        "diversity_samples": evaluation.diversity_samples,
    }


def _batches(prompts: int | None, batch_size: int) -> int | float:
    """Lightning's limit: batches, or the whole split."""
    return 1.0 if prompts is None else prompts // batch_size


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _is_local(text: str) -> bool:
    """True for something with a slash or a suffix that exists: not for a word that happens to be a folder's name."""
    return bool(re.search(r"[/.]", text)) and len(text) < 4096 and "\0" not in text and Path(text).exists()


def _fingerprint(path: Path) -> str:
    """Digest of a file or of the files of a folder: of their contents, of very large ones of the size."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        content = file.read_bytes() if size <= _SMALL_FILE_BYTES else str(size).encode()
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''} ".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
