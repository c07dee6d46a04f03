import numpy as np
import torch

from tealightning.ablation.evaluations import common_prompts, read_evaluations, read_training
from tealightning.callbacks.evaluation_record import save_arrays


def write(folder, name, keys):
    """An evaluation in which prompt `key` has the rewards key and key + 1/2, and the KL 10 key."""
    keys = np.array(keys)
    arrays = {"keys": keys, "rewards": np.stack([keys, keys + 0.5], axis=1), "kl": 10.0 * keys}
    arrays["truncated"] = np.zeros((len(keys), 2), dtype=bool)
    save_arrays(folder / "evaluations" / f"{name}.npz", arrays)


def test_evaluations_of_a_split_come_by_step(tmp_path):
    for step in (1_000_000, 20, 3):
        write(tmp_path, f"val_{step:06d}", [1])
    write(tmp_path, "test_000020", [1])
    (tmp_path / "evaluations" / ".val_000004.npz.77").write_bytes(b"half a file")
    assert [e.step for e in read_evaluations(tmp_path, "val")] == [3, 20, 1_000_000]
    assert [e.step for e in read_evaluations(tmp_path, "test")] == [20]
    assert read_evaluations(tmp_path / "nowhere", "val") == []


def test_files_of_several_ranks_are_joined_and_a_prompt_counts_once(tmp_path):
    write(tmp_path, "val_000005", [7, 2])
    write(tmp_path, "val_000005.rank1", [4, 7])  # ranks repeat prompts to get equally many
    (evaluation,) = read_evaluations(tmp_path, "val")
    assert evaluation.keys.tolist() == [2, 4, 7]
    assert evaluation.rewards.tolist() == [[2.0, 2.5], [4.0, 4.5], [7.0, 7.5]]
    assert evaluation.columns["kl"].tolist() == [20.0, 40.0, 70.0]
    assert evaluation.columns["truncated"].tolist() == [[0.0, 0.0]] * 3
    assert set(evaluation.columns) == {"kl", "truncated"}


def test_common_prompts_are_found_in_every_evaluation(tmp_path):
    for step, keys in enumerate([[5, 1, 3], [3, 9, 5], [2, 3, 5, 7]]):
        write(tmp_path, f"val_{step:06d}", keys)
    evaluations = read_evaluations(tmp_path, "val")
    keys = common_prompts(evaluations)
    assert keys.tolist() == [3, 5]
    for evaluation in evaluations:
        common = evaluation.on(keys)
        assert torch.equal(common.rewards[:, 0], torch.tensor([3.0, 5.0]).double())
        assert common.columns["kl"].tolist() == [30.0, 50.0]


def test_training_metrics_are_the_rows_with_a_rollout_step(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,rollout/reward_mean,rollout/step,step,train/kl,val/best_of_1\n"
        "0,,,0,,9.0\n"
        "0,0.5,1.0,0,,\n"
        "0,,,1,,9.5\n"
        "0,1.5,2.0,1,0.25,\n"
    )
    found = read_training(tmp_path)
    assert set(found) == {"rollout/reward_mean", "rollout/step", "train/kl"}
    assert found["rollout/step"].tolist() == [1.0, 2.0]
    assert found["rollout/reward_mean"].tolist() == [0.5, 1.5]
    np.testing.assert_array_equal(found["train/kl"], [np.nan, 0.25])


def test_a_step_that_was_repeated_after_a_checkpoint_counts_once(tmp_path):
    (tmp_path / "metrics_000.csv").write_text("rollout/step,train/entropy\n1.0,10\n2.0,20\n3.0,30\n")
    (tmp_path / "metrics_001.csv").write_text("rollout/step,train/entropy\n3.0,31\n4.0,40\n")
    (tmp_path / "metrics.csv").write_text("rollout/step,train/entropy,train/kl\n4.0,41,0.5\n5.0,50,0.6\n")
    found = read_training(tmp_path)
    assert found["train/entropy"].tolist() == [10.0, 20.0, 31.0, 41.0, 50.0]
    np.testing.assert_array_equal(found["train/kl"], [np.nan, np.nan, np.nan, 0.5, 0.6])


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_training(tmp_path) == {}
