"""docs/metrics.md lists what is logged, and nothing else."""

import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from playground_fits import data_of, module_of, rollout_of, trainer_of

from tealightning import Budget, HealthChecks, PolicyGradientLoss

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
# Logged only when some samples are unscorable or missing, with steps_ahead=1, with loss.importance_cap, and by rewards
# that count their failures; they have tests of their own.
SOMETIMES = {"best_of_{n}_prompts", "rollout/wait_seconds", "rollout/staleness", "train/importance_clip_fraction"} | {
    f"reward_{{name}}_{count}" for count in ("unscored", "errors", "timeouts", "crashes", "retries")
}


def documented() -> set[str]:
    tables = re.findall(r"^\| key \|.*?\n\n", PAGE.read_text() + "\n\n", re.MULTILINE | re.DOTALL)
    return {key for table in tables for key in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)}


def name_in_page(key: str) -> str:
    key = re.sub(r"best_of_\d+", "best_of_{n}", key)
    key = re.sub(r"reward_sequence_classifier_mean$", "reward_{name}_mean", key)
    short = re.sub(r"^(val|test|rollout)/", "", key)
    return short if short in documented() else key


@pytest.fixture(scope="module")
def logged(playground, tmp_path_factory):
    """The columns of metrics.csv after two training steps with validation, and a test."""
    folder = tmp_path_factory.mktemp("metrics")
    logger = CSVLogger(folder, name="", version="")
    settings = {"limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": 2, "log_every_n_steps": 1}
    trainer = trainer_of(
        rollout_of(playground),
        Budget(),
        HealthChecks(),
        max_steps=2,
        logger=logger,
        check_val_every_n_epoch=None,
        **settings,
    )
    module = module_of(playground, loss=PolicyGradientLoss(kl_coef=0.1), ns=[1, 4, 32], extrapolate_ns=[64])
    data = data_of(playground)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return set((folder / "metrics.csv").read_text().splitlines()[0].split(","))


def test_every_logged_key_is_in_the_page(logged):
    missing = {key for key in logged - {"epoch", "step"} if name_in_page(key) not in documented()}
    assert missing == set()


def test_every_key_of_the_page_is_logged(logged):
    assert documented() - {name_in_page(key) for key in logged} == SOMETIMES


@pytest.mark.parametrize("phase", ["rollout", "val", "test"])
def test_completions_are_described_in_every_phase(logged, phase):
    assert {f"{phase}/reward_mean", f"{phase}/completion_length_max", f"{phase}/zero_variance_groups"} <= logged
