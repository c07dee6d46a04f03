"""The folder of a playground: its manifest, reuse of what is there already, and a build that is complete or absent."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from tealightning.errors import UserError
from tealightning.reliability.files import whole_folder

MANIFEST = "playground.json"
PROMPT_SPLITS = ("train", "val", "test")


@dataclass(kw_only=True, slots=True)
class Playground:
    """Where everything is."""

    path: Path
    policy: Path  # for AutoModelForCausalLM and AutoTokenizer
    reward_model: Path | None  # for AutoModelForSequenceClassification; None: the reward is a Python function
    train_prompts: Path
    val_prompts: Path
    test_prompts: Path
    manifest: dict[str, Any]  # playground.json
    reused: bool = False  # True: it was there already


def build_folder(
    out: Path,
    wanted: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    *,
    num_threads: int,
    progress: bool,
    overwrite: bool,
) -> Playground:
    """Build the playground that is `wanted` at `out`, or reuse it.

    The global random streams and the thread count are left as they were; the folder appears complete or not at all.

    Args:
        out: Folder to create.
        wanted: What tells it from other playgrounds, as JSON gives it back (lists, no tuples); part of its manifest.
        fill: Fills the folder that it is given and returns the rest of the manifest.
        num_threads: Torch threads of `fill`.
        progress: Say what happens.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` is something else than what is wanted.
    """
    if not overwrite and _is_taken(out):
        manifest = _matching_manifest(out, wanted)
        if progress:
            print(f"Reusing the playground at {out} (same configuration and seed).")
        return _playground(out, manifest, reused=True)
    with whole_folder(out) as new:
        with _deterministic_torch(num_threads):
            manifest = wanted | fill(new)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if progress:
        print(f"Built a playground at {out} in {manifest['build_seconds']:.0f} s.")
    return _playground(out, manifest)


def load_playground(path: Path | str) -> Playground:
    """The playground at `path`.

    Raises:
        ValueError: if there is none, saying how to build it.
    """
    manifest = _read_manifest(Path(path))
    if manifest is None:
        raise UserError(
            f"{path} is no playground (it has no readable {MANIFEST}); `tealightning playground --out {path}` makes one"
        )
    return _playground(Path(path), manifest, reused=True)


def stream_seed(seed: int, name: str) -> int:
    """A seed for one step of the build, unrelated to those of the other steps and of other builds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def package_versions() -> dict[str, str]:
    """What a playground's bits depend on beside its configuration and seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }


def _is_taken(out: Path) -> bool:
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`, or None if there is no such file or it is not a manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "format_version" in manifest else None


def _matching_manifest(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the playground at `out`, if it is the one that is `wanted`."""
    remedy = "Choose another folder, or pass overwrite=True to replace it."
    manifest = _read_manifest(out)
    if manifest is None:
        raise UserError(f"{out} exists and is no playground. {remedy}")
    different = [key for key in wanted if manifest.get(key) != wanted[key]]
    if different:
        raise UserError(f"{out} holds a playground of another {' and '.join(different)}. {remedy}")
    return manifest


def _playground(path: Path, manifest: dict[str, Any], *, reused: bool = False) -> Playground:
    has_model = "reward_model_parameters" in manifest
    return Playground(
        path=path,
        policy=path / "policy",
        reward_model=path / "reward_model" if has_model else None,
        train_prompts=path / "prompts" / "train.jsonl",
        val_prompts=path / "prompts" / "val.jsonl",
        test_prompts=path / "prompts" / "test.jsonl",
        manifest=manifest,
        reused=reused,
    )


@contextmanager
def _deterministic_torch(num_threads: int) -> Iterator[None]:
    """A fixed thread count and torch's random stream restored at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
