"""Padding and scoring, from completions written by hand."""

import math
import threading
import time

import pytest
import torch

from tealightning.rewards import FunctionReward, Reward
from tealightning.rollouts import RolloutCollector, RolloutEngine, rollout_metrics
from tealightning.types import Completion, PromptBatch, RolloutBatch, SamplingConfig

PAD = 0  # also the eos of the completions below


class Recited(RolloutEngine):
    """Returns what it is given."""

    def __init__(self, grouped):
        self.grouped = grouped

    def start(self, context): ...

    def generate(self, prompt_token_ids, *, num_samples, sampling, seeds):
        self.called_with = (prompt_token_ids, num_samples, sampling, seeds)
        return self.grouped

    def sync_weights(self, weights): ...

    def close(self): ...


class Recorded(Reward):
    def score(self, prompts, completions, metadata):
        self.called_with = (list(prompts), list(completions), list(metadata))
        return [float(len(text)) if text else math.nan for text in completions]


def completion(*token_ids, text="", truncated=False):
    return Completion(
        token_ids=list(token_ids), log_probs=[-float(t) for t in token_ids], text=text, truncated=truncated
    )


CHAT = [{"role": "user", "content": "hi"}]
BATCH = PromptBatch(
    ids=["a", "b"], prompts=[CHAT, "why"], token_ids=[[7, 8, 9], [6]], metadata=[{"answer": 1}, {"answer": 2}]
)
GROUPED = [
    [completion(4, 5, 0, text="xy"), completion(0, text="")],
    [completion(3, 3, 3, 3, text="abcd", truncated=True), completion(2, 0, text="z")],
]
SAMPLING = SamplingConfig(max_new_tokens=4)


def collect(grouped=GROUPED, *, engine=None, reward=None, num_samples=2, **kwargs):
    collector = RolloutCollector(engine or Recited(grouped), reward or Recorded(), SAMPLING, PAD, **kwargs)
    return collector.collect(BATCH, num_samples=num_samples, seeds=[1, 2], weights_version=5)


def test_collector_pads_by_lengths():
    rollouts, seconds = collect()
    assert rollouts.prompt_ids.tolist() == [[7, 8, 9], [7, 8, 9], [0, 0, 6], [0, 0, 6]]
    assert rollouts.prompt_lengths.tolist() == [3, 3, 1, 1]
    assert rollouts.completion_ids.tolist() == [[4, 5, 0, 0], [0, 0, 0, 0], [3, 3, 3, 3], [2, 0, 0, 0]]
    assert rollouts.completion_lengths.tolist() == [3, 1, 4, 2]
    assert rollouts.completion_mask.sum(dim=1).tolist() == [3, 1, 4, 2]  # the sampled eos is trained on, padding is not
    assert rollouts.rollout_log_probs.tolist() == [[-4, -5, 0, 0], [0, 0, 0, 0], [-3, -3, -3, -3], [-2, 0, 0, 0]]
    assert rollouts.truncated.tolist() == [False, False, True, False]
    assert rollouts.completions == ["xy", "", "abcd", "z"]
    assert (rollouts.weights_version, rollouts.sampling) == (5, SAMPLING)
    assert rollouts.prompt_ids.dtype == rollouts.completion_lengths.dtype == torch.int64
    assert rollouts.rollout_log_probs.dtype == torch.float32
    assert set(seconds) == {"generate", "reward"} and min(seconds.values()) >= 0


def test_collector_scores_each_completion_with_its_prompt_as_written():
    engine, reward = Recited(GROUPED), Recorded()
    rollouts, _ = collect(engine=engine, reward=reward)
    assert engine.called_with == ([[7, 8, 9], [6]], 2, SAMPLING, [1, 2])
    prompts, completions, metadata = reward.called_with
    assert prompts == [CHAT, CHAT, "why", "why"]
    assert completions == ["xy", "", "abcd", "z"]
    assert metadata == [{"answer": 1}, {"answer": 1}, {"answer": 2}, {"answer": 2}]
    torch.testing.assert_close(
        rollouts.rewards, torch.tensor([[2, math.nan], [4, 1]], dtype=torch.float64), equal_nan=True
    )
    assert rollouts.valid.tolist() == [[True, False], [True, True]]
    assert list(rollouts.reward_components) == ["recorded"]
    assert rollouts.reward_components["recorded"].shape == (2, 2)


class OneByOne(Recited):
    """Has the last prompt's completions first, and the first prompt's only after `before_last`."""

    def __init__(self, grouped, before_last=lambda: None):
        super().__init__(grouped)
        self.before_last = before_last

    def generate_each(self, prompt_token_ids, *, num_samples, sampling, seeds):
        yield 1, self.grouped[1]
        self.before_last()
        yield 0, self.grouped[0]


def test_collector_scores_as_finished_what_it_scores_at_the_end():
    at_the_end, _ = collect()
    as_finished, _ = collect(engine=OneByOne(GROUPED), score_as_finished=True)
    torch.testing.assert_close(as_finished.rewards, at_the_end.rewards, equal_nan=True)
    assert as_finished.reward_components.keys() == at_the_end.reward_components.keys()
    assert as_finished.completions == at_the_end.completions
    assert torch.equal(as_finished.completion_ids, at_the_end.completion_ids)


