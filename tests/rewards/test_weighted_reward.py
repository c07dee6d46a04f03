import math
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from tealightning.rewards import FunctionReward, Reward, SequenceClassifierReward, WeightedReward

NAN = float("nan")


class Fixed(Reward):
    """Scores given in advance; records what is done to it."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.events: list[str] = []

    def setup(self, device):
        self.events.append(f"setup {device}")

    def score(self, prompts, completions, metadata):
        return self.values

    def close(self):
        self.events.append("close")


def scores_of(reward: Reward, n: int):
    return reward(["p"] * n, ["c"] * n, [{}] * n)


def test_total_is_the_weighted_sum_and_components_are_unweighted():
    reward = WeightedReward({"a": Fixed([1.0, 2.0]), "b": Fixed([10.0, 20.0])}, {"a": 2.0, "b": -0.5})
    scores = scores_of(reward, 2)
    assert scores.total.tolist() == [-3.0, -6.0]
    assert {key: value.tolist() for key, value in scores.components.items()} == {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    assert reward.score(["p"] * 2, ["c"] * 2, [{}] * 2).tolist() == [-3.0, -6.0]


def test_unscorable_component_makes_the_total_unscorable_unless_its_weight_is_zero():
    rewards = {"a": Fixed([1.0, NAN, 3.0]), "logged": Fixed([NAN, 5.0, 6.0])}
    first, second, third = scores_of(WeightedReward(rewards, {"a": 2.0, "logged": 0.0}), 3).total.tolist()
    assert (first, third) == (2.0, 6.0)
    assert math.isnan(second)
    assert scores_of(WeightedReward(rewards, {"a": 2.0, "logged": 0.0}), 3).components["logged"][1] == 5.0


def test_setup_and_close_reach_every_component():
    parts = {"a": Fixed([1.0]), "b": Fixed([1.0])}
    reward = WeightedReward(parts, {"a": 1.0, "b": 1.0})
    reward.setup(torch.device("cpu"))
    reward.close()
    assert [part.events for part in parts.values()] == [["setup cpu", "close"]] * 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lenght": 1.0}, r"'lenght', which is none of the rewards. Did you mean 'length'\?"),
        ({"length": 1.0}, "weights lacks style"),
        ({"length": NAN, "style": 1.0}, r"weights\['length'\] must be a finite number, got nan"),
        ({"length": 0.0, "style": 0.0}, "at least one weight must differ from 0"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedReward({"length": Fixed([1.0]), "style": Fixed([1.0])}, weights)


def test_wrong_count_of_a_component_is_an_error():
    with pytest.raises(ValueError, match="must return 2 values"):
        scores_of(WeightedReward({"a": Fixed([1.0])}, {"a": 1.0}), 2)


def test_yaml_with_nested_class_paths_is_parsed(tmp_path: Path):
    (tmp_path / "scores.py").write_text(
        "def length(prompts, completions, metadata):\n    return map(len, completions)\n"
    )
    (tmp_path / "config.yaml").write_text(
        f"""
reward:
  class_path: WeightedReward
  init_args:
    rewards:
      quality:
        class_path: tealightning.rewards.SequenceClassifierReward
        init_args: {{model: some/folder, chat_template: false, max_length: 10}}
      length:
        class_path: FunctionReward
        init_args: {{function: "{tmp_path}/scores.py:length"}}
    weights: {{quality: 1, length: -0.01}}
"""
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Reward, "reward")
    arguments = ["--config", str(tmp_path / "config.yaml")]
    reward = parser.instantiate_classes(parser.parse_args(arguments)).reward
    quality, length = reward.rewards["quality"], reward.rewards["length"]
    assert isinstance(quality, SequenceClassifierReward) and quality.chat_template is False and quality.max_length == 10
    assert isinstance(length, FunctionReward)
    assert scores_of(length, 2).total.tolist() == [1.0, 1.0]
    assert reward.weights == {"quality": 1.0, "length": -0.01}
