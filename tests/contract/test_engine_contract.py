"""The contract of rollouts/base.py, for every registered engine: a new one is tested without a change here."""

import os
import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_policies import (
    BAD_DEFAULTS,
    END_OF_TURN,
    EOS,
    MAX_MODEL_LEN,
    PROMPTS,
    SEEDS,
    TOKENS,
    engine_context,
    largest_difference,
    perturb_,
    save_policy,
    token_ids,
)

from tealightning.rollouts import build_engine, engine_names, policy_weights
from tealightning.training.lora import LoRA, add_adapter
from tealightning.types import SamplingConfig

PLAIN = SamplingConfig(max_new_tokens=24)
FILTERED = SamplingConfig(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=20)
SECOND_EOS = TOKENS.index("q")


# A server takes a minute to start, so tests/rollouts/test_vllm_server.py runs these tests on a single one.
@pytest.fixture(scope="module", params=[name for name in engine_names() if name != "vllm_server_engine"])
def engine_name(request):
    return request.param


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("tied"), tied=True)


def started(engine_name, folder):
    context = engine_context(folder)
    engine = build_engine(engine_name)
    engine.start(context)
    return engine, context.policy


@pytest.fixture(scope="module")
def tied(engine_name, tied_folder):
    engine, policy = started(engine_name, tied_folder)
    yield engine, policy
    engine.close()


@pytest.fixture(scope="module")
def untied(engine_name, tmp_path_factory):
    """Here the folder's generation config names two ends of sequence."""
    folder = save_policy(tmp_path_factory.mktemp("untied"), tied=False, eos_token_id=[EOS, SECOND_EOS])
    engine, policy = started(engine_name, folder)
    yield engine, policy
    engine.close()


def sample(engine, *, prompts=PROMPTS, num_samples=8, sampling=PLAIN, seeds=SEEDS):
    return engine.generate(prompts, num_samples=num_samples, sampling=sampling, seeds=seeds)


def test_engine_returns_the_samples_of_each_prompt_with_a_log_prob_for_each_token(tied):
    grouped = sample(tied[0])
    assert [len(group) for group in grouped] == [8, 8, 8]
    for completion in (c for group in grouped for c in group):
        assert 1 <= len(completion.token_ids) <= 24
        assert len(completion.log_probs) == len(completion.token_ids)
        assert all(0 <= token < len(TOKENS) for token in completion.token_ids)
        assert max(completion.log_probs) <= 0


def test_engine_returns_nothing_for_no_prompts(tied):
    assert sample(tied[0], prompts=[], seeds=[]) == []


