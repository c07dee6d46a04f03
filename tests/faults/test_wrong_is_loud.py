"""What goes wrong in training without an error: each fault is injected, counted and told; none passes in silence."""

import json
import math
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import sick_ranks
import torch
from copying_engine import CopyingEngine, DropsEverySecondTensor, NeverSyncs, NeverSyncsAhead, StepsAhead, SyncsOnce
from lightning.pytorch.callbacks import Callback
from playground_fits import fit, module_of
from ranks import run_ranks
from run_records import flat_weights
from safetensors.torch import load_file
from tiny_policies import save_policy

from tealightning import HealthChecks, PolicyGradientLoss, RolloutCallback, SamplingConfig, UnhealthyRun
from tealightning.estimators import build_estimator
from tealightning.estimators.base import AdvantageEstimator
from tealightning.rollouts import TransformersEngine

TOLD = re.compile("Health check|was skipped")


class Sick(AdvantageEstimator):
    """Advantages of GRPO, NaN at some of its calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.healthy = build_estimator("grpo")
        self.sick_calls = calls
        self.calls = 0

    def compute(self, rewards, valid):
        raise NotImplementedError

    def __call__(self, rewards, valid=None):
        self.calls += 1
        advantages = self.healthy(rewards, valid)
        return advantages * math.nan if self.calls - 1 in self.sick_calls else advantages


class AtStep(Callback):
    """Does something to the module before the rollouts of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_start(self, trainer, pl_module):
        if self.step == 0:
            self.action(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.step:
            self.action(pl_module)


class Weights(Callback):
    """Weights and optimizer state after every rollout step."""

    def __init__(self):
        self.after, self.moments, self.lrs = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(flat_weights(pl_module.policy))
        states = trainer.optimizers[0].state.values()
        self.moments.append([(int(s["step"]), s["exp_avg"].clone()) for s in states])
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])


