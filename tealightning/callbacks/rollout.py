"""Drive generation and scoring: attach `batch.rollouts` before every training, validation and test step."""

import os
import time
import warnings
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from tealightning.callbacks.rollout_checks import UnscorableGuard, check_prompts, model_length, padding_id
from tealightning.errors import UserError
from tealightning.reliability.progress import Activity, during
from tealightning.rewards.base import Reward
from tealightning.rollouts import EngineContext, RolloutCollector, RolloutEngine, policy_weights, prompt_seed
from tealightning.rollouts.collector import rollout_metrics
from tealightning.rollouts.prefetch import Collected, OneStepAhead
from tealightning.types import PromptBatch, RolloutBatch, SamplingConfig, Split


class RolloutCallback(Callback):
    """Samples completions from the policy as it is now and scores them.

    Training samples `group_size` completions a prompt, validation and test `max(ns)` of the module. Before each batch
    the engine takes over the trainer's weights if an optimizer step was made since. Seeds depend on the run's seed, the
    rollout step and the prompt's id only (in validation and test not on the step: every evaluation of a run uses the
    same random numbers, so differences between checkpoints are paired).

    Args:
        engine: Generates completions.
        reward: Scores them.
        group_size: m, rollouts a prompt in training.
        sampling: How completions are sampled, in training and evaluation.
        steps_ahead: 0 = on-policy. 1 = while a step trains, the rollouts of the next one are collected, from weights
            that are one step old when they are trained on: for an engine that works elsewhere (VLLMServerEngine), and
            with `loss.importance_cap`, which corrects for it.
        score_as_finished: Score a prompt's completions while those of others are still being generated: for a slow
            reward (over HTTP, on another device) and an engine that has some earlier than others (VLLMServerEngine).
            The reward is then called once a prompt.
        max_unscorable: Largest share of the completions of a training step, or of an evaluation so far, that may be
            unscorable (NaN); above it the run stops with an error, to be resumed. 1 = never.
        seed: Of the samples; None = the run's `seed_everything`.
        max_model_len: Longest prompt + completion in tokens that the engine prepares for; None = from the data module's
            `max_prompt_tokens`, else what the model can hold, at most 8,192.
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
    ) -> None:
        if group_size < 1:
            raise UserError(f"rollout.group_size must be at least 1, got {group_size}.")
        if max_model_len is not None and max_model_len < 2:
            raise UserError(
                f"rollout.max_model_len must be at least 2 (a prompt and a token) or null, got {max_model_len}."
            )
        self.engine = engine
        self.reward = reward
        self.group_size = group_size
        self.sampling = sampling or SamplingConfig()
        if steps_ahead not in (0, 1):
            raise UserError(f"rollout.steps_ahead must be 0 or 1, got {steps_ahead}.")
        if steps_ahead and not engine.is_concurrent:
            raise UserError(
                f"rollout.steps_ahead=1 needs an engine that works elsewhere while the trainer computes "
                f"(VLLMServerEngine), got {type(engine).__name__}."
            )
        self.steps_ahead = steps_ahead
        self.score_as_finished = score_as_finished
        self._unscorable = UnscorableGuard(max_unscorable)
        self.seed = seed
        self.max_model_len = max_model_len
        self.rollout_step = 0
        self._collector: RolloutCollector | None = None
        self._ahead = OneStepAhead()
        self._policy: Any = None  # what the engine was started with
        self._synced_step: int | None = None

    # ---------------------------------------------------------------- life cycle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before any model is loaded."""
        self._ahead = OneStepAhead()  # what an earlier run may have left in flight is not this one's
        if trainer.world_size == 1:  # vLLM makes a process group of size 1, which Lightning takes for several ranks
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        self.check(stage, pl_module)
        if sets := getattr(getattr(trainer, "datamodule", None), "prompt_sets", None):
            config = pl_module.policy_config
            length = self._model_len(trainer, config)
            check_prompts(sets, config, pl_module.tokenizer, self.sampling, length)  # type: ignore[arg-type]

    def check(self, stage: str, pl_module: Any) -> None:
        """Check the settings against the module's.

        Raises:
            ValueError: if the group is too small for the estimator, or older rollouts are not corrected for.
        """
        if stage != "fit":
            return
        pl_module.estimator.check_group_size(self.group_size)
        if self.steps_ahead and pl_module.loss.importance_cap is None:
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
        """Release engine and reward. Not called between stages: an engine serves fit, validate and test in turn.

        A collection under way is not waited for, its thread ends with the process at the latest."""
        self._collector = self._policy = None
        try:
            self.engine.close()
        finally:
            self.reward.close()

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_step": self.rollout_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollout_step = state_dict["rollout_step"]

    def rank_state_dict(self, *, of_step_under_way: bool = False, wait: bool = True) -> dict[str, Any]:
        """What this rank has sampled and not trained on (see `OneStepAhead.state`): ResumableCheckpoint keeps it."""
        ahead = self._ahead.state(of_step_under_way=of_step_under_way, wait=wait)
        return {} if ahead is None else {"ahead": ahead}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "ahead" in state_dict:
            self._ahead.load_state(state_dict["ahead"])

    def _start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._synced_step = None  # a stage may have loaded other weights
        if self._policy is pl_module.policy:
            return
        with during(Activity.STARTING):
            self._start_engine(trainer, pl_module)
        self._collector = RolloutCollector(
            engine=self.engine,
            reward=self.reward,
            sampling=self.sampling,
            pad_token_id=padding_id(pl_module.tokenizer, pl_module.policy.config),
            vocab_size=getattr(pl_module.policy.config, "vocab_size", None),
            score_as_finished=self.score_as_finished,
        )
        self._policy = pl_module.policy

    def _start_engine(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.reward.setup(pl_module.device)
        self.engine.start(
            EngineContext(
                policy=pl_module.policy,
                policy_path=pl_module.policy_path,
                tokenizer=pl_module.tokenizer,
                device=pl_module.device,
                max_model_len=self._model_len(trainer, pl_module.policy.config),
                seed=self._run_seed,
            )
        )

    def _model_len(self, trainer: pl.Trainer, config: Any) -> int:
        longest_prompt = getattr(getattr(trainer, "datamodule", None), "max_prompt_tokens", None)
        return self.max_model_len or model_length(config, self.sampling, longest_prompt)

    @property
    def _run_seed(self) -> int:
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    # ---------------------------------------------------------------- batches

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
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
        with during(Activity.OTHER):  # ranks meet in it
            unscorable, total, all_metrics = _over_ranks(trainer, pl_module, rollouts, metrics)
        self._unscorable.check(unscorable, total, "train", self.reward.problem)
        batch.rollouts = rollouts.to(pl_module.device)
        for name, value in all_metrics.items():
            pl_module.log(f"rollout/{name}", value, batch_size=len(batch))
        pl_module.log("reward", metrics["reward_mean"], prog_bar=True, logger=False, batch_size=len(batch))
        self.rollout_step += 1
        if self.steps_ahead:
            self._start_next(trainer, pl_module)
        else:
            self.engine.offload()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "val")

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "test")

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, split: Split) -> None:
        self._sync(trainer, pl_module)
        rollouts, _ = self._collect(trainer, batch, split, max(pl_module.ns), 0)
        with during(Activity.OTHER):  # ranks meet in it
            unscorable, total, _ = _over_ranks(trainer, pl_module, rollouts, {})
        self._unscorable.check(unscorable, total, split, self.reward.problem)
        batch.rollouts = rollouts.to(pl_module.device)
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

    def _start_next(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to collect the next step's rollouts, from the weights as they are before this step's update."""
        steps = trainer.global_step + pl_module.inner_epochs
        if trainer.max_steps in range(steps + 1):
            return  # there is no next step
        upcoming = _loader_of(trainer).peek()
        self._ahead.submit(
            upcoming.ids, partial(self._collect, trainer, upcoming, "train", self.group_size, self.rollout_step)
        )

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
        if self.engine.shares_weights or self._synced_step == trainer.global_step:
            return 0.0
        started = time.perf_counter()
        with during(Activity.SYNCING):
            self.engine.sync_weights(policy_weights(pl_module.policy))
        self._synced_step = trainer.global_step
        return time.perf_counter() - started


def _over_ranks(
    trainer: pl.Trainer, pl_module: Any, rollouts: RolloutBatch, metrics: dict[str, float]
) -> tuple[int, int, dict[str, float]]:
    """Unscorable completions, all completions, and metrics (means, but maxima where the name ends in `_max`) of all
    ranks, in a collective for the sums and one for the maxima."""
    means = {name: torch.tensor(value) for name, value in metrics.items() if not name.endswith("_max")}
    maxima = {name: value for name, value in metrics.items() if name.endswith("_max")}
    counts = {"unscorable completions": (~rollouts.valid).sum(), "all completions": rollouts.valid.numel()}
    sums = {name: float(value) for name, value in pl_module.over_ranks(means | counts, "sum").items()}
    highest = pl_module.over_ranks(maxima, "max") if maxima else {}
    reduced = {name: sums[name] / trainer.world_size for name in means}
    reduced |= {name: float(value) for name, value in highest.items()}
    return int(sums["unscorable completions"]), int(sums["all completions"]), {name: reduced[name] for name in metrics}


def _loader_of(trainer: pl.Trainer) -> Any:
    """The training loader.

    Raises:
        ValueError: if it cannot say what comes next.
    """
    loader = trainer.train_dataloader
    if not hasattr(loader, "peek"):
        raise UserError(
            f"rollout.steps_ahead=1 needs a training loader with `peek`, such as PromptDataModule's, got "
            f"{type(loader).__name__}."
        )
    return loader
