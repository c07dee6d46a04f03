"""Models and prompts that the benchmarks run on, built once and kept in a cache folder."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

CACHE = Path(tempfile.gettempdir()) / "tealightning-bench"
SIZES = {  # hidden, intermediate, layers; `playground` is the prose world's own policy
    "playground": None,
    "10m": (320, 960, 7),
    "50m": (640, 1920, 10),
}


@dataclass(kw_only=True, slots=True)
class World:
    """Folders of a policy whose completions never end early and of a reward model, and the texts of prompts."""

    size: str
    policy: str
    reward_model: str
    prompts: list[str]
    parameters: int  # of the policy


def build_world(size: str, *, playground: Path, cache: Path = CACHE) -> World:
    """The world of `size`, from `cache` if it is there.

    Policy and tokenizer know no end of text, so every completion has `max_new_tokens` tokens and every step the same
    shapes.

    Raises:
        ValueError: if there is no prose world to take tokenizer and prompts from.
    """
    if not (playground / "policy").is_dir():
        raise ValueError(
            f"--playground {playground}: there is no prose world there; `tealightning playground --world prose --out "
            f"{playground}` builds one in a few minutes."
        )
    folder = cache / f"{size}-{_identity(playground)}"
    policy, reward_model = folder / "policy", folder / "reward_model"
    if not (folder / "complete").exists():
        _build(SIZES[size], playground, policy, reward_model)
        (folder / "complete").touch()
    lines = (playground / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return World(
        size=size,
        policy=str(policy),
        reward_model=str(reward_model),
        prompts=[json.loads(line)["prompt"] for line in lines],
        parameters=AutoModelForCausalLM.from_pretrained(policy).num_parameters(),
    )


def write_prompts(world: World, file: Path, sizes: Sequence[int]) -> str:
    """A file with the first `sizes[i]` prompts for step i, for every step, under ids of their own; its path."""
    rows = [
        {"id": f"{step}-{i}", "prompt": text}
        for step, size in enumerate(sizes)
        for i, text in enumerate(islice(cycle(world.prompts), size))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _identity(playground: Path) -> str:
    return f"{(playground / 'policy' / 'model.safetensors').stat().st_mtime_ns:x}"


def _build(shape: tuple[int, int, int] | None, playground: Path, policy: Path, reward_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    tokenizer.eos_token = None
    reward_tokenizer = AutoTokenizer.from_pretrained(playground / "reward_model")
    if shape is None:
        model = AutoModelForCausalLM.from_pretrained(playground / "policy")
        reward = LlamaForSequenceClassification.from_pretrained(playground / "reward_model")
    else:
        model, reward = _random_models(shape, len(tokenizer), tokenizer.pad_token_id)
        tokenizer.model_max_length = reward_tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    for saved, folder in (
        (model, policy),
        (tokenizer, policy),
        (reward, reward_model),
        (reward_tokenizer, reward_model),
    ):
        saved.save_pretrained(folder)


def _random_models(shape: tuple[int, int, int], vocabulary: int, pad_token_id: int) -> tuple[Any, Any]:
    """A policy and a reward model of the same architecture, seeded."""
    hidden, intermediate, layers = shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": False,
        "dtype": torch.float32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**config)), LlamaForSequenceClassification(
            LlamaConfig(**config, num_labels=1)
        )
