"""The folder of a world: prompt files, manifest, reuse of a complete one, and a build that is complete or absent."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.registry import did_you_mean
from tealightning.reliability.files import whole_folder
from tealightning.reporting.provenance import package_versions

MANIFEST = "playground.json"
PROMPT_SPLITS = ("train", "val", "test")
CURVE_NS = (1, 4, 16, 64, 128)
"""Budgets of the best-of-n curve in the manifest, as far as there are samples."""


@dataclass(kw_only=True, slots=True)
class Playground:
    """Paths of a built world, and its manifest."""

    path: Path
    policy: Path  # for AutoModelForCausalLM and AutoTokenizer
    reward_model: Path | None  # for AutoModelForSequenceClassification; None: the reward is a Python function
    train_prompts: Path
    val_prompts: Path
    test_prompts: Path
    manifest: dict[str, Any]  # playground.json
    reused: bool  # True: it was there already


WORLDS: dict[str, Callable[..., Playground]] = {}
"""Name of a world -> `build(out, *, seed, size, progress, overwrite)`. Each world's file adds its own."""


def build_folder(
    out: Path | str,
    recipe: dict[str, Any],
    config: Any,
    fill: Callable[..., dict[str, Any]],
    *,
    seed: int,
    progress: bool,
    overwrite: bool,
) -> Playground:
    """Build a world at `out`, complete or not at all, or reuse the one of the same recipe, config and seed there.

    Torch's random stream and thread count are left as they were.

    Args:
        recipe: What tells this kind of world from others, with its `format_version`. Part of the manifest.
        config: Dataclass of everything else that decides the world, `num_threads` of torch included.
        fill: `fill(folder, config, seed=seed, progress=progress)` writes the folder and returns the rest of the
            manifest.

    Raises:
        ValueError: if `out` holds something else.
    """
    out = Path(out)
    identity = json.loads(json.dumps(recipe | {"seed": seed, "config": asdict(config)}))  # no tuples, as it is read
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        remedy = "Choose another folder, or pass overwrite=True to replace it."
        manifest = _read_manifest(out)
        if manifest is None:
            raise UserError(f"{out} exists and is no playground. {remedy}")
        if different := [key for key in identity if manifest.get(key) != identity[key]]:
            raise UserError(f"{out} holds a playground of another {' and '.join(different)}. {remedy}")
        if progress:
            print(f"Reusing the playground at {out} (same configuration and seed).")
        return _playground(out, manifest, reused=True)
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        with whole_folder(out) as new, torch.random.fork_rng(devices=[]):
            manifest = identity | fill(new, config, seed=seed, progress=progress)
            # Beside configuration and seed, the bits of a world depend on these.
            versions = package_versions("torch", "transformers", "tokenizers", "numpy")
            manifest |= {"versions": versions, "build_seconds": time.perf_counter() - started}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    finally:
        torch.set_num_threads(threads)
    if progress:
        print(f"Built a playground at {out} in {manifest['build_seconds']:.0f} s.")
    return _playground(out, manifest, reused=False)


def load_playground(path: Path | str) -> Playground:
    """Load the world at `path`; where there is none, a ValueError says how to build it."""
    manifest = _read_manifest(Path(path))
    if manifest is None:
        raise UserError(
            f"{path} is no playground (it has no readable {MANIFEST}); `tealightning playground --out {path}` makes one"
        )
    return _playground(Path(path), manifest, reused=True)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "format_version" in manifest else None


def _playground(path: Path, manifest: dict[str, Any], *, reused: bool) -> Playground:
    return Playground(
        path=path,
        policy=path / "policy",
        reward_model=path / "reward_model" if "reward_model_parameters" in manifest else None,
        **{f"{split}_prompts": path / "prompts" / f"{split}.jsonl" for split in PROMPT_SPLITS},
        manifest=manifest,
        reused=reused,
    )


def write_prompts(folder: Path, split: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write `prompts/{split}.jsonl`, each row with an identifier made of the split and a counter; how many."""
    path = folder / "prompts" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{split}-{i:04d}"} | row) + "\n" for i, row in enumerate(rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def stream_seed(seed: int, name: str) -> int:
    """Derive the seed of one step of a build, unrelated to those of other steps and other builds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def best_of_n_curve(rewards: Tensor) -> dict[str, float]:
    """Mean best-of-n of [P, M] rewards for each n of `CURVE_NS` up to M, as JSON writes it."""
    ns = [n for n in CURVE_NS if n <= rewards.shape[1]]
    return {str(n): value for n, value in zip(ns, best_of_n(rewards, ns).mean(0).tolist(), strict=True)}


def named_settings(kind: str, name: str, valid: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings called `name`; an unknown one is a ValueError with the valid ones."""
    if name not in valid:
        raise UserError(f"Unknown {kind} {name!r}.{did_you_mean(str(name), valid)}")
    return valid[name]
