import math

import pytest
import torch

from tealightning.estimators import GRPO, GRPOLead


def weight(share: float) -> float:
    """The paper's logistic curve with its constants."""
    return 0.4 + 1.1 / (1 + math.exp(10 * (share - 0.75)))


def test_grpo_lead_weighs_successes_by_difficulty_and_failures_by_ease():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    plain = GRPO()(rewards)
    factors = torch.tensor(
        [[weight(0.25)] + [weight(0.75)] * 3, [weight(0.75)] * 3 + [weight(0.25)]], dtype=torch.float64
    )
    torch.testing.assert_close(GRPOLead()(rewards), plain * factors)


def test_grpo_lead_counts_rewards_above_its_threshold():
    rewards = torch.tensor([[0.2, 0.4, 0.6, 0.8]], dtype=torch.float64)
    all_succeed = GRPOLead(threshold=0.0)(rewards) / GRPO()(rewards)
    torch.testing.assert_close(all_succeed, torch.tensor([[weight(0.0)] * 2 + [weight(1.0)] * 2], dtype=torch.float64))


def test_grpo_lead_with_equal_weights_is_grpo():
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(GRPOLead(low=1.0, high=1.0)(rewards), GRPO()(rewards))


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"threshold": math.nan}, "threshold"),
        ({"low": -0.1}, "low"),
        ({"low": 2.0}, "high"),
        ({"steepness": 0.0}, "steepness"),
        ({"midpoint": math.inf}, "midpoint"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_grpo_lead_names_the_argument_that_is_wrong(kwargs, argument):
    with pytest.raises(ValueError, match=rf"\b{argument} must be"):
        GRPOLead(**kwargs)