def test_collector_scores_while_others_are_generated():
    scored = threading.Event()

    class Tells(Recorded):
        def score(self, prompts, completions, metadata):
            scored.set()
            return super().score(prompts, completions, metadata)

    def last_prompt():
        assert scored.wait(10), "the reward waits for the last prompt"

    _, seconds = collect(engine=OneByOne(GROUPED, last_prompt), reward=Tells(), score_as_finished=True)
    assert seconds.keys() == {"generate", "reward"}


def test_collector_ends_when_the_reward_fails_in_its_thread():
    class Fails(Recorded):
        def score(self, prompts, completions, metadata):
            raise ConnectionError("the reward is gone")

    with pytest.raises(ConnectionError, match="the reward is gone"):
        collect(engine=OneByOne(GROUPED), reward=Fails(), score_as_finished=True)


def test_collector_drops_what_waits_for_the_reward_when_the_engine_fails():
    def fails():
        raise RuntimeError("the engine is gone")

    class Slow(Recorded):
        def score(self, prompts, completions, metadata):
            time.sleep(0.2)
            return super().score(prompts, completions, metadata)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        collect(engine=OneByOne(GROUPED, fails), reward=Slow(), score_as_finished=True)


@pytest.mark.parametrize(
    ("grouped", "message"),
    [
        (GROUPED[:1], r"'recited' must return 2 completions for each of 2 prompts, got \[2\]"),
        ([GROUPED[0], GROUPED[1][:1]], r"got \[2, 1\]"),
        ([[completion(), completion(1)], GROUPED[1]], "1 to 4 tokens with a log-prob each, got 0 tokens"),
        ([[completion(1, 1, 1, 1, 1), completion(1)], GROUPED[1]], "got 5 tokens and 5 log-probs"),
        ([[Completion(token_ids=[1], log_probs=[], text="", truncated=False)] * 2, GROUPED[1]], "1 tokens and 0 log"),
        ([[completion(4), completion(12)], GROUPED[1]], r"token id outside \[0, 10\): 12 to 12"),
        ([[Completion(token_ids=[1], log_probs=[math.nan], text="", truncated=False)] * 2, GROUPED[1]], "not finite"),
    ],
)
def test_collector_names_what_an_engine_did_wrong(grouped, message):
    with pytest.raises(ValueError, match=message):
        collect(grouped, vocab_size=10)


def metrics_of(rewards, components=None):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    size = rewards.numel()
    lengths = torch.arange(1, size + 1)
    return rollout_metrics(
        RolloutBatch(
            prompt_ids=torch.ones(size, 1, dtype=torch.int64),
            prompt_lengths=torch.ones(size, dtype=torch.int64),
            completion_ids=torch.ones(size, size, dtype=torch.int64),
            completion_lengths=lengths,
            rollout_log_probs=torch.zeros(size, size),
            truncated=lengths == size,
            rewards=rewards,
            reward_components=components or {},
        )
    )


def test_rollout_metrics_leave_unscorable_rewards_out():
    nan = math.nan
    components = {"helpful": torch.tensor([[4.0, nan], [nan, nan]], dtype=torch.float64)}
    metrics = metrics_of([[1.0, 3.0, nan], [2.0, 2.0, 2.0], [nan, nan, 6.0]], components)
    assert metrics == pytest.approx(
        {
            "reward_mean": 16 / 6,
            "reward_std": math.sqrt(2) / 2,  # of prompts 0 and 1: sqrt(2) and 0
            "reward_max": 6.0,
            "completion_length_mean": 5.0,
            "completion_length_max": 9.0,
            "truncated_fraction": 1 / 9,
            "unscorable_fraction": 3 / 9,
            "zero_variance_groups": 2 / 3,  # all equal, and only one scored
            "reward_ties": 3 / 6,
            "reward_helpful_mean": 4.0,
        }
    )


def test_rollout_metrics_of_nothing_scored_are_nan_not_an_error():
    metrics = metrics_of([[math.nan, math.nan]])
    assert all(math.isnan(metrics[name]) for name in ("reward_mean", "reward_std", "reward_max"))
    fractions = ("unscorable_fraction", "zero_variance_groups", "reward_ties")
    assert [metrics[name] for name in fractions] == [1.0, 1.0, 0.0]


def test_collector_runs_a_function_reward_on_a_real_engines_samples(tmp_path):
    from tiny_policies import PROMPTS, SEEDS, TOKENS, engine_context, save_policy

    from tealightning.rollouts import TransformersEngine

    engine = TransformersEngine()
    context = engine_context(save_policy(tmp_path))
    engine.start(context)
    reward = FunctionReward(function=count_vowels)
    reward.setup(context.device)
    batch = PromptBatch(ids=["a", "b", "c"], prompts=["x"] * 3, token_ids=PROMPTS, metadata=[{}] * 3)
    rollouts, _ = RolloutCollector(engine, reward, SamplingConfig(max_new_tokens=12), 0, len(TOKENS)).collect(
        batch, num_samples=4, seeds=SEEDS, weights_version=0
    )
    rows = zip(rollouts.completion_ids.tolist(), rollouts.completion_lengths.tolist(), strict=True)
    vowels = [sum(TOKENS[t] in "aeiou" for t in ids[:length]) for ids, length in rows]
    assert rollouts.rewards.flatten().tolist() == vowels and sum(vowels) > 5


def count_vowels(prompts, completions, metadata):
    return [float(sum(character in "aeiou" for character in text)) for text in completions]
