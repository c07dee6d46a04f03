"""Dataclasses of all hand-offs, with shapes and dtypes.

Legend of shapes, used in every docstring of the package:

    P  prompts in a batch            m  rollouts per prompt in training (group_size)
    B  rollouts in a batch, P * m    N  best-of-N budget at deployment (target_n)
    M  rollouts per prompt in evaluation, max(ns)          Q  prompts of an evaluation
    Tp longest prompt in tokens      T  longest completion in tokens       V  vocabulary
"""

import hashlib
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tealightning.checks import check_integer, check_positive, check_share
from tealightning.errors import UserError

Split = Literal["train", "val", "test"]
Message = dict[str, Any]  # of a chat: {"role": ..., "content": ...} and whatever else a chat template reads
Prompt = str | list[Message]  # as the user wrote it: plain text or a chat


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How completions are sampled; the same distribution in every engine and in the trainer's log-probs.

    Args:
        max_new_tokens: Longest completion, in tokens.
        temperature: Softmax temperature, > 0 (greedy decoding has no policy gradient).
        top_p: Nucleus mass in (0, 1]; 1 keeps everything.
        top_k: Keep the k most likely tokens; 0 keeps everything.
        stop: Strings that end a completion. They stay in its tokens and are cut from its text.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_integer("sampling.max_new_tokens", self.max_new_tokens, 1)
        check_positive("sampling.temperature", self.temperature)
        check_share("sampling.top_p", self.top_p)
        check_integer("sampling.top_k", self.top_k, 0)
        if "" in self.stop:
            raise UserError(f"sampling.stop must hold texts that are not empty, got {self.stop}.")


@dataclass(kw_only=True, slots=True)
class Completion:
    """One sampled answer, exactly as the engine sampled it (never decoded and re-encoded)."""

    token_ids: list[int]  # includes the eos token where one was sampled
    log_probs: list[float]  # of each token under the sampling distribution (after temperature, top-p, top-k)
    text: str  # without special tokens and without a matched stop string
    truncated: bool  # True: hit max_new_tokens before eos or a stop string

    def __post_init__(self) -> None:
        # A tokenizer in Python may decode to half a character, which neither a file nor a server takes.
        if not self.text.isascii():
            self.text = self.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(kw_only=True, slots=True)
class RewardScores:
    """Scores of B completions."""

    total: Tensor  # [B] float64; NaN = could not be scored
    components: dict[str, Tensor]  # name -> [B] float64, unweighted
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # name of a component -> what happened -> how often

    def __post_init__(self) -> None:
        # NaN is the only form of "could not be scored": infinities become NaN.
        self.total = _finite_or_nan(self.total)
        self.components = {name: _finite_or_nan(values) for name, values in self.components.items()}


