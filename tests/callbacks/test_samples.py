import json
import math

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from module_fixtures import make_batch, make_rollouts
from playground_fits import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tealightning import SampleTable
from tealightning.callbacks.report import table_rows

COLUMNS = ["phase", "step", "prompt_id", "prompt", "completion", "reward", "tokens", "truncated"]


def read(file):
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def test_best_median_and_worst_of_each_prompt():
    batch = make_batch(make_rollouts([[1.0, 5.0, 3.0, 2.0, 4.0], [7.0, 7.0, 7.0, 7.0, 7.0], [0.0] * 5]))
    rows = table_rows(batch, phase="train", step=9, num_prompts=2)
    assert [row["reward"] for row in rows] == [5.0, 3.0, 1.0, 7.0, 7.0, 7.0]
    assert [row["prompt_id"] for row in rows] == ["p0"] * 3 + ["p1"] * 3
    assert list(rows[0]) == COLUMNS and rows[0]["step"] == 9
    assert rows[0]["tokens"] == int(batch.rollouts.completion_lengths[1])


def test_unscorable_completions_come_last_and_are_null():
    rows = table_rows(make_batch(make_rollouts([[math.nan, 1.0, 2.0]])), phase="val", step=0, num_prompts=4)
    assert [row["reward"] for row in rows] == [2.0, 1.0, None]


def test_a_single_completion_is_shown_once():
    assert len(table_rows(make_batch(make_rollouts([[1.0]])), phase="val", step=0, num_prompts=1)) == 1


def test_a_chat_prompt_is_json():
    batch = make_batch(make_rollouts([[1.0, 2.0]]))
    batch.prompts = [[{"role": "user", "content": "Hi"}]]
    assert table_rows(batch, phase="val", step=0, num_prompts=1)[0]["prompt"] == '[{"role": "user", "content": "Hi"}]'


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"num_prompts": 0}])
def test_settings_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        SampleTable(**arguments)


def test_jsonl_has_the_validations_and_every_second_step(playground, tmp_path):
    fit(
        playground,
        steps=3,
        callbacks=[SampleTable(every_n_steps=2, num_prompts=1)],
        logger=CSVLogger(tmp_path, name="", version=""),
        num_sanity_val_steps=-1,
        limit_val_batches=2,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    rows = read(tmp_path / "samples.jsonl")
    shown = list(dict.fromkeys((row["phase"], row["step"]) for row in rows))
    assert shown == [("val", 0), ("train", 1), ("train", 3), ("val", 3)]
    assert all(row["completion"] and 1 <= row["tokens"] <= 12 and math.isfinite(row["reward"]) for row in rows)
    of_step = [row["reward"] for row in rows if row["step"] == 1]
    assert of_step == sorted(of_step, reverse=True)


def test_tensorboard_gets_the_table_as_text(playground, tmp_path):
    fit(
        playground,
        steps=1,
        callbacks=[SampleTable(num_prompts=1)],
        logger=TensorBoardLogger(tmp_path, name="", version="run"),
    )
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (event,) = events.Tensors("samples/train/text_summary")
    (text,) = [value.decode() for value in event.tensor_proto.string_val]
    assert text.startswith("| prompt | completion | reward |\n|---|---|---|\n")
    (row, *_) = read(tmp_path / "run" / "samples.jsonl")
    assert str(row["reward"]) in text


def test_wandb_gets_the_table_and_the_run_has_a_folder_of_its_own(playground, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    folders = []
    for version in ("first", "second"):
        logger = WandbLogger(project="samples", save_dir=tmp_path, version=version)
        fit(playground, steps=1, callbacks=[SampleTable(num_prompts=1)], logger=logger)
        (table,) = (tmp_path / "wandb" / f"{logger.experiment.dir}").glob("media/table/samples/train_*.table.json")
        stored = json.loads(table.read_text())
        wandb.finish()
        folders.append(tmp_path / "samples" / version)
        (row, *_) = read(folders[-1] / "samples.jsonl")
        assert stored["columns"] == COLUMNS
        assert stored["data"][0] == list(row.values())
    assert all(len(read(folder / "samples.jsonl")) == 3 for folder in folders)
