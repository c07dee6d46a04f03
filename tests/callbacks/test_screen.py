"""What a run leaves on the screen: the bar says how far it is and ends before results are printed."""

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import rich
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar, RichProgressBar, TQDMProgressBar
from module_fixtures import make_batch, make_rollouts, save_tiny_policy
from torch.utils.data import DataLoader

from tealightning import ExportPolicy, PostTrainingModule
from tealightning.callbacks.screen import RunProgressBar, RunSummary
from tealightning.cli.console import log_to_current_stderr
from tealightning.cli.training import build_training
from tealightning.estimators import build_estimator

MARK = "results are here"


class Results(Callback):
    """Prints when fit ends, as reports do."""

    def __init__(self, screen):
        self.screen = screen

    def on_fit_end(self, trainer, pl_module):
        print(MARK, file=self.screen)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def screen():
    """All that goes to a terminal of 80 columns."""
    yield io.StringIO()
    rich.reconfigure()


def bar_on(screen, kind=RunProgressBar):
    return kind(console_kwargs={"file": screen, "force_terminal": True, "width": 80})


def trainer_of(callbacks, tmp_path, **kwargs):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=callbacks, enable_model_summary=False, **settings, **kwargs)


def module_of(policy):
    return PostTrainingModule(policy, build_estimator("mean_reward"), ns=[1, 2])


def batches():
    return DataLoader([make_batch(make_rollouts([[2.0, 1.0], [0.0, 1.0]], seed=i)) for i in range(3)], batch_size=None)


def after_the_mark(text):
    return text[text.index(MARK) :]


@pytest.mark.parametrize("max_epochs", [-1, 5])
def test_the_bar_counts_steps_and_no_epochs_that_are_not_there(policy, screen, tmp_path, max_epochs):
    """Lightning shows `Epoch 0/-2` for a run that only its steps end."""
    trainer = trainer_of([bar_on(screen)], tmp_path, max_epochs=max_epochs, max_steps=5)
    trainer.fit(module_of(policy), batches())
    text = screen.getvalue()
    assert "step: 5/5" in text and "/-2" not in text and "v_num" not in text
    assert ("Epoch 1/4" in text) == (max_epochs == 5) and "Epoch 1" in text


@pytest.mark.parametrize("kind", [RunProgressBar, RichProgressBar])
def test_nothing_of_the_bar_stands_below_the_trained_policy(policy, screen, tmp_path, kind):
    trainer = trainer_of([ExportPolicy(), Results(screen), bar_on(screen, kind)], tmp_path, max_epochs=1)
    trainer.fit(module_of(policy), batches())
    assert "Epoch 0" in screen.getvalue()
    assert after_the_mark(screen.getvalue()).strip("\n") == MARK


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_stand_below_the_bar_of_an_evaluation(policy, screen, tmp_path, stage):
    trainer = trainer_of([bar_on(screen)], tmp_path)
    getattr(trainer, stage)(module_of(policy), batches())
    text = screen.getvalue()
    table = text.index(f"{stage.capitalize()} metric")
    assert "3/3" in text[:table] and "3/3" not in text[table:] and "\x1b[1A" not in text[table:]


def test_a_stopped_bar_starts_again_for_the_next_stage(policy, screen, tmp_path):
    trainer = trainer_of([bar_on(screen), Results(screen)], tmp_path, max_epochs=1)
    module = module_of(policy)
    trainer.fit(module, batches())
    trainer.validate(module, batches(), verbose=False)
    assert "Validation" in after_the_mark(screen.getvalue())


