"""Every schedule of torch and of transformers steps as documented, or is refused before anything is loaded."""

import inspect
import logging
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from module_fixtures import make_batch, make_rollouts, run_steps, save_tiny_policy
from playground_fits import fit
from playground_fits import module_of as tiny_module
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from tealightning import PostTrainingModule
from tealightning.errors import UserError
from tealightning.estimators import build_estimator
from tealightning.training.schedules import SCHEDULES, ReduceLROnPlateau, WarmupSchedule

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
SETTINGS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1}}
SETTINGS |= {"warmup_stable_decay": {"num_decay_steps": 2}}
TORCHS = {  # arguments that it needs, and the learning rate after three rollout steps at a base of 1
    "StepLR": ({"step_size": 2}, 0.1),
    "MultiStepLR": ({"milestones": [1, 2]}, 0.01),
    "ConstantLR": ({"factor": 0.5, "total_iters": 9}, 0.5),
    "LinearLR": ({"start_factor": 0.25, "total_iters": 4}, 0.8125),
    "ExponentialLR": ({"gamma": 0.5}, 0.125),
    "PolynomialLR": ({"total_iters": 4}, 0.25),
    "CosineAnnealingLR": ({"T_max": 6}, 0.5),
    "CosineAnnealingWarmRestarts": ({"T_0": 3}, 1.0),
    "CyclicLR": ({"base_lr": 0.0, "max_lr": 1.0, "step_size_up": 4, "cycle_momentum": False}, 0.75),
    "OneCycleLR": ({"max_lr": 1.0, "total_steps": 4, "pct_start": 0.5, "anneal_strategy": "linear"}, 4e-6),
    "LambdaLR": ({"lr_lambda": lambda step: 1 / (1 + step)}, 0.25),
    "MultiplicativeLR": ({"lr_lambda": lambda step: 0.5}, 0.125),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, lr_scheduler, lr=1.0, **settings):
    estimator, sgd = build_estimator("mean_reward"), partial(torch.optim.SGD, lr=lr)
    return PostTrainingModule(policy, estimator, optimizer=sgd, lr_scheduler=lr_scheduler, ns=[1, 4], **settings)


def batches(number):
    return [make_batch(make_rollouts(REWARDS))] * number


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def rate_after(policy, make, steps=3, **settings):
    trainer, _ = run_steps(module_of(policy, make), batches(9), max_steps=steps, **settings)
    return trainer.optimizers[0].param_groups[0]["lr"]


def test_the_table_of_schedules_is_torchs():
    others = {"LRScheduler", "_LRScheduler", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"}
    classes = inspect.getmembers(lr_scheduler, inspect.isclass)
    assert {n for n, c in classes if issubclass(c, lr_scheduler.LRScheduler)} - others == set(TORCHS)


@pytest.mark.parametrize("name", TORCHS)
def test_each_schedule_of_torch_steps_once_a_rollout_step(policy, name):
    arguments, expected = TORCHS[name]
    assert rate_after(policy, partial(getattr(lr_scheduler, name), **arguments)) == pytest.approx(expected)


def test_schedules_of_schedules_step_too(policy):
    def warm_up(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    assert rate_after(policy, warm_up) == 0.5
    chained = lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.5)])  # noqa: E731
    assert rate_after(policy, chained) == 0.125


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lr_scheduler.LRScheduler, "LRScheduler is the base class"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=2), r"OneCycleLR fails at step 3"),
        (lr_scheduler.ReduceLROnPlateau, "needs `monitor`"),
        (lambda optimizer: object(), "has no method step"),
        (partial(WarmupSchedule, name="cosine", warmup_steps=10), "warmup_steps=10 is more than the 3 rollout steps"),
        (partial(WarmupSchedule, name="cosine", settings={"cycles": 2}), "unexpected keyword argument 'cycles'"),
        (partial(WarmupSchedule, name="cosin"), "name must be one of linear, cosine"),
        (partial(WarmupSchedule, name="cosine", warmup_steps=1, warmup_ratio=0.1), "warmup_ratio must be"),
    ],
)
def test_what_cannot_work_is_refused_before_the_policy_is_loaded(policy, make, message):
    module = module_of(policy, make)
    with pytest.raises(UserError, match=message):
        run_steps(module, batches(9), max_steps=3)
    assert module.policy is None


def test_a_schedule_that_ends_with_the_epoch_is_not_refused_for_later_steps(policy):
    one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=2)
    run_steps(module_of(policy, one_cycle), batches(2), max_steps=500)
    with pytest.raises(UserError, match="OneCycleLR fails at step 3"):
        run_steps(module_of(policy, one_cycle), batches(3), max_steps=500)