def told_by(run):
    """What `run` returns, and the warnings that are ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if TOLD.search(str(w.message))]


def infinite_gradient(module):
    """The next gradient of one weight."""
    parameter = next(module.policy.parameters())

    def spoil(gradient):
        handle.remove()
        return gradient * math.inf

    handle = parameter.register_hook(spoil)


# ---------------------------------------------------------------- loss and gradient


@pytest.mark.fault("a loss or a gradient that is NaN or infinite", how="NaN advantages, an infinite gradient at step 2")
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped_counted_and_saved(kind, playground, tmp_path, injected):
    health, weights = HealthChecks(), Weights()
    fault = [AtStep(1, infinite_gradient)] if kind == "gradient" else []
    module = module_of(playground, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    module.estimator = Sick(1) if kind == "loss" else module.estimator
    callbacks = [*fault, health, weights]
    run = lambda: fit(playground, steps=3, module=module, callbacks=callbacks, default_root_dir=tmp_path)  # noqa: E731
    (trainer, record), told = told_by(run)
    assert len(record.steps) == 4 and trainer.global_step == 3  # the prompts went on, and the step was made up for
    assert torch.equal(weights.after[0], weights.after[1]) and not torch.equal(weights.after[1], weights.after[2])
    for (step, moment), (other_step, other) in zip(weights.moments[0], weights.moments[1], strict=True):
        assert step == other_step == 1 and torch.equal(moment, other)
    assert weights.lrs == [5e-4, 5e-4, 2.5e-4, 1.25e-4]  # the schedule waits
    assert all(bool(after.isfinite().all()) for after in weights.after)
    assert record.series("train/nonfinite_steps") == record.series("train/health_nonfinite") == [0, 1, 1, 1]
    assert len(told) == 1 and "An optimizer step was skipped" in told[0]
    files = sorted(file.name for file in (tmp_path / "unhealthy").iterdir())
    assert files == ["step_1_rank_0.json", "step_1_rank_0.safetensors"]
    saved = json.loads((tmp_path / "unhealthy" / files[0]).read_text(encoding="utf-8"))
    assert [prompt["id"] for prompt in saved["prompts"]] == record.steps[1]["ids"]
    assert all(len(prompt["completions"]) == 8 for prompt in saved["prompts"])
    tensors = load_file(tmp_path / "unhealthy" / files[1])
    assert tensors["completion_ids"].shape == tensors["policy_log_probs"].shape == tensors["rollout_log_probs"].shape
    assert tensors["advantages"].isnan().all() == (kind == "loss")
    if kind == "gradient":
        mask = tensors["rollout_log_probs"] != 0
        assert torch.allclose(tensors["policy_log_probs"][mask], tensors["rollout_log_probs"][mask], atol=1e-4)
        assert saved["parameters_with_a_gradient_that_is_not_finite"] == ["model.embed_tokens.weight"]
    injected(times=1, lost="the update of that step")


@pytest.mark.fault("every loss is NaN", how="NaN advantages at every step")
def test_run_of_steps_that_are_not_finite_ends_the_run(playground, tmp_path, injected):
    health = HealthChecks(max_nonfinite_steps=4, max_saved_batches=2)
    module = module_of(playground)
    module.estimator = Sick(*range(100))
    run = lambda: fit(playground, steps=50, module=module, callbacks=[health], default_root_dir=tmp_path)  # noqa: E731
    with pytest.raises(UnhealthyRun, match=r"loss or gradient is NaN or infinite.*4 steps in a row"):
        told_by(run)
    assert module.skipped.total == health.counts["nonfinite"] == 4
    assert len(list((tmp_path / "unhealthy").iterdir())) == 2 * 2
    assert all(bool(parameter.isfinite().all()) for parameter in module.policy.parameters())
    injected(times=4, lost="nothing: the weights are those of before")


@pytest.mark.fault("an infinite gradient in a later inner epoch", how="a gradient hook at the second of three epochs")
def test_inner_epochs_end_with_one_that_is_not_finite(playground, tmp_path, injected):
    module = module_of(playground, inner_epochs=3)
    backward, epochs = module._backward, []

    def spoiled(step, **kwargs):
        epochs.append(kwargs["is_first"])
        if len(epochs) == 2:
            infinite_gradient(module)
        return backward(step, **kwargs)

    module._backward = spoiled
    run = lambda: fit(playground, steps=4, module=module, callbacks=[HealthChecks()], default_root_dir=tmp_path)  # noqa: E731
    (trainer, record), told = told_by(run)
    assert epochs == [True, False, True, False, False]
    assert len(record.steps) == 2 and trainer.global_step == 4 and len(told) == 1
    assert record.series("train/nonfinite_steps") == [1, 1]
    injected(times=1, lost="two updates")


@pytest.mark.fault("a loss that is NaN on one of two ranks", how="two processes (gloo, DDP and FSDP2), NaN on rank 1")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all(strategy, tmp_path, injected):
    policy = save_policy(tmp_path)
    run_ranks(Path(sick_ranks.__file__), policy, str(tmp_path), strategy, timeout=800)
    first, second = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in (first, second):
        moved = [bool((after != before).any()) for before, after in pairwise(rank["weights"])]
        assert moved == [not sick for sick in sick_ranks.SICK[1:5]]
        assert rank["weights"].isfinite().all()
        assert rank["skipped"] == rank["counts"]["nonfinite"] == 3
        assert "at 2 steps in a row" in rank["error"]
    assert strategy == "fsdp2" or torch.equal(first["weights"], second["weights"])
    names = {file.stem for file in (tmp_path / "unhealthy").iterdir()}
    assert names == {f"step_{step}_rank_{rank}" for step in (1, 3, 4) for rank in (0, 1)}
    injected(times=3, lost="the updates of those steps")


# ---------------------------------------------------------------- the engine's weights

NO_PROBE = {"max_probe_diff": math.inf}  # what the health checks see by themselves


@pytest.mark.fault(
    "an engine that goes on with old weights", how="sync_weights does nothing, drops every second tensor, or works once"
)
@pytest.mark.parametrize("engine", [NeverSyncs, DropsEverySecondTensor, SyncsOnce])
def test_stale_weights_are_noticed_within_five_steps(engine, playground, injected):
    """Peers trained on rollouts of stale weights for weeks (verl #7495, TRL #5312). The first step is what the others
    are compared with, and a difference that lasts for three steps is told; a large one is a `mismatch` as well."""
    health = HealthChecks(max_log_prob_diff=None)
    with pytest.raises(UnhealthyRun, match=r"Training was stopped.*does not have the trainer's weights"):
        fit(playground, steps=20, engine=engine(), callbacks=[health], rollout=NO_PROBE)
    assert health._global_step <= 5 - 1
    assert health.counts["stale_weights"] == 3
    injected(times=1, lost="at most five steps")


@pytest.mark.fault("old weights in a bfloat16 engine", how="sync_weights does nothing; rounding hides a single step")
def test_stale_weights_are_noticed_through_the_rounding_of_bfloat16(playground, injected):
    """As in verl #7495 and TRL #5312, with an engine whose log-probs are off by 1e-2 when all is well."""
    health = HealthChecks()
    with pytest.raises(UnhealthyRun, match="engine"):
        fit(playground, steps=20, engine=NeverSyncs(torch.bfloat16), callbacks=[health], rollout=NO_PROBE)
    assert health._global_step <= 5 - 1
    injected(times=1, lost="at most five steps")


@pytest.mark.fault("an engine that goes on with old weights, one step ahead", how="sync_weights does nothing")
def test_stale_weights_are_noticed_one_step_ahead(playground, injected):
    """As in verl #7495 and TRL #5312, where a difference of one step is meant: it is told when it is that of five."""
    health = HealthChecks(stop_on=["stale_ahead"])
    settings = {"module": module_of(playground, loss=PolicyGradientLoss(importance_cap=2.0)), "callbacks": [health]}
    with pytest.raises(UnhealthyRun, match="times what they did at the first step"):
        told_by(
            lambda: fit(
                playground, steps=40, engine=NeverSyncsAhead(), rollout=NO_PROBE | {"steps_ahead": 1}, **settings
            )
        )
    assert health._global_step < 12
    assert health.counts["drift"] > 0 and health.counts["weights_version"] == 0
    injected(times=1, lost="the steps until the difference shows, at most twelve")


class ForgetsToSync(RolloutCallback):
    def _sync(self, trainer, pl_module):
        if self._synced_step is None:
            return super()._sync(trainer, pl_module)
        return 0.0


@pytest.mark.fault("weights that were never sent to the engine", how="a rollout callback that forgets to sync")
def test_weights_of_the_wrong_version_are_noticed_at_once(playground, injected, monkeypatch):
    monkeypatch.setattr("playground_fits.RolloutCallback", ForgetsToSync)
    health = HealthChecks()
    with pytest.raises(UnhealthyRun, match="weights of optimizer step 0 and trained on after step 1"):
        fit(playground, steps=5, engine=CopyingEngine(), callbacks=[health])
    assert health.counts["weights_version"] == 1
    injected(times=1, lost="one step")


# ---------------------------------------------------------------- log-probs and tokens


class WrongDistribution(TransformersEngine):
    """Reports the log-probs of another temperature than it samples at."""

    def generate(self, prompt_token_ids, *, num_samples, sampling, seeds):
        other = SamplingConfig(max_new_tokens=sampling.max_new_tokens, temperature=1.0)
        return super().generate(prompt_token_ids, num_samples=num_samples, sampling=other, seeds=seeds)


@pytest.mark.fault("engine and trainer disagree on log-probs", how="an engine that ignores temperature and top-p")
def test_mismatch_of_log_probs_ends_the_run(playground, injected):
    health = HealthChecks()
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.4)
    with pytest.raises(UnhealthyRun, match=r"differ by .* nats a token.*rollout/log_prob_abs_diff_mean, limit 0.2"):
        fit(playground, steps=5, engine=WrongDistribution(), callbacks=[health], rollout={"sampling": sampling})
    assert health.counts["mismatch"] == 1
    injected(times=1, lost="one step")


