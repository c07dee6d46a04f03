"""Pools of rollouts: from batches and files of rewards, in halves and groups."""

import json

import pytest
import torch
from module_fixtures import make_batch, make_rollouts

from tealightning.diagnostics.pool import (
    Groups,
    Half,
    RolloutPool,
    half_size,
    pool_of,
    read_rewards,
    split_halves,
    write_rewards,
)
from tealightning.estimators import build_estimator
from tealightning.functional.max_at_k import max_at_k_loo_weights

NAN = float("nan")


def test_pool_of_joins_batches_in_order():
    first, second = make_rollouts([[1.0, 2.0]]), make_rollouts([[3.0, float("nan")], [5.0, 6.0]])
    pool = pool_of([make_batch(first), make_batch(second, first_id=1)])
    assert pool.ids == ["p0", "p1", "p2"]
    assert pool.rewards[:, 0].tolist() == [1.0, 3.0, 5.0]
    assert pool.rewards.isfinite().tolist() == [[True, True], [True, False], [True, True]]
    assert [len(batch.rewards) for batch in pool.batches] == [1, 2]


def test_write_rewards_has_a_line_a_prompt_and_null_for_unscorable(tmp_path):
    pool = RolloutPool(ids=["a", "b"], rewards=torch.tensor([[0.1, float("nan")], [2.0, 3.0]], dtype=torch.float64))
    write_rewards(tmp_path / "rewards.jsonl", pool)
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert lines == [{"id": "a", "rewards": [0.1, None]}, {"id": "b", "rewards": [2.0, 3.0]}]


# ---------------------------------------------------------------- files of rewards


def test_json_lines_with_ids_keys_or_neither(tmp_path):
    file = tmp_path / "rewards.jsonl"
    lines = [
        '{"id": "a", "rewards": [1, 2.5, null]}',
        "",
        '{"key": 7, "rewards": [3]}',
        '{"rewards": [NaN, 4]}',
        '{"id": "a", "rewards": [9]}',
    ]
    file.write_text("\n".join(lines))
    pool = read_rewards(file)
    assert pool.ids == ["a", "7", "line 4"]
    expected = torch.tensor([[1, 2.5, NAN, 9], [3, NAN, NAN, NAN], [NAN, 4, NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(pool.rewards, expected, equal_nan=True)


def test_csv_with_a_sample_a_line(tmp_path):
    file = tmp_path / "rewards.csv"
    file.write_text('prompt_id,reward,text\na,1.5,x\n"b, c",-2e-3,y\na,,z\n')
    pool = read_rewards(file)
    assert pool.ids == ["a", "b, c"]
    expected = torch.tensor([[1.5, NAN], [-2e-3, NAN]], dtype=torch.float64)
    torch.testing.assert_close(pool.rewards, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "r.jsonl",
            '{"rewards": [1]}\n{"rewards": [1, "two"]}\n',
            r"r\.jsonl, line 2: a reward is a number.*got 'two'",
        ),
        ("r.jsonl", '{"rewards": [1, true]}', r"line 1: a reward is a number.*got True"),
        ("r.jsonl", '{"rewards": [1]}\n\n{"rewards": 1}', r'line 3: expected \{"rewards": \[numbers\]\}'),
        ("r.jsonl", "[1, 2]", r"line 1: expected"),
        ("r.jsonl", '{"rewards": [1]', r"line 1: this is not JSON"),
        ("r.jsonl", "", r"r\.jsonl: there are no rewards in it"),
        ("r.csv", "prompt,reward\na,1\n", r"r\.csv, line 1: expected columns prompt_id and reward, got \['prompt'"),
        ("r.csv", "prompt_id,reward\na,1\nb,high\n", r"r\.csv, line 3: a reward is a number.*got 'high'"),
        ("r.csv", "prompt_id,reward\na\n", r"line 2: expected 2 columns"),
        ("r.csv", "prompt_id,reward\n", r"there are no rewards in it"),
    ],
)
def test_what_is_no_file_of_rewards_names_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rewards(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        read_rewards(tmp_path / "nowhere.jsonl")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"r\.jsonl: this is not UTF-8 text"):
        read_rewards(tmp_path / "r.jsonl")


# ---------------------------------------------------------------- halves and groups


def random_pool(seed: int, *, prompts: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [Q, M] and scores [Q, M, 10]."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, size, generator=generator, dtype=torch.float64)
    return rewards, torch.randn(prompts, size, 10, generator=generator, dtype=torch.float64)


def test_halves_are_disjoint_and_leave_out_what_could_not_be_scored():
    rewards = torch.tensor([[0.0, float("nan"), 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    scores = torch.arange(6.0).expand(2, 6)[..., None]
    assert half_size(rewards, smallest=2) == 2
    orders = set()
    for seed in range(20):
        halves = split_halves(rewards, scores, 2, torch.Generator().manual_seed(seed))
        members = torch.cat([half.rewards for half in halves], dim=1)
        assert all(len(set(row.tolist())) == 4 for row in members) and members.isfinite().all()
        assert all(torch.equal(half.scores[..., 0].double(), half.rewards) for half in halves)
        orders.add(tuple(members.flatten().tolist()))
    assert len(orders) > 10
    with pytest.raises(ValueError, match=r"halves of 3 scored rollouts .* got 2: raise --pool to 6"):
        half_size(rewards, smallest=3)


def test_groups_are_neighbours_and_their_gradients_weighted_means_of_scores():
    rewards, scores = random_pool(5, prompts=2, size=13)
    groups = Groups(Half(rewards=rewards, scores=scores), 4)
    gradients = groups.gradients(groups.weights(build_estimator("max_at_k", k=2)))
    assert gradients.shape == (2, 3, 10)
    weights = max_at_k_loo_weights(rewards[1, 8:12][None], 2)[0]
    assert torch.allclose(gradients[1, 2], (weights[:, None] * scores[1, 8:12]).mean(dim=0))


def test_mean_and_noise_are_those_of_the_groups_gradients():
    rewards, scores = random_pool(6, prompts=3, size=21)
    half = Half(rewards=rewards, scores=scores)
    groups = Groups(half, 5)
    weights = groups.weights(build_estimator("grpo"))
    assert weights.shape == (3, 4, 5)
    gradients = groups.gradients(weights)
    mean, noise = groups.mean_and_noise(weights)
    assert torch.allclose(mean, gradients.mean(dim=1))
    assert torch.allclose(noise, gradients.var(dim=1).sum(dim=-1))
    alone = Groups(half, 20)
    assert alone.mean_and_noise(alone.weights(build_estimator("grpo")))[1].isnan().all()


def test_gradients_of_many_coordinates_are_thinned():
    half = Half(rewards=torch.rand(2, 8).double(), scores=torch.rand(2, 8, 2500))
    groups = Groups(half, 4)
    assert half.stride == 3
    assert groups.gradients(groups.weights(build_estimator("grpo"))).shape == (2, 2, 834)
