import torch

from tealightning.estimators import ChowBonRL

REWARDS = torch.tensor([[3.0, 1.0, 2.0, 2.0]], dtype=torch.float64)


def test_chow_bon_rl_pays_every_rollout_the_lead_of_the_best_over_the_mean():
    assert ChowBonRL()(REWARDS).tolist() == [[4.0] * 4]


def test_chow_bon_rl_without_baseline_pays_the_maximum():
    assert ChowBonRL(baseline="none")(REWARDS).tolist() == [[12.0] * 4]


def test_chow_bon_rl_in_a_constant_group():
    constant = torch.full((1, 3), 0.5)
    assert ChowBonRL()(constant).tolist() == [[0.0] * 3]
    assert ChowBonRL(baseline="none")(constant).tolist() == [[1.5] * 3]
    assert ChowBonRL(baseline="none")(constant[:, :1]).tolist() == [[0.5]]
