import csv
import json
import logging
import sys

import pytest
import torch
from command_line import overlay, run
from playground_fits import data_of, fit, module_of, rollout_of, trainer_of
from run_records import metrics_of, quickstart_args

from tealightning import BestOfNReport
from tealightning.callbacks.report import reward_lines
from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.types import Evaluation

VALIDATION = {"num_sanity_val_steps": -1, "limit_val_batches": 2, "check_val_every_n_epoch": None}


def evaluation(step, values):
    """Two samples a prompt with these values of best-of-1 and best-of-2."""
    rewards = torch.tensor([[2 * one - two, two] for one, two in values], dtype=torch.float64)
    return Evaluation(step=step, keys=torch.arange(len(values)), rewards=rewards)


def test_difference_is_paired_over_prompts():
    """Prompts differ by 10 and every one gains 1 at n = 2: the error of the gain is 0, those of the levels are not."""
    report = BestOfNReport()
    report.before = evaluation(0, [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]])
    report.after = evaluation(5, [[1.0, 2.0], [10.0, 12.0], [22.0, 22.0]])
    one, two = report.rows([1, 2])
    assert (one["n"], one["before"], one["after"], one["difference"]) == (1, 10.0, 11.0, 1.0)
    assert one["difference_se"] == pytest.approx((1 / 3) ** 0.5)  # gains 1, 0, 2: variance 1 over 3 prompts
    assert (two["before"], two["after"], two["difference"], two["difference_se"]) == (11.0, 12.0, 1.0, 0.0)
    assert two["before_se"] == pytest.approx(10 / 3**0.5)
    assert "|    2 | 11.000 ± 5.774  | 12.000 ± 5.774  | 1.000 ± 0.000   |" in report.table([1, 2])


def test_state_survives_a_checkpoint(tmp_path):
    report, copy = BestOfNReport(), BestOfNReport()
    report.before = evaluation(3, [[1.0, 2.0]])
    torch.save(report.state_dict(), tmp_path / "state")
    copy.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert copy.before is not None and copy.after is None
    assert copy.before.step == 3 and copy.before.rewards.tolist() == [[0.0, 2.0]]
    older = {"before": {"step": 4, "keys": torch.tensor([1]), "values": torch.ones(1, 1), "rewards": torch.ones(1, 2)}}
    copy.load_state_dict(older | {"after": None})
    assert copy.before.step == 4 and copy.after is None


def test_before_is_the_sanity_check_and_after_the_last_validation(playground, tmp_path):
    report = BestOfNReport()
    trainer, record = fit(
        playground, steps=4, callbacks=[report], val_check_interval=2, default_root_dir=tmp_path, **VALIDATION
    )
    assert (report.before.step, report.after.step) == (0, 4)
    assert not report.is_behind(trainer.global_step)
    assert len(report.before.keys) == 8  # two batches of four prompts
    assert torch.equal(report.before.keys, report.after.keys)
    first, _, last = [validation["metrics"] for validation in record.validations]
    assert best_of_n(report.before.rewards, [4]).mean() == pytest.approx(first["val/best_of_4"])
    assert best_of_n(report.after.rewards, [4]).mean() == pytest.approx(last["val/best_of_4"])


