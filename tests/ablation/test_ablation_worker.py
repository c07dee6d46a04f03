"""A run in its folder: what it records, and what it leaves to `fit`."""

import math
from types import SimpleNamespace

from tealightning.ablation.plan import Job
from tealightning.ablation.worker import execute, read_record
from tealightning.callbacks import Budget, EvaluationRecord


class TrainerWithSkippedStep:
    """Stands for a trainer whose second step is not finite: the module skips and counts it, as in `fit`."""

    max_steps = 3

    def __init__(self):
        self.callbacks = [Budget(), EvaluationRecord()]
        self.global_step = 0
        self.callback_metrics = {}

    def fit(self, model, datamodule, ckpt_path):
        watch = self.callbacks[-1]
        watch.on_train_start(self, model)
        for loss in (0.5, math.nan, 0.25):
            self.global_step += math.isfinite(loss)
            self.callback_metrics = {"train/policy_loss": loss, "train/grad_norm": loss, "rollout/reward_mean": 1.0}
            watch.on_train_batch_end(self, model, None, None, 0)

    def validate(self, model, datamodule, verbose):
        pass


def test_a_step_that_is_not_finite_is_left_to_fit_which_skips_and_counts_it(tmp_path):
    config = {"trainer": {"logger": None, "limit_test_batches": 0}}
    job = Job(kind="fit", variant="tea", seed=0, config=config, hash="hash", folder=tmp_path)
    messages = []
    run = SimpleNamespace(trainer=TrainerWithSkippedStep(), model=None, datamodule=None)
    record = execute(job, lambda args: run, messages.append)
    assert (record["status"], record["error"], record["optimizer_steps"]) == ("finished", None, 2)
    assert read_record(tmp_path) == record
    assert [message["done"] for message in messages] == [1, 1, 2]
