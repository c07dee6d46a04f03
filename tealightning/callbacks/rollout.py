"""Drive generation and scoring: attach `batch.rollouts` before every training, validation and test step."""

import os
import time
import warnings
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from tealightning.callbacks.lightning_callbacks import check_callbacks
from tealightning.callbacks.rollout_checks import UnscorableGuard, check_prompts, padding_id
from tealightning.errors import UserError
from tealightning.pretrained import positions_of
from tealightning.reliability.progress import Activity, during
from tealightning.rewards.base import Reward, errors_only
from tealightning.rollouts import EngineContext, RolloutCollector, RolloutEngine, prompt_seed
from tealightning.rollouts.collector import rollout_metrics
from tealightning.rollouts.prefetch import Collected, OneStepAhead
from tealightning.rollouts.weight_sync import WeightSync
from tealightning.types import PromptBatch, RolloutBatch, SamplingConfig, Split

MOST_TOKENS = 8192  # of prompt and completion, where nothing else says how long they get


class RolloutCallback(Callback):
    """Samples completions from the policy as it is now and scores them.

    Training samples `group_size` completions a prompt, validation and test `max(ns)` of the module. Before each batch
    the engine takes over the trainer's weights if they changed since, and a probe shows that it has them. Seeds depend
    on the run's seed, the prompt's id and, in training only, the rollout step: differences between two evaluations of a
    run are paired.

    Args:
        engine: Generates completions.
        reward: Scores them.
        group_size: m, rollouts a prompt in training.
        sampling: How completions are sampled, in training and evaluation.
        steps_ahead: 0 = on-policy. 1 = while a step trains, the rollouts of the next one are collected, from weights
            that are one step old when they are trained on: for an engine that works elsewhere (VLLMServerEngine), and
            with `loss.importance_cap`, which corrects for it.
        score_as_finished: Score a prompt's completions while those of others are still being generated, prompt by
            prompt: for a slow reward (over HTTP, on another device) and an engine that has some earlier than others
            (VLLMServerEngine).
        max_unscorable: Largest share of the completions of a training step, or of an evaluation so far, that may be
            unscorable (NaN); above it the run stops with an error, to be resumed. 1 = never.
        seed: Of the samples; None = the run's `seed_everything`.
        max_model_len: Longest prompt + completion in tokens that the engine prepares for; None = from the data module's
            `max_prompt_tokens`, else what the model can hold, at most 8,192.
        max_probe_diff: Largest mean difference of engine's and trainer's log-probs, in nats, on the few tokens that are
            sampled when the engine starts and after each push of weights; above it the run is refused. None = what
            rounding explains in their data types: 0.001 in float32, 0.2 in bfloat16. Infinity = no probe.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        reward: Reward,
        *,
        group_size: int = 16,
        sampling: SamplingConfig | None = None,
        steps_ahead: Literal[0, 1] = 0,
        score_as_finished: bool = False,
        max_unscorable: float = 0.5,
        seed: int | None = None,
        max_model_len: int | None = None,
        max_probe_diff: float | None = None,
    ) -> None:
        if group_size < 1:
            raise UserError(f"rollout.group_size must be at least 1, got {group_size}.")
        if max_model_len is not None and max_model_len < 2:  # a prompt and a token
            raise UserError(f"rollout.max_model_len must be at least 2 or null, got {max_model_len}.")
        if max_probe_diff is not None and not max_probe_diff > 0:
            raise UserError(f"rollout.max_probe_diff must be above 0 or null, got {max_probe_diff}.")
        if steps_ahead not in (0, 1):
            raise UserError(f"rollout.steps_ahead must be 0 or 1, got {steps_ahead}.")
        if steps_ahead and not engine.is_concurrent:
            raise UserError(
                f"rollout.steps_ahead=1 needs an engine that works elsewhere while the trainer computes "
                f"(VLLMServerEngine), got {type(engine).__name__}."
            )
        self.engine = engine
        self.reward = reward
        self.group_size = group_size
        self.sampling = sampling or SamplingConfig()
        self.steps_ahead = steps_ahead
        self.score_as_finished = score_as_finished
        self._unscorable = UnscorableGuard(max_unscorable)
        self.seed = seed
        self.max_model_len = max_model_len
        self.max_probe_diff = max_probe_diff
        self.rollout_step = 0
        self._collector: RolloutCollector | None = None
        self._ahead = OneStepAhead()
        self._weights: WeightSync | None = None  # of the policy that the engine was started with
        self._synced_step: int | None = None  # optimizer steps that the engine's weights have seen
        self._run_seed = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before any model is loaded."""
        self._ahead = OneStepAhead()  # what an earlier run may have left in flight is not this one's
        self._synced_step = None
        if self._weights is not None:
            self._weights.forget()
        self._run_seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        if trainer.world_size == 1:  # vLLM makes a process group of size 1, which Lightning takes for several ranks
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        self.check(stage, pl_module)
        if stage == "fit":
            check_callbacks(trainer.callbacks, trainer.strategy)  # type: ignore[attr-defined]
        if sets := getattr(getattr(trainer, "datamodule", None), "prompt_sets", None):
            config = pl_module.policy_config
            check_prompts(sets, config, pl_module.tokenizer, self.sampling, self._model_len(trainer, config))

    def check(self, stage: str, pl_module: Any) -> None:
        """Refuse a group that is too small for the module's estimator, and older rollouts that nothing corrects for."""
        if stage == "fit":
            pl_module.estimator.check_group_size(self.group_size)
        if stage == "fit" and self.steps_ahead and pl_module.loss.importance_cap is None:
            raise UserError(
                "rollout.steps_ahead=1 trains on rollouts of older weights: set model.loss.importance_cap (2.0 is "
                "usual), which corrects for them."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unscorable.begin_evaluation()
        self._start(trainer, pl_module)

    on_test_start = on_validation_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Release engine and reward. Not called between stages: an engine serves fit, validate and test in turn. A
        collection under way is not waited for, its thread ends with the process at the latest."""
        self._collector = self._weights = None
        try:
            self.engine.close()
        finally:
            self.reward.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts its engine anew."""
        return self.__dict__ | {"_collector": None, "_weights": None, "_ahead": OneStepAhead()}

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_step": self.rollout_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollout_step = state_dict["rollout_step"]

    def rank_state_dict(self, **options: bool) -> dict[str, Any]:
        """What this rank has sampled and not trained on (see `OneStepAhead.state`): ResumableCheckpoint keeps it."""
        ahead = self._ahead.state(**options)
        return {} if ahead is None else {"ahead": ahead}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "ahead" in state_dict:
            self._ahead.load_state(state_dict["ahead"])

    def _start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._weights is not None and self._weights.policy is pl_module.policy:
            return
        config = pl_module.policy.config
        context = EngineContext(
            policy=pl_module.policy,
            policy_path=pl_module.served_path(),
            tokenizer=pl_module.tokenizer,
            device=pl_module.device,
            max_model_len=self._model_len(trainer, config),
            seed=self._run_seed,
        )
        with during(Activity.STARTING), errors_only(f"reward {self.reward.name!r}, being set up,"):
            self.reward.setup(pl_module.device)
        self._collector = RolloutCollector(
            engine=self.engine,
            reward=self.reward,
            sampling=self.sampling,
            pad_token_id=padding_id(pl_module.tokenizer, config),
            vocab_size=getattr(config, "vocab_size", None),
            score_as_finished=self.score_as_finished,
        )
        weights = WeightSync(
            self.engine,
            pl_module.policy,
            context,
            over_ranks=lambda value: float(pl_module.over_ranks({"value": value}, "max")["value"]),
            tolerance=self.max_probe_diff,
        )
        weights.start()
        self._weights = weights

    def _model_len(self, trainer: pl.Trainer, config: Any) -> int:
        """Tokens of a prompt and its completion: what prompts need and the model holds, if nothing else is set."""
        longest_prompt = getattr(getattr(trainer, "datamodule", None), "max_prompt_tokens", None)
        needed = MOST_TOKENS if longest_prompt is None else longest_prompt + self.sampling.max_new_tokens
        return self.max_model_len or min(positions_of(config) or MOST_TOKENS, needed)

    # ---------------------------------------------------------------- batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        started = time.perf_counter()
        with during(Activity.GENERATING):  # what is left of it
            collected = self._ahead.take(batch.ids)
        waited = time.perf_counter() - started
        synced = self._sync(trainer, pl_module)
        rollouts, seconds = collected or self._collect(trainer, batch, "train", self.group_size, self.rollout_step)
        metrics = rollout_metrics(rollouts) | {f"{name}_seconds": value for name, value in seconds.items()}
        metrics |= {"sync_seconds": synced, "step": self.rollout_step}
        if self.steps_ahead:
            metrics |= {"wait_seconds": waited, "staleness": trainer.global_step - rollouts.weights_version}
        for name, value in self._attach(pl_module, batch, rollouts, "train", metrics).items():
            pl_module.log(f"rollout/{name}", value, batch_size=len(batch))
        pl_module.log("reward", metrics["reward_mean"], prog_bar=True, logger=False, batch_size=len(batch))
        self.rollout_step += 1
        if self.steps_ahead:
            self._start_next(trainer, pl_module)
        else:
            self.engine.offload()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, *args: Any) -> None:
        split: Split = "test" if trainer.testing else "val"
        self._sync(trainer, pl_module)
        rollouts, _ = self._collect(trainer, batch, split, max(pl_module.ns), 0)
        self._attach(pl_module, batch, rollouts, split, {})
        for name, value in rollout_metrics(rollouts).items():
            pl_module.log(
                f"{split}/{name}",
                float(value),
                # A float, because Lightning averages the ranks' batch sizes in the type that they have: 6 and 5 gave 5.
                batch_size=float(len(batch)),
                reduce_fx="max" if name.endswith("_max") else "mean",
                sync_dist=trainer.world_size > 1,
                on_step=False,
                on_epoch=True,
            )

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def _attach(
        self, pl_module: Any, batch: PromptBatch, rollouts: RolloutBatch, split: Split, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Attach the rollouts to their batch unless too many could not be scored; `metrics` of all ranks (means, but
        maxima where the name ends in `_max`), in a collective for the sums and one for the maxima."""
        maxima = {name: value for name, value in metrics.items() if name.endswith("_max")}
        means = {name: value for name, value in metrics.items() if name not in maxima}
        counts = {"unscorable completions": (~rollouts.valid).sum(), "all completions": rollouts.valid.numel()}
        with during(Activity.OTHER):  # ranks meet in it
            sums = pl_module.over_ranks(means | counts, "sum")
            reduced = pl_module.over_ranks(maxima, "max") if maxima else {}
        unscorable, total = (int(sums[name]) for name in counts)
        self._unscorable.check(unscorable, total, split, self.reward.problem)
        batch.rollouts = rollouts.to(pl_module.device)
        reduced |= {name: sums[name] / pl_module.trainer.world_size for name in means}
        return {name: float(reduced[name]) for name in metrics}

    def _start_next(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to collect the next step's rollouts, from the weights as they are before this step's update."""
        steps = trainer.global_step + pl_module.inner_epochs
        if trainer.max_steps in range(steps + 1):
            return  # there is no next step
        loader: Any = trainer.train_dataloader
        if not hasattr(loader, "peek"):
            raise UserError(
                f"rollout.steps_ahead=1 needs a training loader with `peek`, such as PromptDataModule's, got "
                f"{type(loader).__name__}."
            )
        batch = loader.peek()
        collect = partial(self._collect, trainer, batch, "train", self.group_size, self.rollout_step)
        self._ahead.submit(batch.ids, collect)

    def _collect(self, trainer: pl.Trainer, batch: PromptBatch, split: Split, num_samples: int, step: int) -> Collected:
        assert self._collector is not None, "the engine is started before the first batch"
        return self._collector.collect(
            batch,
            num_samples=num_samples,
            seeds=[prompt_seed(self._run_seed, split, step, prompt_id) for prompt_id in batch.ids],
            weights_version=self._synced_step if self._synced_step is not None else trainer.global_step,
        )

    def _sync(self, trainer: pl.Trainer, pl_module: Any) -> float:
        """Give the engine the trainer's weights if they changed; seconds taken."""
        with during(Activity.GENERATING):
            self._ahead.wait()  # a completion is of one policy from its first token to its last
        assert self._weights is not None, "the engine is started before the first batch"
        if self.engine.shares_weights:
            return 0.0
        started = time.perf_counter()
        pushed = self._weights.push_if_changed()
        self._synced_step = trainer.global_step
        return time.perf_counter() - started if pushed else 0.0
