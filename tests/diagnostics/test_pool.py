"""Pools of rollouts: from batches, and from the arguments of a config."""

import json

import pytest
import torch
from command_line import run
from module_fixtures import make_batch, make_rollouts
from run_records import quickstart_args

from tealightning.cli.policy_pool import collect_pool
from tealightning.diagnostics.pool import RolloutPool, pool_of, write_rewards
from tealightning.errors import UserError
from tealightning.training.micro_batches import score_completions

ENGINE = "--rollout.engine=transformers_engine"


@pytest.fixture(scope="module")
def collected(playground, tmp_path_factory):
    """The settings, and (module, pool) of three prompts with six rollouts each."""
    args = [*quickstart_args("validate", playground, tmp_path_factory.mktemp("pool"))[1:], ENGINE]
    return args, collect_pool(args, num_prompts=3, num_samples=6)


def test_pool_of_joins_batches_in_order():
    first, second = make_rollouts([[1.0, 2.0]]), make_rollouts([[3.0, float("nan")], [5.0, 6.0]])
    pool = pool_of([make_batch(first), make_batch(second, first_id=1)])
    assert pool.ids == ["p0", "p1", "p2"]
    assert pool.rewards[:, 0].tolist() == [1.0, 3.0, 5.0]
    assert pool.valid.tolist() == [[True, True], [True, False], [True, True]]
    assert [len(batch.rewards) for batch in pool.batches] == [1, 2]


@pytest.mark.parametrize("batches", [[], [make_batch(make_rollouts([[1.0]])), make_batch(make_rollouts([[1.0, 2.0]]))]])
def test_pool_of_refuses_nothing_and_different_sizes(batches):
    with pytest.raises(ValueError, match="same number of rollouts a prompt"):
        pool_of(batches)


def test_write_rewards_has_a_line_a_prompt_and_null_for_unscorable(tmp_path):
    pool = RolloutPool(ids=["a", "b"], rewards=torch.tensor([[0.1, float("nan")], [2.0, 3.0]], dtype=torch.float64))
    write_rewards(tmp_path / "rewards.jsonl", pool)
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert lines == [{"id": "a", "rewards": [0.1, None]}, {"id": "b", "rewards": [2.0, 3.0]}]


def test_collect_pool_has_the_first_prompts_of_the_split(collected, playground):
    _, (_, pool) = collected
    lines = (playground / "prompts" / "val.jsonl").read_text().splitlines()[:3]
    assert pool.ids == [json.loads(line)["id"] for line in lines]
    assert pool.rewards.shape == (3, 6)
    assert pool.valid.all()


def test_collect_pool_keeps_the_rollouts_behind_the_rewards(collected):
    """The module's policy gives the kept tokens the log-probs that they were sampled with."""
    _, (module, pool) = collected
    assert torch.equal(torch.cat([batch.rewards for batch in pool.batches]), pool.rewards)
    for batch in pool.batches:
        scores = score_completions(module.policy, batch, torch.arange(len(batch.completion_ids)))
        assert torch.allclose(scores.log_probs, batch.rollout_log_probs[:, : scores.log_probs.shape[1]], atol=1e-4)


def test_collect_pool_samples_what_validation_does(collected, tmp_path):
    """A seed and a prompt's id decide its samples: a smaller pool is the beginning of a larger one."""
    args, (_, pool) = collected
    _, smaller = collect_pool(args, num_prompts=2, num_samples=4)
    assert torch.allclose(smaller.rewards, pool.rewards[:2, :4], atol=1e-4)


def test_collect_pool_takes_the_test_split(collected):
    args, _ = collected
    _, pool = collect_pool(args, num_prompts=1, num_samples=2, split="test")
    assert pool.ids == ["test-0000"]


def test_collect_pool_refuses_more_prompts_than_there_are(collected):
    args, _ = collected
    with pytest.raises(ValueError, match=r"data\.val has 16 prompts, and 17 were asked for"):
        collect_pool(args, num_prompts=17, num_samples=2)


def test_collect_pool_refuses_several_devices(collected):
    args, _ = collected
    with pytest.raises(ValueError, match="a pool is collected on one device, got 2"):
        collect_pool([*args, "--trainer.devices=2", "--trainer.strategy=ddp"], num_prompts=1, num_samples=2)


def test_collect_pool_tells_of_a_mistyped_setting_like_any_command(collected):
    args, _ = collected
    with pytest.raises(
        UserError, match=r"Unknown setting 'rollout\.grup_size'\. Did you mean 'group_size'\?"
    ) as raised:
        collect_pool([*args, "--rollout.grup_size=4"], num_prompts=1, num_samples=2)
    assert run("validate", *args, "--rollout.grup_size=4").err == f"tealightning: error: {raised.value}\n"
