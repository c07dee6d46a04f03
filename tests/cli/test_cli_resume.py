"""`--ckpt_path last`, and the command to go on that a stopped run prints."""

from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from tealightning.cli.resume import command_to_go_on, last_checkpoint
from tealightning.reliability.checkpoint_files import VerifiedCheckpointIO

SETTINGS = {
    "seed_everything": 0,
    "model": {"class_path": "tealightning.PostTrainingModule", "init_args": {"policy": "p", "lora": None, "ns": [1]}},
    "data": {"init_args": {"batch_size": 8}},
    "rollout": {"group_size": 16},
    "trainer": {"logger": None},
}


def trainer_of(tmp_path, loggers=True):
    logger = [CSVLogger(str(tmp_path), name="runs")] if loggers else []
    return SimpleNamespace(loggers=logger, checkpoint_callbacks=[], default_root_dir=str(tmp_path))


def write(folder, step, settings=SETTINGS):
    path = folder / "checkpoints" / f"step={step:06d}.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"optimizer_states": [], "global_step": step}, path)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return path


def test_the_command_to_go_on_is_the_users_own():
    given = ["fit", "-c", "my run.yaml", "--ckpt_path", "old.ckpt", "--trainer.max_steps=9"]
    expected = "tealightning fit -c 'my run.yaml' --trainer.max_steps=9 --ckpt_path last"
    assert command_to_go_on(given) == expected
    assert command_to_go_on([arg for arg in given if "ckpt" not in arg]) == expected
    assert command_to_go_on(["fit", "--ckpt_path=last", "--import", "a.py"]).endswith(
        "fit --import a.py --ckpt_path last"
    )


def test_the_newest_runs_newest_checkpoint_is_taken(tmp_path):
    write(tmp_path / "runs" / "version_2", 60)
    newest = write(tmp_path / "runs" / "version_10", 40)
    write(tmp_path / "runs" / "version_10", 20)
    (tmp_path / "runs" / "version_11" / "checkpoints").mkdir(parents=True)  # killed before its first one
    assert last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit") == str(newest)


def test_a_damaged_one_is_told_and_passed_over_also_into_the_run_before(tmp_path):
    before = write(tmp_path / "runs" / "version_0", 20)
    damaged = write(tmp_path / "runs" / "version_1", 40)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="version_1.*step=000040.ckpt is damaged and not used: it is truncated"):
        assert last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit") == str(before)


def test_a_live_run_is_refused_before_its_files_are_read(tmp_path):
    """Which it replaces all the time: they would be told to be damaged."""
    write(tmp_path / "runs" / "version_0", 20)
    write(tmp_path / "runs" / "version_1", 40).write_bytes(b"half")

    def refuse(folder):
        raise ValueError(f"{folder.name} lives")

    with pytest.raises(ValueError, match=r"version_1 lives"):
        last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit", refuse)


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    other = SETTINGS | {"rollout": {"group_size": 8}, "trainer": {"max_steps": 1}}
    mine = write(tmp_path / "runs" / "version_0", 20)
    write(tmp_path / "runs" / "version_1", 40, settings=other)
    assert last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit") == str(mine)
    mine.unlink()
    with pytest.raises(ValueError, match=r"version_1/checkpoints is of a run with another rollout\.group_size"):
        last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit")


def test_engine_reward_and_memory_may_change(tmp_path):
    mine = {"model": {"init_args": {"policy": "p", "micro_batch_tokens": None}}, "rollout": {"engine": {"a": 1}}}
    now = {"model": {"init_args": {"policy": "p", "micro_batch_tokens": 512}}, "rollout": {"engine": {"a": 2}}}
    path = write(tmp_path / "runs" / "version_0", 20, settings=SETTINGS | mine)
    assert last_checkpoint(trainer_of(tmp_path), SETTINGS | now, "fit") == str(path)


def test_what_does_not_change_the_policy_may_differ_in_an_evaluation(tmp_path):
    path = write(tmp_path / "runs" / "version_0", 20, settings=SETTINGS | {"rollout": {"group_size": 8}})
    assert last_checkpoint(trainer_of(tmp_path), SETTINGS, "validate") == str(path)


def test_without_any_a_fit_begins_and_an_evaluation_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="there is no checkpoint of this configuration yet, the run starts anew"):
        assert last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit") is None
    with pytest.raises(ValueError, match="there is no checkpoint to use"):
        last_checkpoint(trainer_of(tmp_path), SETTINGS, "test")


def test_if_all_are_damaged_it_is_refused(tmp_path):
    path = write(tmp_path / "runs" / "version_0", 20)
    path.write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"no checkpoint to use.*step=000020.ckpt is damaged"),
    ):
        last_checkpoint(trainer_of(tmp_path), SETTINGS, "fit")


def test_a_given_version_is_the_only_place_and_without_a_logger_it_is_the_root(tmp_path):
    write(tmp_path / "runs" / "version_1", 40)
    named = write(tmp_path / "runs" / "mine", 20)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"version": "mine"}}
    settings = SETTINGS | {"trainer": {"logger": [logger]}}
    assert last_checkpoint(trainer_of(tmp_path), settings, "fit") == str(named)
    rootless = write(tmp_path, 10, settings=None)
    assert last_checkpoint(trainer_of(tmp_path, loggers=False), SETTINGS, "fit") == str(rootless)
