"""Builds a playground: policy, reward model and prompts, from the Python installation alone."""

import hashlib
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers

from tealightning.playground.config import PlaygroundConfig, resolve_config
from tealightning.playground.corpus import collect_paragraphs
from tealightning.playground.figures import measure
from tealightning.playground.policy import train_policy
from tealightning.playground.prompts import cut_many_openings, cut_openings, split_paragraphs, write_prompts
from tealightning.playground.reward_model import sample_pairs, train_reward_model
from tealightning.playground.tokenizer import train_tokenizer

MANIFEST = "playground.json"
PROMPT_SPLITS = ("train", "val", "test")
FORMAT_VERSION = 1
"""Raised with every change of the recipe, so that a playground of an older recipe is not taken for a current one."""


@dataclass(kw_only=True, slots=True)
class Playground:
    """Where everything is."""

    path: Path
    policy: Path  # for AutoModelForCausalLM and AutoTokenizer
    reward_model: Path  # for AutoModelForSequenceClassification and AutoTokenizer
    train_prompts: Path
    val_prompts: Path
    test_prompts: Path
    manifest: dict[str, Any]  # playground.json
    reused: bool = False  # True: it was there already


def build_playground(
    out: Path | str,
    *,
    seed: int = 0,
    size: Literal["default", "tiny"] | PlaygroundConfig = "default",
    progress: bool = True,
    overwrite: bool = False,
) -> Playground:
    """Build `out` (policy/, reward_model/, prompts/{train,val,test}.jsonl, playground.json), or reuse it.

    Nothing is downloaded. The same seed and configuration give the same bits on the same machine with the same package
    versions. The global random streams and the thread count are left as they were; the folder appears complete or not
    at all.

    Args:
        out: Folder to create. A playground of the same configuration and seed there is returned as it is.
        seed: Of splits, initial weights, batches and samples.
        size: A preset, or a configuration of your own.
        progress: Show progress bars and say what happens.
        overwrite: Replace what is at `out`, whatever it is.

    Raises:
        ValueError: if `out` is something else than the playground asked for, or `size` is unknown.
    """
    out, config = Path(out), resolve_config(size)
    wanted = _identity(config, seed)
    if not overwrite and _is_taken(out):
        manifest = _matching_manifest(out, wanted)
        if progress:
            print(f"Reusing the playground at {out} (same configuration and seed).")
        return _playground(out, manifest, reused=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with _deterministic_torch(config.num_threads):
            manifest = wanted | _build_into(workspace / "new", config, seed=seed, progress=progress)
        (workspace / "new" / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, workspace / "old")
        os.replace(workspace / "new", out)
    finally:
        shutil.rmtree(workspace)
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
        raise ValueError(
            f"{path} is no playground (it has no readable {MANIFEST}); build one with build_playground({str(path)!r})."
        )
    return _playground(Path(path), manifest, reused=True)


def _build_into(folder: Path, config: PlaygroundConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """The build itself: fills `folder`, returns what the manifest says of it."""
    started = time.perf_counter()
    splits = split_paragraphs(
        collect_paragraphs(source_files=config.source_files), config, seed=_stream(seed, "splits")
    )
    tokenizer = train_tokenizer(splits.corpus, vocab_size=config.vocab_size, max_positions=config.max_positions)
    openings = {
        name: cut_openings(getattr(splits, name), tokenizer, config, rng=random.Random(_stream(seed, name)))
        for name in PROMPT_SPLITS
    }
    for split in PROMPT_SPLITS:
        write_prompts(openings[split], folder / "prompts" / f"{split}.jsonl", split=split)

    policy = train_policy(splits.corpus, tokenizer, config, seed=_stream(seed, "policy"), progress=progress)
    rng = random.Random(_stream(seed, "reward openings"))
    pairs = sample_pairs(
        cut_many_openings(splits.reward, tokenizer, config, count=config.reward_pairs, rng=rng),
        policy,
        tokenizer,
        max_new_tokens=config.completion_tokens,
        seed=_stream(seed, "pairs"),
        progress=progress,
    )
    reward_model = train_reward_model(
        pairs, policy, tokenizer, config, seed=_stream(seed, "reward model"), progress=progress
    )
    figures = measure(
        policy,
        reward_model,
        tokenizer,
        splits.heldout,
        config,
        seed=_stream(seed, "figures"),
        progress=progress,
    )
    for model, name in ((policy, "policy"), (reward_model, "reward_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {
        "paragraphs": {f.name: len(getattr(splits, f.name)) for f in fields(splits)},
        "prompts": {split: len(openings[split]) for split in PROMPT_SPLITS},
        "policy_parameters": policy.num_parameters(),
        "reward_model_parameters": reward_model.num_parameters(),
        "figures": figures,
        "versions": _versions(),
        "build_seconds": time.perf_counter() - started,
    }


def _stream(seed: int, name: str) -> int:
    """A seed for one step of the build, unrelated to those of the other steps and of other builds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def _identity(config: PlaygroundConfig, seed: int) -> dict[str, Any]:
    """What tells one playground from another, as JSON gives it back (lists, no tuples)."""
    return {"format_version": FORMAT_VERSION, "seed": seed, "config": json.loads(json.dumps(asdict(config)))}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
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
        raise ValueError(f"{out} exists and is no playground. {remedy}")
    different = [key for key in wanted if manifest.get(key) != wanted[key]]
    if different:
        raise ValueError(f"{out} holds a playground of another {' and '.join(different)}. {remedy}")
    return manifest


def _playground(path: Path, manifest: dict[str, Any], *, reused: bool = False) -> Playground:
    return Playground(
        path=path,
        policy=path / "policy",
        reward_model=path / "reward_model",
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