@dataclass(kw_only=True, slots=True)
class RolloutBatch:
    """Completions of one `PromptBatch` with their rewards; row `p * m + i` is rollout i of prompt p."""

    prompt_ids: Tensor  # [B, Tp] int64, left-padded
    prompt_lengths: Tensor  # [B] int64
    completion_ids: Tensor  # [B, T] int64, right-padded
    completion_lengths: Tensor  # [B] int64, eos included
    rollout_log_probs: Tensor  # [B, T] float32, the engine's; 0 on padding
    truncated: Tensor  # [B] bool
    rewards: Tensor  # [P, m] float64; NaN = could not be scored
    reward_components: dict[str, Tensor] = field(default_factory=dict)  # name -> [P, m] float64, unweighted
    reward_counts: dict[str, int] = field(default_factory=dict)  # `{component}_{what happened}` -> how often
    completions: list[str] = field(default_factory=list)  # B texts
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    weights_version: int = 0  # optimizer steps that the sampling weights had seen

    def __post_init__(self) -> None:
        self.rewards = _finite_or_nan(self.rewards)

    @property
    def group_size(self) -> int:
        return self.rewards.shape[1]

    @property
    def completion_mask(self) -> Tensor:
        """[B, T] bool, True = sampled token (trained). From lengths: pad may equal eos."""
        positions = torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)
        return positions < self.completion_lengths[:, None]

    @property
    def prompt_mask(self) -> Tensor:
        """[B, Tp] bool, True = prompt token."""
        width = self.prompt_ids.shape[1]
        return torch.arange(width, device=self.prompt_ids.device) >= width - self.prompt_lengths[:, None]

    @property
    def valid(self) -> Tensor:
        """[P, m] bool, True = scored."""
        return ~self.rewards.isnan()

    def to(self, device: Any, non_blocking: bool = False) -> "RolloutBatch":
        """A copy with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        moved: Any = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}
        moved["reward_components"] = {name: scores.to(device) for name, scores in self.reward_components.items()}
        return replace(self, **moved)


@dataclass(kw_only=True, slots=True)
class PromptBatch:
    """What the data module yields: prompts only. The rollout callback attaches `rollouts`."""

    ids: list[str]  # P stable identifiers, unique in their split
    prompts: list[Prompt]  # P, as the user wrote them (for rewards and tables)
    token_ids: list[list[int]]  # P, chat template and system prompt applied (for engines)
    metadata: list[dict[str, Any]]  # P, the other columns of the data set
    rollouts: RolloutBatch | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def attached_rollouts(self) -> RolloutBatch:
        """`rollouts`, or a RuntimeError if the rollout callback has attached none."""
        if self.rollouts is None:
            raise RuntimeError(
                "The batch has no rollouts. Add RolloutCallback to the trainer's callbacks (CLI: section `rollout`)."
            )
        return self.rollouts

    @property
    def keys(self) -> Tensor:
        """[P] int64, a stable number for each id: what tensors and ranks can exchange."""
        digests = [hashlib.blake2b(prompt_id.encode(), digest_size=8).digest() for prompt_id in self.ids]
        return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)

    def to(self, device: Any, non_blocking: bool = False) -> "PromptBatch":
        """Itself unless rollouts are attached: prompts are not tensors."""
        if self.rollouts is None:
            return self
        return replace(self, rollouts=self.rollouts.to(device, non_blocking=non_blocking))


def _finite_or_nan(values: Tensor) -> Tensor:
    if not (values.is_floating_point() or values.is_complex()):  # integers and truth values, which have no NaN
        values = values.double()
    return values.masked_fill(~values.isfinite(), math.nan)


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """What one training step works on, the same for all of its micro-batches and inner epochs. The sizes are the whole
    batch's (mean over ranks), so that no split of it changes the loss."""

    rollouts: RolloutBatch
    advantages: Tensor  # [B] float64
    rows: Tensor  # [R] int64, the rollouts that a loss term needs
    num_tokens: Tensor  # scalar, completion tokens of scored rollouts
    num_sequences: Tensor  # scalar, scored rollouts
    behaviour_log_probs: Tensor | None = None  # [B, T] of the policy at the start; None = the policy itself (ratio 1)
    ref_log_probs: Tensor | None = None  # [B, T] of the reference; None without a KL penalty


@dataclass(kw_only=True, slots=True)
class CompletionScores:
    """What a causal LM says about the completions of some rollouts."""

    log_probs: Tensor  # [rows, t] float32 of each sampled token; 0 on padding
    mask: Tensor  # [rows, t] bool, True = sampled token
    entropy: Tensor | None = None  # [rows, t] float32 nats, without gradient; 0 on padding


@dataclass(kw_only=True, slots=True)
class SkippedStep:
    """An optimizer step that was not taken because loss or gradient is not finite, as this rank saw it."""

    inner_epoch: int
    loss: float  # this rank's share of the policy loss
    kl: float  # this rank's sum over tokens; 0 without a KL penalty
    grad_norm: float  # over ranks
    advantages: Tensor  # [P, m] float64
    policy_log_probs: Tensor  # [B, T] float32; 0 where nothing is trained
    parameters: list[str]  # whose gradient, averaged over ranks, is not finite

    def __str__(self) -> str:
        where = f"; gradients not finite: {', '.join(self.parameters[:3])}" if self.parameters else ""
        more = f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else ""
        return f"loss {self.loss:g}, KL {self.kl:g}, gradient norm {self.grad_norm:g}{where}{more}"


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """The rewards of one validation or test: what best-of-n curves, reports and reward files are made of."""

    step: int  # optimizer steps before it
    keys: Tensor  # [Q] int64, prompt keys
    rewards: Tensor  # [Q, M] float64, the samples of each prompt; NaN = not scored
