"""Completions that are only an end, cut off or hit a stop string, with both engines: what is sampled is trained on."""

from itertools import pairwise

import pytest
import torch
from playground_fits import fit, module_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.rewards import FunctionReward
from tealightning.rollouts import EngineContext, RolloutCollector, build_engine
from tealightning.rollouts.base import RolloutEngine
from tealightning.rollouts.collector import rollout_metrics
from tealightning.types import Completion, PromptBatch, SamplingConfig

SEEDS = [2**41, 2**51 + 3]
FREE = SamplingConfig(max_new_tokens=16)


@pytest.fixture(scope="module", params=["transformers_engine", "vllm_engine"])
def served(request, playground):
    """A started engine, its tokenizer and two prompts."""
    folder = str(playground / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = build_engine(request.param)
    engine.start(
        EngineContext(
            policy=AutoModelForCausalLM.from_pretrained(folder),
            policy_path=folder,
            tokenizer=tokenizer,
            device=torch.device("cpu"),
            max_model_len=64,
            seed=0,
        )
    )
    yield engine, tokenizer, tokenizer(["The function returns", "A list"])["input_ids"]
    engine.close()


def sample(served, sampling: SamplingConfig, num_samples: int = 64) -> list[Completion]:
    engine, _, prompts = served
    return [c for g in engine.generate(prompts, num_samples=num_samples, sampling=sampling, seeds=SEEDS) for c in g]


def cut_at(tokenizer, free: Completion, stop: str) -> tuple[list[int], str] | None:
    """By hand: the tokens up to the first with which the text holds `stop`, and the text before it."""
    for count in range(1, len(free.token_ids) + 1):
        text = tokenizer.decode(free.token_ids[:count], skip_special_tokens=True)
        if stop in text:
            return free.token_ids[:count], text[: text.index(stop)]
    return None


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "a stop string inside a token, and one over several",
    how="both engines, 128 completions each, against a cut by hand",
)
def test_stop_strings_inside_and_across_tokens_cut_exactly(served, injected):
    _, tokenizer, _ = served
    free = sample(served, FREE)
    pieces = [[tokenizer.decode([t]) for t in c.token_ids] for c in free]
    inside = next(p[1:-1] for row in pieces for p in row if len(p) >= 4 and p.isascii())
    pairs = [pair for row in pieces for pair in pairwise(row)]
    across = next(a[-1] + b[:1] for a, b in pairs if a.isalpha() and b.isalpha())
    hits = 0
    for stop in (inside, across):
        stopped = sample(served, SamplingConfig(max_new_tokens=16, stop=[stop]))
        for before, after in zip(free, stopped, strict=True):
            expected = cut_at(tokenizer, before, stop)
            assert after.token_ids == (expected[0] if expected else before.token_ids)
            assert after.text == (expected[1] if expected else before.text)
            assert after.log_probs == pytest.approx(before.log_probs[: len(after.token_ids)], abs=1e-4)
            assert after.truncated == (before.truncated if expected is None else False)
            hits += expected is not None
    assert hits >= 4
    injected(times=hits)


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "completions that are cut off after 1 token, and such that are nothing but the end",
    how="both engines, max_new_tokens=1",
)
def test_only_the_end_and_cut_off_completions_keep_their_token(served, injected):
    _, tokenizer, _ = served
    one = sample(served, SamplingConfig(max_new_tokens=1), num_samples=2000)
    ends = [c for c in one if c.token_ids == [tokenizer.eos_token_id]]
    others = [c for c in one if c.token_ids != [tokenizer.eos_token_id]]
    assert all(c.text == "" and not c.truncated and len(c.log_probs) == 1 for c in ends)
    assert ends and others and all(c.truncated and len(c.token_ids) == 1 for c in others)
    injected(times=len(one))


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "text that encodes to other tokens than were sampled",
    how="both engines, completions of a policy that is not trained",
)
def test_what_was_sampled_is_trained_on_and_never_encoded_again(served, injected):
    """Retokenisation drift: TRL #5224, verl #6719."""
    engine, tokenizer, prompts = served
    collector = RolloutCollector(engine, FunctionReward(lengths), FREE, 0)
    batch = PromptBatch(ids=["0", "1"], prompts=["one", "two"], token_ids=prompts, metadata=[{}, {}])
    rollouts, _ = collector.collect(batch, num_samples=64, seeds=SEEDS, weights_version=0)
    sampled = sample(served, FREE)
    drifted = sum(tokenizer(c.text)["input_ids"] != c.token_ids for c in sampled)
    assert drifted > 10, "encoding again would have to make a difference"
    for row, completion in enumerate(sampled):
        length = len(completion.token_ids)
        assert rollouts.completion_ids[row, :length].tolist() == completion.token_ids
        assert rollouts.completion_mask[row].sum() == length
        assert rollouts.completions[row] == completion.text
    injected(times=drifted)


