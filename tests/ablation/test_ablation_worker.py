"""A run in its folder: what it records, and what it leaves to `fit`."""

import math
import threading
import time
from types import SimpleNamespace

from tealightning.ablation import worker
from tealightning.ablation.plan import Job
from tealightning.ablation.worker import execute, read_record
from tealightning.callbacks import Budget, EvaluationRecord
from tealightning.reliability.progress import Activity, during


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
    assert [message["done"] for message in messages if "done" in message] == [0, 1, 1, 2]


def test_the_parent_hears_what_the_run_does(tmp_path, monkeypatch):
    """Minutes may pass before the first step: libraries, model, engine."""
    monkeypatch.setattr(worker, "TELL_SECONDS", 0.01)
    messages = []

    def build(args):
        for activity in (Activity.LOADING, Activity.STARTING):
            with during(activity):
                while not messages[1:] or messages[-1] != {"activity": str(activity)}:
                    time.sleep(0.01)
        return SimpleNamespace(trainer=TrainerWithSkippedStep(), model=None, datamodule=None)

    config = {"trainer": {"logger": None, "limit_test_batches": 0}}
    execute(Job(kind="fit", variant="tea", seed=0, config=config, hash="hash", folder=tmp_path), build, messages.append)
    activities = [message["activity"] for message in messages if "activity" in message]
    assert activities[:3] == ["reading settings and data", "loading the models and the data", "starting the engine"]
    assert not any(thread.name == "tell" for thread in threading.enumerate())