@pytest.mark.fault("no fault: temperature, top-p and top-k", how="sampling settings that make peers' engines disagree")
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"top_k": 5, "temperature": 0.9}]
)
def test_temperature_top_p_and_top_k_are_no_mismatch(sampling, playground, injected):
    """In TRL engine and trainer disagree at a temperature other than 1 (#4159) or with top-p and top-k (#6789): here
    both give log-probs of the distribution that was sampled from."""
    health = HealthChecks()
    settings = {"sampling": SamplingConfig(max_new_tokens=12, **sampling)}
    run = lambda: fit(playground, steps=2, engine=CopyingEngine(), callbacks=[health], rollout=settings)  # noqa: E731
    (_, record), told = told_by(run)
    assert max(record.series("rollout/log_prob_abs_diff_max")) < 1e-4
    assert told == [] and set(health.counts.values()) == {0}
    injected(times=1)


class OtherModel(TransformersEngine):
    def generate(self, prompt_token_ids, **kwargs):
        groups = super().generate(prompt_token_ids, **kwargs)
        groups[1][0].token_ids[0] = 10**6
        return groups


@pytest.mark.fault("token ids outside the vocabulary", how="an engine that serves another model")
def test_tokens_outside_the_vocabulary_end_the_run(playground, injected):
    with pytest.raises(ValueError, match=r"returned a token id outside \[0, \d+\).*to 1000000"):
        fit(playground, steps=1, engine=OtherModel(), callbacks=[HealthChecks()])
    injected(times=1)


