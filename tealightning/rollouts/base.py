"""The contract of a rollout engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tealightning.registry import Registry, snake_case
from tealightning.types import Completion, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENGINES = Registry("engine")

TokenIds = Sequence[Sequence[int]]
"""Of each of P prompts."""

_SIGNS_OF_FULL_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "memoryerror")


@dataclass(kw_only=True, slots=True)
class EngineContext:
    """What an engine is started with."""

    policy: "PreTrainedModel"  # the trainer's live policy
    policy_path: str  # folder or hub id that the policy was loaded from
    tokenizer: "PreTrainedTokenizerBase"
    device: torch.device  # where the trainer's policy lives
    max_model_len: int  # longest prompt + completion, in tokens
    seed: int  # of the run; samples depend on the seeds given to `generate` only


class RolloutEngine(ABC):
    """Generates completions with the trainer's current weights."""

    registry: ClassVar[Registry] = ENGINES
    shares_weights: ClassVar[bool] = False
    """True: it reads the trainer's own parameters, there is nothing to sync."""
    is_concurrent: ClassVar[bool] = False
    """True: `generate` may run in a thread while the trainer computes: it works elsewhere and touches nothing of this
    process (weights, random numbers, devices)."""

    @property
    def name(self) -> str:
        """Its key in metrics and tables."""
        return snake_case(type(self).__name__).removesuffix("_engine")

    def dtype_of(self, policy: "PreTrainedModel") -> torch.dtype | None:
        """In what it computes: how far its log-probs may be from the trainer's. None = not known. By default the
        policy's data type if it shares the weights, else that of its attribute `dtype` ("auto" = the policy's)."""
        dtype = getattr(self, "dtype", "auto" if self.shares_weights else None)
        named = {"auto": policy.dtype, "float": torch.float32, "half": torch.float16}
        return named.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype

    def check(self) -> None:  # noqa: B027 - optional hook
        """Refuse, with a ValueError or ImportError, what cannot work: called at the start of a run, before anything is
        loaded."""

    @abstractmethod
    def start(self, context: EngineContext) -> None:
        """Load. Called after the process group exists; safe to call again. Leaves the global RNG streams, the thread
        count and the process group as they were."""

    @abstractmethod
    def generate(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`num_samples` completions for each of P prompts; `seeds[p]` alone decides the samples of prompt p given the
        weights, where the engine can promise that (its docstring says). Leaves the global RNG streams as they were."""

    def generate_each(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """`generate`, prompt by prompt: `(p, completions of prompt p)` as soon as all of them are there. An engine that
        has no earlier ones gives them all at the end."""
        yield from enumerate(self.generate(prompt_token_ids, num_samples=num_samples, sampling=sampling, seeds=seeds))

    @abstractmethod
    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights, given as `(name, tensor)` with the names and layout of a saved checkpoint,
        tied parameters once."""

    def offload(self) -> None:  # noqa: B027 - optional hook
        """Hand back memory while the trainer trains; the next `sync_weights` or `generate` takes it again."""

    @abstractmethod
    def close(self) -> None:
        """Release memory and processes; safe to call twice."""


class EngineError(RuntimeError):
    """An engine broke down; the message says in which phase."""


@contextmanager
def engine_phase(name: str, phase: str, memory_hint: str, on_failure: Callable[[], None]) -> Iterator[None]:
    """Turn every exception but a ValueError, which is about the request, into an EngineError that names the phase,
    after calling `on_failure`: the engine cannot be used any more."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a library's own: an assertion, a CUDA error, a queue that is empty ...
        on_failure()
        words = f"{type(error).__name__}: {error}".rstrip(".")
        hint = f" {memory_hint}" if any(sign in words.lower() for sign in _SIGNS_OF_FULL_MEMORY) else ""
        raise EngineError(f"{name} broke down while {phase}: {words}.{hint}") from error