def test_an_error_stands_below_the_bar(policy, screen, tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise KeyError("mine")

    with pytest.raises(KeyError):
        trainer_of([bar_on(screen), Broken()], tmp_path, max_epochs=1).fit(module_of(policy), batches())
    assert "2/3" in screen.getvalue()
    assert screen.getvalue().endswith("\n\x1b[?25h")  # the cursor is back, at the start of a line


def test_a_file_gets_one_line_of_the_bar(policy, screen, tmp_path):
    bar = RunProgressBar(console_kwargs={"file": screen, "force_terminal": False, "width": 80})
    trainer_of([bar, Results(screen)], tmp_path, max_epochs=-1, max_steps=6).fit(module_of(policy), batches())
    assert screen.getvalue().count("━ ") == 1 and screen.getvalue().endswith(f"\n{MARK}\n")


def test_the_model_is_told_in_a_line_without_flops(policy, tmp_path, caplog):
    module = module_of(policy)
    module.configure_model()
    for parameter in module.policy.lm_head.parameters():
        parameter.requires_grad = False
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        RunSummary().on_fit_start(trainer_of([], tmp_path, enable_progress_bar=False), module)
    assert [r.message for r in caplog.records if "Model" in r.message] == [
        "Model: policy LlamaForCausalLM, 4.4 K of 4.9 K parameters trained"
    ]


@pytest.mark.parametrize(
    ("settings", "bars"),
    [
        ([], [RunProgressBar]),
        (["--trainer.enable_progress_bar=false"], []),
        (["--trainer.callbacks+=TQDMProgressBar"], [TQDMProgressBar]),
        (["--trainer.callbacks+=RichProgressBar"], [RichProgressBar]),
    ],
)
def test_the_users_choice_of_a_bar_holds(playground, tmp_path, settings, bars):
    args = ["-c", str(tmp_path / "config.yaml"), *settings]
    (tmp_path / "config.yaml").write_text(CONFIG.format(playground=playground))
    callbacks = build_training("fit", args).trainer.callbacks
    assert [type(callback) for callback in callbacks if isinstance(callback, ProgressBar)] == bars
    assert [type(callback) for callback in callbacks if isinstance(callback, ModelSummary)] == [RunSummary]


CONFIG = """
model: {{class_path: tealightning.PostTrainingModule, init_args: {{policy: "{playground}/policy", estimator: grpo}}}}
data: {{class_path: tealightning.PromptDataModule, init_args: {{train: "{playground}/prompts/train.jsonl"}}}}
rollout:
  engine: transformers_engine
  reward: {{class_path: SequenceClassifierReward, init_args: {{model: "{playground}/reward_model"}}}}
trainer: {{logger: false, accelerator: cpu}}
"""


def test_what_libraries_log_goes_above_the_bar(monkeypatch):
    """A progress bar replaces `sys.stderr`; handlers of libraries kept the one from when they were imported."""
    old, new = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", old)
    handler = logging.StreamHandler()
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        log_to_current_stderr()
        monkeypatch.setattr(sys, "stderr", new)
        logger.error("a line")
    finally:
        logger.removeHandler(handler)
    assert "a line" in new.getvalue() and old.getvalue() == ""


@pytest.mark.slow
def test_last_lines_on_a_terminal(playground, tmp_path):
    """`fit` on a pseudo terminal: the report is whole, and nothing but the exported policy comes after it."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(playground=playground).replace("logger: false, ", ""))
    settings = {
        "data.val": f"{playground}/prompts/val.jsonl",
        "model.ns": [1, 2],
        "rollout.group_size": 4,
        "rollout.sampling.max_new_tokens": 4,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.max_epochs": -1,
        "trainer.num_sanity_val_steps": -1,
        "trainer.limit_val_batches": 1,
        "trainer.default_root_dir": tmp_path,
    }
    callbacks = "--trainer.callbacks=[{class_path: BestOfNReport}, {class_path: ExportPolicy}]"
    command = [sys.executable, "-m", "tealightning", "fit", "-c", config, callbacks]
    command += [f"--{name}={value}" for name, value in settings.items()]
    terminal, end = pty.openpty()
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        output = b""
        with contextlib.suppress(OSError):  # what Linux raises when the other end has been closed
            while part := os.read(terminal, 4096):
                output += part
    lines = [line.rstrip() for line in output.decode().split("\r\n")]
    folder = tmp_path / "lightning_logs" / "version_0"
    assert process.returncode == 0
    assert lines[-5:] == [
        "",
        f"Table: {folder}/best_of_n.md",
        f"Curve: {folder}/best_of_n.png",
        f"Trained policy: {folder}/policy",
        "",
    ]
    assert sum("Total FLOPs" in line or "/-2" in line for line in lines) == 0
    (start,) = (i for i, line in enumerate(lines) if line.startswith("Best-of-n reward"))
    assert not any("━" in line or "\x1b" in line for line in lines[start:])
