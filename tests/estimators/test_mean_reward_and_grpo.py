import torch

from tealightning.estimators import GRPO, BonMaxMean, MeanReward

REWARDS = torch.tensor([[3.0, 1.0, 2.0, 2.0]], dtype=torch.float64)


def test_mean_reward_subtracts_the_mean_by_default():
    assert MeanReward()(REWARDS).tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_mean_reward_loo_subtracts_the_mean_of_the_others():
    expected = [[3 - 5 / 3, 1 - 7 / 3, 0.0, 0.0]]
    torch.testing.assert_close(MeanReward(baseline="loo")(REWARDS), torch.tensor(expected, dtype=torch.float64))


def test_mean_reward_without_baseline_returns_a_copy_of_the_rewards():
    advantages = MeanReward(baseline="none")(REWARDS)
    assert advantages.tolist() == REWARDS.tolist()
    assert advantages.data_ptr() != REWARDS.data_ptr()


def test_grpo_divides_by_the_sample_standard_deviation_plus_eps():
    std = (2 / 3) ** 0.5
    expected = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64) / (std + 0.5)
    torch.testing.assert_close(GRPO(eps=0.5)(REWARDS), expected)


def test_grpo_does_not_blow_up_rounding_noise_in_a_nearly_constant_group():
    rewards = torch.full((1, 8), 0.1, dtype=torch.float64)
    rewards[0, 0] = torch.nextafter(rewards[0, 0], torch.tensor(1.0, dtype=torch.float64))
    assert GRPO()(rewards).abs().max() < 1e-12


def test_grpo_survives_squares_that_overflow():
    standardised = GRPO()(REWARDS * 1e200)
    torch.testing.assert_close(standardised, GRPO(eps=1e-12)(REWARDS), rtol=1e-9, atol=1e-9)


def test_bon_max_mean_rewards_every_tied_winner_and_nobody_else():
    assert BonMaxMean()(torch.tensor([[1.0, 0.0, 1.0, 2 / 3 * 3]])).tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert BonMaxMean()(torch.tensor([[1.0, 0.0, 1.0, 0.0]])).tolist() == [[0.5, 0.0, 0.5, 0.0]]
