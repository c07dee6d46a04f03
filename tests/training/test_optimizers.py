"""Every optimizer of torch trains from the command line's form of it, or is refused before anything is loaded."""

import copy
import importlib.util
import inspect
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from module_fixtures import KeepGradients, make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama
from ranks import HELPERS, run_ranks
from schedule_free import SGDScheduleFree
from torch.utils.data import DataLoader
from transformers import Adafactor, AutoModelForCausalLM

from tealightning import PostTrainingModule
from tealightning.errors import UserError
from tealightning.estimators import build_estimator
from tealightning.training.lora import LoRA
from tealightning.training.optimizers import MuonWithAdamW, build_optimizer

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
REFUSED = {"LBFGS": "computes the loss again", "SparseAdam": "cannot make a step with dense gradients"}
TORCHS = [
    name for name, cls in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(cls, torch.optim.Optimizer)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, optimizer, **settings):
    return PostTrainingModule(policy, build_estimator("mean_reward"), optimizer=optimizer, **settings)


def batches(number):
    """The same batch again and again: a plain loader starts anew when a run goes on."""
    return [make_batch(make_rollouts(REWARDS))] * number


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


class SaveAfterTwoSteps(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", [*(n for n in TORCHS if n != "Optimizer"), "Transformers_Adafactor"])
def test_each_optimizer_trains_and_resumes_exactly_or_is_refused(policy, tmp_path, name):
    make = getattr(torch.optim, name, partial(Adafactor, lr=None))
    if name in REFUSED:
        with pytest.raises(UserError, match=f"{name} is not supported: .*{REFUSED[name]}"):
            run_steps(module_of(policy, make), batches(1))
        return
    save = SaveAfterTwoSteps(tmp_path / "two.ckpt")
    whole, _ = run_steps(module_of(policy, make), batches(4), callbacks=[save])
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    assert not torch.equal(weights(whole.lightning_module), start)
    second, _ = run_steps(module_of(policy, make), batches(4), ckpt_path=save.path)
    assert torch.equal(weights(second.lightning_module), weights(whole.lightning_module))


class NoState(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        raise KeyError("step")


class NoClosure(torch.optim.SGD):
    def step(self):
        return super().step()


class DeafToClosure(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoState, "NoState is not supported: it cannot load its own state, as a resumed run does .KeyError: 'step'"),
        (NoClosure, "NoClosure is not supported: it cannot make a step"),
        (DeafToClosure, r"DeafToClosure is not supported: its step\(closure\) has to call the closure"),
        (partial(torch.optim.SGD, lr=float("nan")), "lr must be a finite number, got nan"),
    ],
)
def test_an_optimizer_that_breaks_the_contract_is_refused_before_the_policy_is_loaded(policy, make, message):
    module = module_of(policy, make)
    with pytest.raises(UserError, match=message):
        run_steps(module, batches(1))
    assert module.policy is None


def test_muon_trains_the_matrices_of_layers_and_adamw_all_else():
    model = tiny_llama()
    names = {id(p): name for name, p in model.named_parameters()}
    for make in (torch.optim.Muon, MuonWithAdamW):
        optimizer = build_optimizer(make, model)
        assert isinstance(optimizer, MuonWithAdamW)
        by_muon, by_adamw = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        assert by_muon == {n for n in names.values() if "proj" in n}
        assert by_adamw == {n for n in names.values() if "norm" in n or "embed" in n}


def test_muon_makes_the_steps_of_torchs_muon_and_of_adamw():
    model, twin = tiny_llama(), tiny_llama()
    optimizer = build_optimizer(partial(MuonWithAdamW, lr=0.1, adamw_lr=0.01), model)
    matrices = [p for name, p in twin.named_parameters() if "proj" in name]
    others = [p for name, p in twin.named_parameters() if "proj" not in name]
    parts = [
        torch.optim.Muon(matrices, lr=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.0),
    ]
    for step in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        for part in parts:
            part.step()
        if step == 0:  # state that was loaded is the state that is used
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_schedule_moves_both_rates_of_muon(policy):
    module = module_of(
        policy,
        partial(MuonWithAdamW, lr=0.1, adamw_lr=0.01),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    trainer, _ = run_steps(module, batches(2))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.025, 0.0025]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_validation_leaves_every_module_in_the_mode_that_it_was_in(policy, gradient_checkpointing):
    """Policies are scored in eval mode, as they were sampled, or in train mode without dropout."""
    modes = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            modes.append({name: child.training for name, child in module.policy.named_modules()})

    module = module_of(policy, torch.optim.SGD, ns=[1, 4], gradient_checkpointing=gradient_checkpointing)
    fit_with_validation(module, Modes())
    assert len(modes) == 6 and all(mode == modes[0] for mode in modes)
    assert set(modes[0].values()) == {gradient_checkpointing}


# ---------------------------------------------------------------- weights of training and of evaluation


