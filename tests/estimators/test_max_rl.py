import pytest
import torch

from tealightning.estimators import MaxRL


def test_max_rl_by_hand():
    correct = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1]], dtype=torch.float64)
    torch.testing.assert_close(MaxRL()(correct), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(MaxRL(eps=0.25)(correct)[0], torch.tensor([1.5, -0.5, -0.5, -0.5]).double())
    scores = torch.tensor([[0.2, 0.4, 0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(MaxRL(eps=1e-12)(scores), torch.tensor([[-0.6, -0.2, 0.2, 0.6]], dtype=torch.float64))


def test_max_rl_of_a_group_without_any_success_is_zero():
    assert MaxRL()(torch.zeros(2, 8)).count_nonzero() == 0


def test_max_rl_hardly_depends_on_the_unit_of_the_rewards():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(MaxRL()(100 * rewards), MaxRL()(rewards), rtol=1e-4, atol=0)


def test_max_rl_refuses_the_scores_of_a_reward_model_and_says_what_to_do():
    scores = torch.tensor([[0.5, -1.25, 2.0, 0.0]])
    with pytest.raises(ValueError, match=r"max_rl takes rewards of at least 0, got -1\.25: .*take tail_rl.* \[0, 1\]"):
        MaxRL()(scores)
    unscorable = torch.tensor([[True, False, True, True]])
    assert MaxRL()(scores, unscorable)[0, 1] == 0
    assert MaxRL()(torch.tensor([[-0.0, 0.0, 1.0, 0.0]])).isfinite().all()