@pytest.mark.fault("token ids that the tokenizer does not know", how="a tokenizer smaller than the model's embedding")
def test_tokens_unknown_to_the_tokenizer_are_counted(playground, injected):
    class SmallTokenizer:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __len__(self):
            return 100

        def __call__(self, *args, **kwargs):
            return self.tokenizer(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

    module = module_of(playground)
    module.__dict__["tokenizer"] = SmallTokenizer(module.tokenizer)
    health = HealthChecks()
    run = lambda: fit(playground, steps=2, module=module, callbacks=[health])  # noqa: E731
    (_, record), told = told_by(run)
    assert len(told) == 1 and "sampled tokens are ids that the tokenizer has no token for" in told[0]
    assert record.series("train/health_unknown_tokens") == [1, 2]
    injected(times=2)


# ---------------------------------------------------------------- rewards


def lengths_and_letters(prompts, completions, metadata):
    """A continuous reward near 10, its spread a few steps of bfloat16."""
    return [10 + 0.2 * math.sin(sum(map(ord, text)) * 0.37 + len(text)) for text in completions]


def constant(prompts, completions, metadata):
    return [1.0] * len(completions)


def in_bfloat16(prompts, completions, metadata):
    return torch.tensor(lengths_and_letters(prompts, completions, metadata)).bfloat16().double().tolist()


def clipped(prompts, completions, metadata):
    return [min(value, 10.0) for value in lengths_and_letters(prompts, completions, metadata)]


def squashed(prompts, completions, metadata):
    return torch.tensor(lengths_and_letters(prompts, completions, metadata)).mul(1.66).sigmoid().double().tolist()


@pytest.mark.fault(
    "a reward that loses its upper tail", how="scores rounded to bfloat16, clipped, or through a sigmoid"
)
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (in_bfloat16, "all scores are bfloat16 numbers"),
        (clipped, "the highest score is shared by many, as after a clip"),
        (squashed, "neighbours in float32, as after a sigmoid"),
    ],
)
def test_scores_that_cannot_be_told_apart_are_noticed(reward, message, playground, injected):
    """OpenRLHF clips rewards to +-10 and verl puts them through a sigmoid unless told otherwise."""
    health = HealthChecks(patience=2)
    (_, record), told = told_by(lambda: fit(playground, steps=3, reward=reward, callbacks=[health]))
    assert len(told) == 1 and re.search(message, told[0])
    assert min(record.series("rollout/reward_ties")) > 0.2
    assert record.series("train/health_reward_ties") == [1, 2, 3]
    injected(times=3)


@pytest.mark.fault("rewards that are all equal", how="a constant reward")
def test_steps_without_anything_to_learn_are_told(playground, injected):
    """No group has a spread: in TRL #6367 and NeMo-RL #4158 such groups dilute or spike the loss. Here they take no
    step in any direction, and a run of them is told."""
    health = HealthChecks(max_degenerate_steps=3)
    run = lambda: fit(playground, steps=5, reward=constant, callbacks=[health])  # noqa: E731
    (_, record), told = told_by(run)
    assert len(told) == 1 and "there is nothing to learn from" in told[0] and "at 3 steps in a row" in told[0]
    assert record.series("train/health_degenerate") == [1, 2, 3, 4, 5]
    assert record.largest_move == 0 and set(record.series("train/policy_loss")) == {0}
    injected(times=5)