def test_the_names_are_transformers():
    assert {*SCHEDULES, "reduce_lr_on_plateau", "greedy"} == {name.value for name in SchedulerType}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_of_transformers_gives_its_learning_rates(policy, name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    expected = get_scheduler(name, optimizer, 2, 6, scheduler_specific_kwargs=SETTINGS.get(name))
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        expected.step()
    seen = Rates()
    make = partial(WarmupSchedule, name=name, warmup_steps=2, settings=SETTINGS.get(name))
    run_steps(module_of(policy, make, lr=0.5), batches(9), callbacks=[seen], max_steps=6)
    assert seen.rates == pytest.approx(rates, rel=1e-12, abs=0)


def test_the_schedule_ends_with_the_run_and_says_where(policy, caplog):
    """Nine batches of two inner epochs end before 100 optimizer steps do: 9 rollout steps, a third of them warm-up."""
    seen = Rates()
    make = partial(WarmupSchedule, name="linear", warmup_ratio=1 / 3)
    with caplog.at_level(logging.INFO):
        run_steps(module_of(policy, make, inner_epochs=2), batches(9), callbacks=[seen], max_steps=100)
    assert seen.rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert "linear, ends at rollout step 9" in caplog.text
    seen = Rates()
    run_steps(module_of(policy, make, inner_epochs=2), batches(9), callbacks=[seen], max_steps=6)
    assert seen.rates == pytest.approx([0, 1, 0.5])


def test_a_schedule_without_an_end_asks_for_one(policy):
    trainer = pl.Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False)
    module = module_of(policy, partial(WarmupSchedule, name="cosine"))
    with pytest.raises(UserError, match=r"the end of the schedule is unknown: set trainer.max_steps or total_steps"):
        trainer.fit(module, DataLoader(batches(1), batch_size=None))


# ---------------------------------------------------------------- on a plateau


class Save(Callback):
    def __init__(self, folder, step, before):
        self.path, self.step = folder / "saved.ckpt", step
        setattr(self, "on_validation_start" if before else "on_validation_end", self.save)

    def save(self, trainer, module):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def fit_on_plateau(policy, monitor, callbacks=(), ckpt_path=None, batches_=None, **settings):
    make = partial(ReduceLROnPlateau, monitor=monitor, mode="max", factor=0.5, patience=0, threshold=0.0)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "val_check_interval": 2, "logger": False, "callbacks": [*callbacks]},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **settings},
    )
    module = module_of(policy, make)
    loaders = [DataLoader(batches(n), batch_size=None) for n in (8, 1)]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer


def test_a_plateau_of_validation_lowers_the_learning_rate(policy):
    """The rewards of validation never change: every validation but the first halves it, the sanity check counts not."""
    seen = Rates()
    trainer = fit_on_plateau(policy, "val/best_of_4", [seen])
    assert seen.rates == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert trainer.lr_scheduler_configs[0].scheduler.best == pytest.approx(
        2.5
    )  # the best of (2, 1, .5, -1), (0, 3, ..)


def test_a_validation_that_is_repeated_steps_a_plateau_once(policy, tmp_path):
    class Again(Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                module.step_on_plateau()

    seen = Rates()
    trainer = fit_on_plateau(policy, "val/best_of_4", [seen, Again()])
    assert seen.rates == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert trainer.lr_scheduler_configs[0].scheduler.state_dict()["stepped_at"] == 8


def test_a_plateau_may_be_of_a_training_metric(policy):
    assert fit_on_plateau(policy, "train/lr").optimizers[0].param_groups[0]["lr"] < 1.0


@pytest.mark.parametrize("before", [True, False])
def test_a_plateau_is_resumed_exactly(policy, tmp_path, before):
    save, seen, rest = Save(tmp_path, 4, before), Rates(), Rates()
    whole = fit_on_plateau(policy, "val/best_of_4", [seen, save])
    after = fit_on_plateau(policy, "val/best_of_4", [rest], ckpt_path=save.path)
    states = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (whole, after)]
    if not before:  # a plain checkpoint of a validation's start is not gone on from with that validation
        assert states[0] == states[1] and rest.rates == seen.rates[4:]


def test_a_metric_that_is_not_logged_is_named_with_those_that_are(policy):
    with pytest.raises(UserError, match=r"'val/best_of_5' is not logged. Logged: .*val/best_of_4"):
        fit_on_plateau(policy, "val/best_of_5")


def test_a_warm_up_is_resumed_exactly_with_the_real_loader(playground, tmp_path):
    class SaveAtTwo(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    def trained(**settings):
        schedule = partial(WarmupSchedule, name="cosine", warmup_steps=2)
        return fit(playground, steps=5, module=tiny_module(playground, lr_scheduler=schedule), max_epochs=9, **settings)

    (_, whole), path = trained(callbacks=[SaveAtTwo()]), str(tmp_path / "two.ckpt")
    _, rest = trained(ckpt_path=path)
    assert rest.series("train/lr") == whole.series("train/lr")[2:] and torch.equal(rest.weights, whole.weights)
    assert [step["ids"] for step in rest.steps] == [step["ids"] for step in whole.steps[2:]]
    assert whole.series("train/lr") == pytest.approx([5e-4, 1e-3, 7.5e-4, 2.5e-4, 0.0])