def test_files_hold_the_rows(playground, tmp_path):
    report = BestOfNReport()
    fit(playground, steps=1, callbacks=[report], val_check_interval=1, default_root_dir=tmp_path, **VALIDATION)
    with (tmp_path / "best_of_n.csv").open() as file:
        written = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert written == report.rows([1, 4])
    assert (tmp_path / "best_of_n.md").read_text() == report.table([1, 4]) + "\n"
    assert (tmp_path / "best_of_n.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_rewards_are_written_a_line_a_prompt(playground, tmp_path):
    report = BestOfNReport()
    fit(playground, steps=1, callbacks=[report], val_check_interval=1, default_root_dir=tmp_path, **VALIDATION)
    for name, evaluation_ in (("before", report.before), ("after", report.after)):
        lines = [json.loads(line) for line in (tmp_path / f"rewards_{name}.jsonl").read_text().splitlines()]
        assert [line["key"] for line in lines] == evaluation_.keys.tolist()
        rewards = torch.tensor([line["rewards"] for line in lines], dtype=torch.float64)
        assert rewards.shape == (8, 4)
        assert torch.equal(rewards, evaluation_.rewards)


def test_unscorable_samples_are_not_in_the_rewards_file(tmp_path):
    rewards = torch.tensor([[1.5, float("nan"), -2.0], [0.1, 3.0, 4.0]], dtype=torch.float64)
    written = Evaluation(step=0, keys=torch.tensor([2**62, 7]), rewards=rewards)
    (tmp_path / "rewards.jsonl").write_text(reward_lines(written))
    assert (tmp_path / "rewards.jsonl").read_text().splitlines() == [
        '{"key": 4611686018427387904, "rewards": [1.5, -2.0]}',
        '{"key": 7, "rewards": [0.1, 3.0, 4.0]}',
    ]


def test_a_resumed_run_keeps_the_evaluation_before_training(playground, tmp_path):
    settings = {"val_check_interval": 1, "default_root_dir": tmp_path, **VALIDATION}
    first, second = BestOfNReport(), BestOfNReport()
    trainer, _ = fit(playground, steps=1, callbacks=[first], **settings)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(playground, steps=2, callbacks=[second], ckpt_path=str(tmp_path / "last.ckpt"), **settings)
    assert (second.before.step, second.after.step) == (0, 2)
    assert torch.equal(second.before.rewards, first.before.rewards)


def test_without_an_evaluation_before_training_there_is_a_hint_and_no_difference(playground, tmp_path):
    """A sanity check of a few batches is no evaluation; after one validation there is nothing to compare with."""
    report = BestOfNReport()
    settings = VALIDATION | {"num_sanity_val_steps": 1, "val_check_interval": 1, "default_root_dir": tmp_path}
    trainer, _ = fit(playground, steps=1, callbacks=[report], **settings)
    assert (report.before.step, report.after) == (1, None)
    with pytest.warns(UserWarning, match=r"set trainer\.num_sanity_val_steps=-1 to evaluate before training"):
        report.show(trainer, trainer.lightning_module)
    assert "difference" not in (tmp_path / "best_of_n.md").read_text()


def test_validation_alone_writes_nothing(playground, tmp_path):
    report = BestOfNReport()
    trainer = trainer_of(rollout_of(playground), report, limit_val_batches=1, default_root_dir=tmp_path)
    trainer.validate(module_of(playground), datamodule=data_of(playground), verbose=False)
    assert "val/best_of_4" in metrics_of(trainer)
    assert list(tmp_path.iterdir()) == []


def test_command_line_completes_a_report_that_is_behind(playground, tmp_path, caplog):
    """Three steps, validation after the second: the command validates once more at the end."""
    args = quickstart_args("fit", playground, tmp_path, max_steps=3, val_check_interval=2, **dict(VALIDATION))
    callbacks = {"trainer": {"callbacks": [{"class_path": "tealightning.BestOfNReport"}]}}
    with caplog.at_level(logging.INFO):
        result = run(
            *args,
            *("-c", overlay(tmp_path, callbacks, "callbacks.yaml")),
            *("--rollout.engine=transformers_engine", "--trainer.check_val_every_n_epoch=null"),
        )
    assert result.status == 0, result.err
    (told,) = [r.getMessage() for r in caplog.records if "Best-of-n reward" in r.getMessage()]
    assert "on 8 validation prompts, 4 samples each, before training (step 0) and after (step 3)" in told
    table = (tmp_path / "best_of_n.md").read_text()
    assert table.strip() in told
    assert f"Curve: {tmp_path}/best_of_n.png" in told


def test_a_single_validation_at_the_end_is_after_and_has_no_difference(playground, tmp_path, caplog):
    args = quickstart_args("fit", playground, tmp_path, max_steps=2, **VALIDATION | {"num_sanity_val_steps": 0})
    callbacks = {"trainer": {"callbacks": [{"class_path": "tealightning.BestOfNReport"}]}}
    with caplog.at_level(logging.INFO):
        result = run(
            *args,
            *("-c", overlay(tmp_path, callbacks, "callbacks.yaml"), "--trainer.val_check_interval=2"),
            *("--rollout.engine=transformers_engine", "--trainer.check_val_every_n_epoch=null"),
        )
    assert result.status == 0, result.err
    (told,) = [r.getMessage() for r in caplog.records if "Best-of-n reward" in r.getMessage()]
    assert "on 8 validation prompts, 4 samples each, after training (step 2); ±" in told
    assert (tmp_path / "best_of_n.csv").read_text().splitlines()[0] == "n,after,after_se"
    assert "before" not in told and "difference" not in told
    assert {f.name for f in tmp_path.glob("rewards_*")} == {"rewards_after.jsonl"}


def test_a_single_evaluation_before_any_step_is_before():
    report = BestOfNReport()
    report.before = evaluation(0, [[1.0, 2.0], [3.0, 4.0]])
    assert [set(row) for row in report.rows([1])] == [{"n", "before", "before_se"}]
    assert report.table([1]).splitlines()[-1] == "|    1 | 2.000 ± 1.000   |"
    assert report.is_behind(1) and not report.is_behind(0)


def test_a_second_evaluation_of_the_same_step_is_no_comparison(playground, tmp_path):
    report = BestOfNReport()
    trainer, _ = fit(
        playground, steps=1, callbacks=[report], val_check_interval=1, default_root_dir=tmp_path, **VALIDATION
    )
    report.before, report.after = report.after, None
    trainer.validate(trainer.lightning_module, datamodule=data_of(playground), verbose=False)
    assert report.before.step == 1 and report.after is None and set(report.evaluations) == {"after"}


def test_without_matplotlib_it_is_refused_at_the_start(playground, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        fit(playground, steps=1, callbacks=[BestOfNReport()], default_root_dir=tmp_path)
