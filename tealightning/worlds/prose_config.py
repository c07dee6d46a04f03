"""Sizes and training settings of the prose world, and its presets."""

from dataclasses import dataclass
from typing import Any

from tealightning.errors import UserError
from tealightning.worlds.folder import named_settings


@dataclass(kw_only=True, slots=True, frozen=True)
class ProseConfig:
    """Everything that decides a prose world, together with the seed. The defaults are the "default" preset.

    Args:
        source_files: Read the docstrings and comments of the standard library, not only the language reference.
        vocab_size: Tokens of the byte-level BPE vocabulary, special tokens included (at least 300).
        hidden_size: Width of the policy and of the reward model, a multiple of `head_size`.
        intermediate_size: Width of their feed-forward layers.
        head_size: Width of one attention head; vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
        policy_layers: Depth of the policy.
        reward_layers: Depth of the reward model, which starts as the policy's first layers.
        max_positions: Longest sequence of both models, in tokens.
        sequence_length: Length of the policy's training rows, in tokens.
        policy_steps: Optimizer steps of the policy.
        policy_batch_size: Rows per step.
        policy_lr: Peak AdamW learning rate of its embeddings, head and norms (linear warm-up, cosine decay).
        policy_muon_lr: Peak Muon learning rate of its layers' matrices.
        reward_pairs: Pairs of a real and a sampled continuation that the reward model is trained on.
        reward_steps: Optimizer steps of the reward model.
        reward_batch_size: Pairs per step.
        reward_lr: Peak AdamW learning rate of its embeddings, head and norms.
        reward_muon_lr: Peak Muon learning rate of its layers' matrices.
        reward_weight_decay: AdamW weight decay of the reward model.
        prompt_tokens: Shortest and longest prompt, in tokens.
        completion_tokens: Longest continuation that the reward model is trained on, in tokens.
        reward_paragraphs: Paragraphs behind those pairs. The policy has not seen them: on its own training text it is
            less surprised than by its samples, and a reward model would learn that instead.
        heldout_paragraphs: Paragraphs held out for the figures of the manifest.
        heldout_pairs: Pairs cut from them that the reward model is judged on.
        train_prompts: Prompts in `prompts/train.jsonl`.
        val_prompts: Prompts in `prompts/val.jsonl`.
        test_prompts: Prompts in `prompts/test.jsonl`.
        curve_prompts: Held-out prompts of the manifest's best-of-n curve.
        curve_samples: Samples per prompt of that curve.
        num_threads: Torch threads of the build; fixed, because sums depend on it in the last bit.
    """

    source_files: bool = True
    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    head_size: int = 32
    policy_layers: int = 3
    reward_layers: int = 2
    max_positions: int = 256
    sequence_length: int = 128
    policy_steps: int = 750
    policy_batch_size: int = 8
    policy_lr: float = 8e-3
    policy_muon_lr: float = 1.5e-2
    reward_pairs: int = 6400
    reward_steps: int = 200
    reward_batch_size: int = 32
    reward_lr: float = 3e-3
    reward_muon_lr: float = 5e-3
    reward_weight_decay: float = 0.1
    prompt_tokens: tuple[int, int] = (8, 24)
    completion_tokens: int = 32
    reward_paragraphs: int = 2300
    heldout_paragraphs: int = 300
    heldout_pairs: int = 600
    train_prompts: int = 800
    val_prompts: int = 96
    test_prompts: int = 96
    curve_prompts: int = 16
    curve_samples: int = 128
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise UserError(
                f"vocab_size must be at least 300 (256 bytes, special tokens, merges), got {self.vocab_size}."
            )
        if self.hidden_size % self.head_size:
            raise UserError(
                f"hidden_size must be a multiple of head_size ({self.head_size}), got {self.hidden_size}; "
                f"{self.hidden_size // self.head_size * self.head_size or self.head_size} would do."
            )
        if not 1 <= self.reward_layers <= self.policy_layers:
            raise UserError(
                f"reward_layers must be in 1..policy_layers ({self.policy_layers}), because the reward model starts as "
                f"the policy's first layers, got {self.reward_layers}."
            )
        shortest, longest = self.prompt_tokens
        if not 1 <= shortest <= longest:
            raise UserError(
                f"prompt_tokens must be (shortest, longest) with 1 <= shortest <= longest, got {shortest, longest}."
            )
        needed = max(longest + self.completion_tokens, self.sequence_length)
        if self.max_positions < needed:
            raise UserError(
                f"max_positions must be at least {needed} (longest prompt + completion_tokens, and sequence_length), "
                f"got {self.max_positions}."
            )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": dict(
        source_files=False,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=96,
        policy_layers=2,
        max_positions=128,
        sequence_length=64,
        policy_steps=80,
        policy_batch_size=16,
        policy_lr=1e-2,
        reward_pairs=1500,
        reward_steps=120,
        reward_batch_size=16,
        prompt_tokens=(8, 16),
        completion_tokens=16,
        reward_paragraphs=100,
        heldout_paragraphs=64,
        heldout_pairs=300,
        train_prompts=64,
        val_prompts=16,
        test_prompts=16,
        curve_prompts=4,
    ),
}
"""Presets, as differences from the defaults. "default" is for use; "tiny" builds in seconds, for tests."""


def resolve_config(size: str | ProseConfig) -> ProseConfig:
    """The configuration of a preset, or `size` itself if it is one.

    Raises:
        ValueError: for an unknown preset, with the valid ones.
    """
    return size if isinstance(size, ProseConfig) else ProseConfig(**named_settings("playground size", size, PRESETS))