def lengths(prompts, completions, metadata):
    return [float(len(text)) for text in completions]


class Scripted(RolloutEngine):
    """Gives the completions of a list, in turns."""

    shares_weights = True
    is_scripted = True

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def start(self, context):
        pass

    def generate(self, prompt_token_ids, *, num_samples, sampling, seeds):
        return [[self.completions[i % len(self.completions)] for i in range(num_samples)] for _ in prompt_token_ids]

    def sync_weights(self, weights):
        pass

    def close(self):
        pass


def scripted(*rows: tuple[list[int], str, bool]) -> Scripted:
    return Scripted([Completion(token_ids=t, log_probs=[-1.0] * len(t), text=x, truncated=c) for t, x, c in rows])


@pytest.mark.fault(
    "steps in which all or some completions are only the end of sequence",
    how="an engine that returns them, in training",
)
def test_training_on_only_ends_truncated_and_stopped_completions(playground, injected):
    eos = AutoTokenizer.from_pretrained(playground / "policy").eos_token_id
    seen: list[str] = []

    def reward(prompts, completions, metadata):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    mixed = scripted(([eos], "", False), ([40] * 12, "x" * 12, True), ([41, 42], "y", False), ([43, eos], "z", False))
    _, record = fit(playground, steps=1, engine=mixed, reward=reward, module=module_of(playground))
    metrics = record.steps[0]["metrics"]
    assert set(seen) == {"", "x" * 12, "y", "z"}
    assert record.steps[0]["tokens"][:4] == [[eos], [40] * 12, [41, 42], [43, eos]]
    assert metrics["rollout/truncated_fraction"] == 0.25
    assert metrics["rollout/completion_length_mean"] == pytest.approx((1 + 12 + 2 + 2) / 4)
    assert 0 < metrics["train/grad_norm"] < 1e6
    only_ends = scripted(([eos], "", False))
    _, record = fit(playground, steps=2, engine=only_ends, reward=reward, module=module_of(playground))
    for step in record.steps:
        assert step["metrics"]["rollout/truncated_fraction"] == 0
        assert step["metrics"]["rollout/zero_variance_groups"] == 1
        assert step["metrics"]["train/grad_norm"] == 0
    assert record.largest_move == 0
    injected(times=3)


def test_the_sampled_end_is_trained_on_although_it_is_the_padding(playground):
    """Pad equals eos and hides the end of sequence in the mask: TRL #4970. Masks come from lengths."""
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    eos = tokenizer.eos_token_id
    module = module_of(playground)
    module.tokenizer = tokenizer
    tokenizer.pad_token_id = eos
    ends = scripted(([eos], "", False), ([40, 41, eos], "xx", False))
    _, record = fit(
        playground,
        steps=1,
        engine=ends,
        reward=lengths,
        module=module,
    )
    assert record.steps[0]["tokens"][:2] == [[eos], [40, 41, eos]]
    assert record.steps[0]["metrics"]["rollout/completion_length_mean"] == 2
    assert record.steps[0]["metrics"]["train/grad_norm"] > 0


def test_metrics_of_a_batch_of_ends_are_finite_or_say_why_not():
    collector = RolloutCollector(
        scripted(([0], "", False)),
        FunctionReward(lengths),
        FREE,
        0,
    )
    batch = PromptBatch(ids=["0"], prompts=["a"], token_ids=[[1]], metadata=[{}])
    rollouts, _ = collector.collect(batch, num_samples=4, seeds=[1], weights_version=0)
    metrics = rollout_metrics(rollouts)
    assert metrics["completion_length_mean"] == 1 and metrics["truncated_fraction"] == 0


def test_an_empty_completion_without_even_an_end_is_refused():
    """An engine may not return no tokens at all: there would be nothing that was sampled."""
    collector = RolloutCollector(scripted(([], "", False)), FunctionReward(len), FREE, 0)
    batch = PromptBatch(ids=["0"], prompts=["a"], token_ids=[[1]], metadata=[{}])
    with pytest.raises(ValueError, match="must return 1 to 16 tokens with a log-prob each, got 0 tokens"):
        collector.collect(batch, num_samples=1, seeds=[1], weights_version=0)
