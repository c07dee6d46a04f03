"""Models and prompts that the benchmarks run on, built once and kept in a cache folder."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.random_models import SHAPES, random_models, small_classifier, widened
from bench.texts import exact_texts

CACHE = Path(tempfile.gettempdir()) / "tealightning-bench"
SIZES = ("playground", *SHAPES)
"""`playground` is the prose world's own policy, the others are random models with its tokenizer."""


@dataclass(kw_only=True, slots=True)
class World:
    """Folders of a policy whose completions never end early and of a reward model, and the texts of prompts."""

    size: str
    policy: str
    reward_model: str
    prompts: list[str]
    parameters: int  # of the policy

    def longest_prompt(self) -> int:
        """In tokens of the policy's tokenizer."""
        return max(len(ids) for ids in AutoTokenizer.from_pretrained(self.policy)(self.prompts)["input_ids"])


def build_world(
    size: str,
    *,
    playground: Path,
    cache: Path = CACHE,
    model: Path | None = None,
    prompt_tokens: int | None = None,
) -> World:
    """The world of `size`, or of the folder `model`, from `cache` if it is there.

    Policy and tokenizer know no end of text, so every completion has `max_new_tokens` tokens and every step the same
    shapes. With `prompt_tokens` every prompt has exactly so many tokens of the policy's tokenizer.

    Raises:
        ValueError: if there is no prose world to take tokenizer and prompts from, or no model.
    """
    if not (playground / "policy").is_dir():
        raise ValueError(
            f"--playground {playground}: there is no prose world there; `tealightning playground --world prose --out "
            f"{playground}` builds one in a few minutes."
        )
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model {model}: there is no config.json there; name the folder of a model.")
    folder = cache / f"{size if model is None else model.name}-{_identity(model or playground / 'policy')}"
    policy, reward_model = folder / "policy", folder / "reward_model"
    if not (folder / "complete").exists():
        if model is None:
            _build(size, playground, policy, reward_model)
        else:
            _link_without_end(model, policy)
            _save(reward_model, small_classifier(AutoTokenizer.from_pretrained(model)), _reward_tokenizer(model))
        (folder / "complete").touch()
    lines = (playground / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    if prompt_tokens is not None:
        prompts = exact_texts(AutoTokenizer.from_pretrained(policy), prompts, prompt_tokens)
    return World(
        size=size if model is None else model.name,
        policy=str(policy),
        reward_model=str(reward_model),
        prompts=prompts,
        parameters=_parameters(policy),
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


def _identity(folder: Path) -> str:
    """Changes with the folder's path, and when it is written anew."""
    stamp = max(file.stat().st_mtime_ns for file in folder.iterdir())
    return hashlib.sha256(f"{folder.resolve()} {stamp}".encode()).hexdigest()[:12]


def _parameters(policy: Path) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy)).num_parameters()


def _save(folder: Path, *parts: Any) -> None:
    for part in parts:
        part.save_pretrained(folder)


def _build(size: str, playground: Path, policy: Path, reward_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    tokenizer.eos_token = None
    if size == "playground":
        from transformers import AutoModelForSequenceClassification as Classifier

        model = AutoModelForCausalLM.from_pretrained(playground / "policy")
        reward: Any = Classifier.from_pretrained(playground / "reward_model")
        reward_tokenizer = AutoTokenizer.from_pretrained(playground / "reward_model")
    else:
        tokenizer = widened(tokenizer, SHAPES[size].vocabulary or len(tokenizer))
        model, reward = random_models(SHAPES[size], tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        reward_tokenizer = tokenizer
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    _save(policy, model, tokenizer)
    _save(reward_model, reward, reward_tokenizer)


def _reward_tokenizer(model: Path) -> Any:
    """The policy's tokenizer, without its chat template: the reward model reads plain text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    return tokenizer


def _link_without_end(model: Path, policy: Path) -> None:
    """A folder of links to the files of `model`, but for those that name an end of text or a chat template."""
    policy.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = policy / file.name
        if file.is_file() and file.suffix != ".jinja" and not link.exists():
            if file.name in ("config.json", "generation_config.json"):
                settings = _without_end(json.loads(file.read_text(encoding="utf-8")))
                link.write_text(json.dumps(settings, indent=2), encoding="utf-8")
            else:
                link.symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.chat_template = None
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (policy / name).unlink(missing_ok=True)  # not through the links
    tokenizer.save_pretrained(policy)


def _without_end(settings: Any) -> Any:
    """The settings of a model, and of the models inside it, with no id that ends a text."""
    if not isinstance(settings, dict):
        return settings
    return {k: None if k == "eos_token_id" else _without_end(v) for k, v in settings.items()}