# ---------------------------------------------------------------- the policy


def sharpened(module):
    """A policy that is all but deterministic."""
    with torch.no_grad():
        module.policy.model.norm.weight.mul_(200.0)


@pytest.mark.fault("a policy that collapses", how="its logits are multiplied by 200 at the third step")
def test_collapse_of_entropy_and_kl_are_told(playground, injected):
    health = HealthChecks(patience=2)
    module = module_of(playground, loss=PolicyGradientLoss(kl_coef=1e-4))
    run = lambda: fit(playground, steps=6, module=module, callbacks=[AtStep(2, sharpened), health])  # noqa: E731
    (_, record), told = told_by(run)
    assert any("the policy's entropy is" in text for text in told)
    assert any("the KL to the reference is" in text for text in told)
    assert record.series("train/health_entropy")[:4] == [0, 0, 1, 2]
    assert record.series("train/health_kl")[:4] == [0, 0, 1, 2]
    injected(times=4)


@pytest.mark.fault("a reference that moves with the policy", how="the reference is the policy itself")
def test_reference_that_is_the_policy_is_told(playground, injected):
    health = HealthChecks(patience=2)
    module = module_of(playground, loss=PolicyGradientLoss(kl_coef=0.1))
    tie = AtStep(0, lambda module: setattr(module, "_reference", (module.policy,)))
    (_, record), told = told_by(lambda: fit(playground, steps=4, module=module, callbacks=[tie, health]))
    assert len(told) == 1 and "exactly 0 although the policy is trained" in told[0]
    assert record.series("train/health_kl") == [0, 1, 2, 3]
    injected(times=3)


# ---------------------------------------------------------------- no fault


@pytest.mark.fault("no fault: healthy runs", how="grpo and tea, on-policy, with bfloat16 rollouts, and one step ahead")
@pytest.mark.parametrize("estimator", ["grpo", "tea"])
@pytest.mark.parametrize("engine", ["shared", "own", "bfloat16", "ahead"])
def test_healthy_runs_raise_no_alarm_and_train_the_same(estimator, engine, playground, injected):
    settings = {"rollout": {"steps_ahead": 1}} if engine == "ahead" else {}
    loss = PolicyGradientLoss(kl_coef=0.01, importance_cap=2.0 if engine == "ahead" else None)
    engines = {"shared": TransformersEngine, "own": CopyingEngine, "ahead": StepsAhead}

    def run(*callbacks):
        sampler = CopyingEngine(torch.bfloat16) if engine == "bfloat16" else engines[engine]()
        module = module_of(playground, estimator=estimator, loss=loss, lr=3e-4)
        return fit(playground, steps=12, engine=sampler, module=module, callbacks=callbacks, **settings)

    health = HealthChecks(patience=3, max_degenerate_steps=3)
    (_, watched), told = told_by(lambda: run(health))
    assert told == [] and set(health.counts.values()) == {0}, health.counts
    assert watched.series("train/nonfinite_steps") == [0] * 12
    (_, alone), _ = told_by(run)
    assert torch.equal(watched.weights, alone.weights)
    injected(times=12)


@pytest.mark.fault("a resumed run with a fault behind it", how="a checkpoint after a skipped step")
def test_counts_survive_a_checkpoint(playground, tmp_path, injected):
    module = module_of(playground)
    module.estimator = Sick(1)
    trainer, _ = fit(playground, steps=2, module=module, callbacks=[HealthChecks()], default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=False)
    health = HealthChecks()
    fault = {"ckpt_path": str(tmp_path / "after.ckpt"), "default_root_dir": tmp_path}
    _, record = fit(playground, steps=3, callbacks=[health], **fault)
    assert record.series("train/nonfinite_steps") == record.series("train/health_nonfinite") == [1]
    assert health.saved_batches == 1
    injected(times=1)
