"""The folder of a world: prompt files, manifest, reuse of a complete one, and a build that is complete or absent."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor

from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.registry import did_you_mean
from tealightning.reliability.files import whole_folder

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
    reused: bool = False  # True: it was there already


WORLDS: dict[str, Callable[..., Playground]] = {}
"""Name of a world -> `build(out, *, seed, size, progress, overwrite)`. Each world's file adds its own."""


def build_folder(
    out: Path | str,
    identity: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    *,
    num_threads: int,
    progress: bool,
    overwrite: bool,
) -> Playground:
    """Build a world at `out`, or reuse the one that is there.

    The global random streams and the thread count are left as they were; the folder appears complete or not at all.

    Args:
        out: Folder to create. A world of the same identity there is returned as it is.
        identity: Format version, seed and configuration: what tells this world from others. Part of its manifest.
        fill: Writes the folder at a path, and returns the rest of the manifest.
        num_threads: Torch threads during `fill`.
        progress: Print what happens.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` holds something else.
    """
    out, identity = Path(out), json.loads(json.dumps(identity))  # as JSON reads it back: lists, no tuples
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        manifest = _matching_manifest(out, identity)
        if progress:
            print(f"Reusing the playground at {out} (same configuration and seed).")
        return _playground(out, manifest, reused=True)
    with whole_folder(out) as new:
        started = time.perf_counter()
        with _deterministic_torch(num_threads):
            manifest = identity | fill(new)
        manifest |= {"versions": package_versions(), "build_seconds": time.perf_counter() - started}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if progress:
        print(f"Built a playground at {out} in {manifest['build_seconds']:.0f} s.")
    return _playground(out, manifest)


def load_playground(path: Path | str) -> Playground:
    """Load the world at `path`.

    Raises:
        ValueError: if there is none, saying how to build it.
    """
    manifest = _read_manifest(Path(path))
    if manifest is None:
        raise UserError(
            f"{path} is no playground (it has no readable {MANIFEST}); `tealightning playground --out {path}` makes one"
        )
    return _playground(Path(path), manifest, reused=True)


def write_prompts(folder: Path, split: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write `prompts/{split}.jsonl`: each row with an identifier made of the split and a counter."""
    path = folder / "prompts" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": f"{split}-{i:04d}"} | row) for i, row in enumerate(rows))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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


def package_versions() -> dict[str, str]:
    """Versions that the bits of a world depend on, beside its configuration and seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`, or None if there is no such file or it is not a manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "format_version" in manifest else None


def _matching_manifest(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the world at `out`, if it is the one of that identity."""
    remedy = "Choose another folder, or pass overwrite=True to replace it."
    manifest = _read_manifest(out)
    if manifest is None:
        raise UserError(f"{out} exists and is no playground. {remedy}")
    different = [key for key in identity if manifest.get(key) != identity[key]]
    if different:
        raise UserError(f"{out} holds a playground of another {' and '.join(different)}. {remedy}")
    return manifest


def _playground(path: Path, manifest: dict[str, Any], *, reused: bool = False) -> Playground:
    train, val, test = (path / "prompts" / f"{split}.jsonl" for split in PROMPT_SPLITS)
    return Playground(
        path=path,
        policy=path / "policy",
        reward_model=path / "reward_model" if "reward_model_parameters" in manifest else None,
        train_prompts=train,
        val_prompts=val,
        test_prompts=test,
        manifest=manifest,
        reused=reused,
    )


@contextmanager
def _deterministic_torch(num_threads: int) -> Iterator[None]:
    """Fix torch's thread count; restore it and torch's random stream at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
