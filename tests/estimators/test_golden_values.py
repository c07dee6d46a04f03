import json
from pathlib import Path

import pytest
import torch

from tealightning.estimators import build_estimator

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    pytest.param(case, id=f"{case['estimator']}-m{len(case['rewards'][0])}-{case['params']}")
    for name in ("baselines.json", "tail.json")
    for case in json.loads((GOLDEN / name).read_text())["cases"]
]


@pytest.mark.parametrize("case", CASES)
def test_estimator_matches_golden_values(case):
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    advantages = build_estimator(case["estimator"], **case["params"])(rewards)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)