def schedule_free_classes():
    found = [partial(SGDScheduleFree, lr=0.5)]
    if (package := importlib.util.find_spec("schedulefree")) is not None:
        package = importlib.import_module("schedulefree")
        found += [partial(package.SGDScheduleFree, lr=0.5), package.AdamWScheduleFree]
    return found


class Watch(Callback):
    """Weights of the policy as each phase begins, and checkpoints `step=<n>.ckpt`: one in the middle of training, and
    one while a validation ends."""

    def __init__(self, folder=None):
        self.folder = folder
        self.seen = {"train": [], "val": []}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen["train"].append(weights(module))

    def on_train_batch_end(self, trainer, module, *_):
        if self.folder is not None and trainer.global_step == 3:
            trainer.save_checkpoint(self.folder / "train.ckpt")

    def on_validation_start(self, trainer, module):
        self.seen["val"].append(weights(module))

    def on_validation_end(self, trainer, module):
        if self.folder is not None and trainer.global_step == 2:
            trainer.save_checkpoint(self.folder / "val.ckpt")


def fit_with_validation(module, watch, ckpt_path=None, **settings):
    loader = DataLoader(batches(6), batch_size=None)
    trainer = pl.Trainer(
        **{"max_epochs": 1, "val_check_interval": 2, "num_sanity_val_steps": 1, "callbacks": [watch], **settings},
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        enable_progress_bar=False,
    )
    trainer.fit(module, loader, DataLoader(batches(1), batch_size=None), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("make", schedule_free_classes())
def test_schedule_free_trains_one_set_of_weights_and_evaluates_the_other(policy, tmp_path, make):
    module, watch = module_of(policy, make, ns=[1, 4]), Watch(tmp_path)
    trainer = fit_with_validation(module, watch)
    optimizer = trainer.optimizers[0]
    assert [group["train_mode"] for group in optimizer.param_groups] == [False]  # what the run leaves is to be used
    averages = weights(module)
    assert torch.equal(averages, watch.seen["val"][-1]) or torch.allclose(averages, watch.seen["val"][-1], atol=1e-6)
    assert not torch.allclose(watch.seen["val"][1], watch.seen["train"][2], atol=1e-4)  # both after two steps
    module.export(str(tmp_path / "policy"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(torch.cat([p.flatten() for p in exported.parameters()]), averages)


def test_weights_of_evaluation_are_the_average_of_the_steps(policy):
    """Schedule-free SGD: z takes the steps, evaluation sees the mean of all z so far."""
    keep, watch = KeepGradients(), Watch()
    module = module_of(policy, partial(SGDScheduleFree, lr=0.5), ns=[1, 4], gradient_clip_norm=None)
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    fit_with_validation(module, watch, callbacks=[watch, keep])
    z = start - 0.5 * torch.stack(keep.gradients).cumsum(dim=0)
    for validation, steps in zip(watch.seen["val"][1:], (2, 4, 6), strict=True):
        assert torch.allclose(validation, z[:steps].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("name", ["train.ckpt", "val.ckpt"])
@pytest.mark.parametrize("make", schedule_free_classes())
def test_schedule_free_goes_on_exactly_and_its_checkpoint_evaluates_the_average(policy, tmp_path, make, name):
    watch = Watch(tmp_path)
    whole = fit_with_validation(module_of(policy, make, ns=[1, 4]), watch)
    resumed = fit_with_validation(module_of(policy, make, ns=[1, 4]), Watch(), ckpt_path=tmp_path / name)
    assert torch.equal(weights(resumed.lightning_module), weights(whole.lightning_module))
    alone, seen = module_of(policy, make, ns=[1, 4]), Watch()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[seen])
    trainer.validate(alone, DataLoader(batches(1), batch_size=None), ckpt_path=tmp_path / name, verbose=False)
    saved = torch.load(tmp_path / name, weights_only=False)
    if name == "val.ckpt":
        assert torch.equal(seen.seen["val"][0], watch.seen["val"][1])
    else:
        assert not torch.equal(seen.seen["val"][0], watch.seen["train"][3])
        state = saved["evaluation_weights"]
        assert torch.equal(alone.policy.lm_head.weight, state["policy.lm_head.weight"])


@pytest.mark.slow
def test_sharded_weights_make_the_same_steps_or_the_optimizer_is_refused():
    run_ranks(HELPERS / "sharded_optimizers.py")


def test_an_adapters_checkpoint_holds_both_sets_of_its_weights_and_no_frozen_ones(policy, tmp_path):
    pytest.importorskip("peft")
    module = module_of(policy, partial(SGDScheduleFree, lr=0.5), ns=[1, 4], lora=LoRA(rank=2))
    trainer = fit_with_validation(module, Watch(tmp_path))
    saved = torch.load(tmp_path / "train.ckpt", weights_only=False)
    assert saved["evaluation_weights"].keys() == saved["state_dict"].keys()
    assert all("lora" in name for name in saved["state_dict"])
    assert [group["train_mode"] for group in trainer.optimizers[0].param_groups] == [False]
