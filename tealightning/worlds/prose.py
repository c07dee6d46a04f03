"""Builds a playground: policy, reward model and prompts, from the Python installation alone."""

import json
import random
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from tealightning.worlds.folder import PROMPT_SPLITS, Playground, build_folder, package_versions, stream_seed
from tealightning.worlds.policy import train_policy
from tealightning.worlds.prose_config import ProseConfig, resolve_config
from tealightning.worlds.prose_corpus import collect_paragraphs
from tealightning.worlds.prose_figures import measure
from tealightning.worlds.prose_prompts import cut_many_openings, cut_openings, split_paragraphs, write_prompts
from tealightning.worlds.prose_reward_model import sample_pairs, train_reward_model
from tealightning.worlds.tokenizer import train_tokenizer

FORMAT_VERSION = 1
"""Raised with every change of the recipe, so that a playground of an older recipe is not taken for a current one."""


def build_prose(
    out: Path | str,
    *,
    seed: int = 0,
    size: Literal["default", "tiny"] | ProseConfig = "default",
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
    return build_folder(
        out,
        _identity(config, seed),
        lambda folder: _build_into(folder, config, seed=seed, progress=progress),
        num_threads=config.num_threads,
        progress=progress,
        overwrite=overwrite,
    )


def _build_into(folder: Path, config: ProseConfig, *, seed: int, progress: bool) -> dict[str, Any]:
    """The build itself: fills `folder`, returns what the manifest says of it."""
    started = time.perf_counter()
    splits = split_paragraphs(
        collect_paragraphs(source_files=config.source_files), config, seed=stream_seed(seed, "splits")
    )
    tokenizer = train_tokenizer(splits.corpus, vocab_size=config.vocab_size, max_positions=config.max_positions)
    openings = {
        name: cut_openings(getattr(splits, name), tokenizer, config, rng=random.Random(stream_seed(seed, name)))
        for name in PROMPT_SPLITS
    }
    for split in PROMPT_SPLITS:
        write_prompts(openings[split], folder / "prompts" / f"{split}.jsonl", split=split)

    policy = train_policy(splits.corpus, tokenizer, config, seed=stream_seed(seed, "policy"), progress=progress)
    rng = random.Random(stream_seed(seed, "reward openings"))
    pairs = sample_pairs(
        cut_many_openings(splits.reward, tokenizer, config, count=config.reward_pairs, rng=rng),
        policy,
        tokenizer,
        max_new_tokens=config.completion_tokens,
        seed=stream_seed(seed, "pairs"),
        progress=progress,
    )
    reward_model = train_reward_model(
        pairs, policy, tokenizer, config, seed=stream_seed(seed, "reward model"), progress=progress
    )
    figures = measure(
        policy,
        reward_model,
        tokenizer,
        splits.heldout,
        config,
        seed=stream_seed(seed, "figures"),
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
        "versions": package_versions(),
        "build_seconds": time.perf_counter() - started,
    }


def _identity(config: ProseConfig, seed: int) -> dict[str, Any]:
    """What tells one playground from another, as JSON gives it back (lists, no tuples)."""
    return {"format_version": FORMAT_VERSION, "seed": seed, "config": json.loads(json.dumps(asdict(config)))}
