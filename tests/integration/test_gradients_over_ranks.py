"""Two real ranks, each with its share of a batch, take the step that one process takes on the whole batch."""

import json
from pathlib import Path

import collective_counts
import gradient_cases
import pytest
import torch
from gradient_cases import CASES, train
from ranks import run_ranks
from tiny_policies import save_policy

SAME_ON_ALL_RANKS = [  # and the same as in one process
    "train/policy_loss",
    "train/clip_fraction",
    "train/entropy",
    "train/grad_norm",
    "rollout/log_prob_abs_diff_mean",
    "rollout/log_prob_abs_diff_max",
]
NOTHING_TO_LEARN = "neither has anything"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def ranks(policy, tmp_path_factory, request):
    """What each rank saw, by case; ranks hold all weights or a share of them."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(Path(gradient_cases.__file__), policy, str(folder), request.param)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert all(case["sharded"] == (request.param == "fsdp2") for rank in results for case in rank.values())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_step_of_one_process(ranks, policy, case):
    alone = train(policy, case)
    for rank in ranks:
        shared = rank[case]
        assert shared["world_size"] == 2
        for gradient, expected in zip(shared["gradients"], alone["gradients"], strict=True):
            assert (expected.abs().max() > 1e-2) == (case != NOTHING_TO_LEARN)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-6)
        for key in SAME_ON_ALL_RANKS + [key for key in alone["metrics"] if "importance" in key]:
            assert shared["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-5, abs=1e-6), key
    assert torch.equal(ranks[0][case]["weights"], ranks[1][case]["weights"])
    assert ranks[0][case]["metrics"] == ranks[1][case]["metrics"]


@pytest.mark.slow
def test_a_step_exchanges_its_scalars_in_few_collectives(playground, tmp_path):
    """Rollouts: counts and metrics as a sum, maxima. Training: sizes before the loss, what is not finite after the
    backward pass, metrics after the step. Budget: a sum; health: a maximum."""
    run_ranks(Path(collective_counts.__file__), str(playground), str(tmp_path))
    for rank in range(2):
        for step in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert [entry.split()[0] for entry in step] == ["sum", "max", "sum", "max", "sum", "sum", "max"]