@pytest.mark.parametrize("sampling", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_engine_log_probs_are_the_trainers_of_the_same_tokens(tied, untied, sampling):
    """Also at a temperature other than 1 (TRL #4159) and with top-p and top-k (TRL #6789)."""
    for engine, policy in (tied, untied):
        assert largest_difference(policy, PROMPTS, sample(engine, sampling=sampling), sampling) < 1e-5


@pytest.mark.parametrize("sampling", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_engine_samples_the_softmax_and_ignores_the_folders_defaults(tied, sampling):
    engine, policy = tied
    assert policy.generation_config.repetition_penalty == BAD_DEFAULTS["repetition_penalty"]
    one_token = SamplingConfig(
        max_new_tokens=1, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    (group,) = sample(engine, prompts=[PROMPTS[1]], num_samples=3000, sampling=one_token, seeds=[SEEDS[0]])
    counts = np.bincount([c.token_ids[0] for c in group], minlength=len(TOKENS))

    with torch.no_grad():
        logits = policy(torch.tensor([PROMPTS[1]])).logits[0, -1] / sampling.temperature
    if sampling is FILTERED:
        logits[logits < logits.topk(20).values[-1]] = -torch.inf
        probs, order = logits.softmax(-1).sort(descending=True)
        logits[order[probs.cumsum(-1) - probs >= 0.9]] = -torch.inf
    probs = logits.softmax(-1).double().numpy()
    assert (probs > 0).sum() == (len(TOKENS) if sampling is PLAIN else 13)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    assert chisquare(counts[kept], 3000 * probs[kept] / probs[kept].sum()).pvalue > 1e-3


def test_engine_keeps_the_sampled_eos_and_flags_what_ran_out_of_tokens(tied):
    completions = [c for group in sample(tied[0], num_samples=32) for c in group]
    ended = [c for c in completions if c.token_ids[-1] == EOS]
    truncated = [c for c in completions if c.token_ids[-1] != EOS]
    assert len(ended) > 5 and len(truncated) > 5
    assert not any(EOS in c.token_ids[:-1] for c in completions)
    assert not any(c.truncated for c in ended)
    assert all(c.truncated and len(c.token_ids) == 24 for c in truncated)
    assert all("<eos>" not in c.text for c in ended)
    assert all(c.text == "".join(TOKENS[t] for t in c.token_ids if t > END_OF_TURN) for c in completions)


def test_engine_ends_on_every_eos_of_the_generation_config(untied):
    completions = [c for group in sample(untied[0], num_samples=32) for c in group]
    ends = {EOS, SECOND_EOS}
    assert {c.token_ids[-1] for c in completions if not c.truncated} == ends
    assert not any(ends.intersection(c.token_ids[:-1]) for c in completions)
    assert not any("q" in c.text for c in completions)


def test_engine_keeps_the_tokens_of_a_stop_string_and_cuts_its_text(tied):
    sampling = SamplingConfig(max_new_tokens=40, stop=["z", "e", "ab"])
    completions = [c for group in sample(tied[0], num_samples=32, sampling=sampling) for c in group]
    stopped = [c for c in completions if not c.truncated and c.token_ids[-1] != EOS]
    assert len(stopped) > 10
    for c in stopped:
        written = "".join(TOKENS[t] for t in c.token_ids if t > END_OF_TURN)
        assert written.endswith(("z", "e", "ab"))
        assert c.text == (written[:-2] if written.endswith("ab") else written[:-1])
    assert not any(stop in c.text for c in completions for stop in sampling.stop)
    assert all(len(c.log_probs) == len(c.token_ids) for c in completions)


def test_engine_is_not_truncated_when_the_last_token_ends_it(tied):
    free = [c for group in sample(tied[0], num_samples=8) for c in group]
    length = min(len(c.token_ids) for c in free if not c.truncated)
    again = sample(tied[0], num_samples=8, sampling=SamplingConfig(max_new_tokens=length))
    ended = [c for group in again for c in group if c.token_ids[-1] == EOS]
    assert ended and all(len(c.token_ids) <= length and not c.truncated for c in ended)


def test_engine_ends_on_a_stop_string_that_is_a_special_token(tied):
    sampling = SamplingConfig(max_new_tokens=40, stop=["<|im_end|>"])
    completions = [c for group in sample(tied[0], num_samples=32, sampling=sampling) for c in group]
    assert {EOS, END_OF_TURN} == {c.token_ids[-1] for c in completions if not c.truncated}
    assert not any(END_OF_TURN in c.token_ids[:-1] or "im_end" in c.text for c in completions)


def test_engine_samples_follow_from_the_prompts_seed_alone(tied):
    """A seed that never reaches the engine: TRL #7040."""
    engine, _ = tied
    together = token_ids(sample(engine))
    assert token_ids(sample(engine)) == together
    torch.manual_seed(12345)  # the global generator has no say
    reordered = sample(engine, prompts=[PROMPTS[2], PROMPTS[0]], seeds=[SEEDS[2], SEEDS[0]])
    assert token_ids(reordered) == [together[2], together[0]]
    longer = token_ids(sample(engine, num_samples=9, sampling=SamplingConfig(max_new_tokens=25)))
    assert [[ids[:24] for ids in group[:8]] for group in longer] == together
    other = token_ids(sample(engine, seeds=[seed + 1000 for seed in SEEDS]))
    assert all(a != b for a, b in zip(other, together, strict=True))
    flat = [tuple(ids) for group in together for ids in group if len(ids) > 5]
    assert len(set(flat)) == len(flat)  # no two samples alike


def test_engine_leaves_the_process_as_it_was(engine_name, tied_folder):
    def state():
        return {
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
            "threads": torch.get_num_threads(),
            "set_num_threads": torch.set_num_threads,
            "environment": {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
            "precision": torch.get_float32_matmul_precision(),
        }

    context = engine_context(tied_folder, max_model_len=MAX_MODEL_LEN + 1)  # so that nothing can be reused
    torch.manual_seed(3)
    before = state()
    engine = build_engine(engine_name)
    engine.start(context)
    assert state() == before
    sample(engine)
    assert state() == before
    engine.sync_weights(policy_weights(context.policy))
    engine.close()
    assert state() == before


def test_engine_samples_from_the_new_weights_after_a_sync(engine_name, tied_folder):
    engine, policy = started(engine_name, tied_folder)
    seen = sample(engine)
    perturb_(policy)
    assert largest_difference(policy, PROMPTS, seen, PLAIN) > 1e-2
    if not engine.shares_weights:
        assert token_ids(sample(engine)) == token_ids(seen)
    engine.sync_weights(policy_weights(policy))
    fresh = sample(engine)
    engine.close()
    assert largest_difference(policy, PROMPTS, fresh, PLAIN) < 5e-6
    assert token_ids(fresh) != token_ids(seen)


def test_engine_starts_with_the_weights_of_the_live_policy(engine_name, tied_folder):
    context = engine_context(tied_folder)
    perturb_(context.policy)  # as after a resume: no longer what the folder holds
    engine = build_engine(engine_name)
    engine.start(context)
    engine.start(context)
    assert largest_difference(context.policy, PROMPTS, sample(engine), PLAIN) < 5e-6
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        sample(engine)


def test_engine_samples_with_the_adapter_on(engine_name, tied_folder):
    context = engine_context(tied_folder)
    loaded = engine_context(tied_folder).policy
    add_adapter(context.policy, LoRA(rank=4, alpha=8))
    engine = build_engine(engine_name)
    engine.start(context)
    assert largest_difference(loaded, PROMPTS, sample(engine), PLAIN) < 2e-5
    for _ in range(3):
        perturb_(context.policy)
        engine.sync_weights(policy_weights(context.policy))
        # `W x + B A x` and `(W + B A) x` round differently.
        assert largest_difference(context.policy, PROMPTS, sample(engine), PLAIN) < 2e-5
    assert largest_difference(loaded, PROMPTS, sample(engine), PLAIN) > 1e-2
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[5] * 105], "seeds": [1]}, "prompt 0 has 105 tokens, more than the 104 that max_model_len=128"),
        ({"prompts": [[5], []], "seeds": [1, 2]}, "prompt 1 has no tokens"),
        ({"seeds": [1, 2]}, "got 2 for 3 prompts"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
    ],
)
def test_engine_refuses_what_it_cannot_serve(tied, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tied[0], **arguments)
    assert len(sample(tied[0], prompts=[[5] * 104], seeds=[1], num_samples=1)) == 1
