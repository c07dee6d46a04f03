import copy
import math
import random

import numpy as np
import pytest
import torch
from copying_engine import CopyingEngine, DropsEverySecondTensor, NeverSyncs, SyncsOnce
from tiny_policies import engine_context, perturb_, save_policy
from transformers import AutoConfig, AutoModelForCausalLM

from tealightning.reliability.fingerprint import fingerprint
from tealightning.rollouts import TransformersEngine
from tealightning.rollouts.weight_probe import log_prob_difference
from tealightning.rollouts.weight_sync import WeightSync


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def sync_of(engine, context, policy=None, tolerance=None):
    policy = policy or context.policy
    engine.start(context)
    return WeightSync(engine, policy, context, over_ranks=float, tolerance=tolerance)


class Drops(CopyingEngine):
    """Takes over the tensors of the live policy but one."""

    def __init__(self, lost: str = "") -> None:
        super().__init__()
        self.lost = lost

    def start(self, context):
        self.live = dict(context.policy.named_parameters())
        super().start(context)

    def sync_weights(self, weights):
        list(weights)
        for name, held in self._context.policy.named_parameters():
            if name != self.lost:
                held.data.copy_(self.live[name])


class WrongCache(TransformersEngine):
    """Attends to nothing before the last token."""

    def generate(self, prompt_token_ids, **kwargs):
        return super().generate([ids[-1:] for ids in prompt_token_ids], **kwargs)


TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
OF_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
ARCHITECTURES = {
    "qwen2": {},
    "qwen3_moe": OF_EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "gpt_neox": {},
}


@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3_moe", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gpt_oss", "gpt_neox"))]
)
def test_each_tensor_that_is_lost_is_found_at_the_start(architecture, folder):
    """An engine that has loaded the policy's folder by itself is right until the first update; with fused experts,
    biases and norms at their initial values as well."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TINY | ARCHITECTURES[architecture]))
    context = engine_context(folder)
    context.policy = policy
    names, before = [name for name, _ in policy.named_parameters()], fingerprint(policy)
    sync_of(Drops(), context).start()
    told = rf"disagree about the policy, a {type(policy).__name__} \(model_type {architecture}\)"
    for name in names:
        with pytest.raises(ValueError, match=told):
            sync_of(Drops(name), context).start()
        assert fingerprint(policy) == before
    assert len(names) > 20


@pytest.mark.parametrize("engine", [NeverSyncs, DropsEverySecondTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_engine_that_misses_weights_is_refused_at_the_start(engine, dtype, folder):
    context = engine_context(folder)
    told = r"LlamaForCausalLM \(model_type llama\): after a push of weights that were changed on trial, .* differ"
    with pytest.raises(ValueError, match=told) as error:
        sync_of(engine(dtype), context).start()
    assert "--rollout.engine=TransformersEngine samples" in str(error.value)


def test_a_later_push_that_does_not_arrive_is_refused(folder):
    context = engine_context(folder)
    engine = SyncsOnce()
    sync = sync_of(engine, context)
    engine.syncs = 0  # the two pushes of the start arrive
    sync.start()
    assert not sync.push_if_changed()
    perturb_(context.policy)
    with pytest.raises(ValueError, match="after a push of the policy's weights, its log-probs"):
        sync.push_if_changed()


def test_an_engine_that_shares_weights_is_probed_once_and_never_synced(folder):
    context = engine_context(folder)
    sync = sync_of(TransformersEngine(), context)
    sync.start()
    perturb_(context.policy)
    assert not sync.push_if_changed()
    with pytest.raises(ValueError, match=r"when it started, .*What it generates token by token"):
        sync_of(WrongCache(), context).start()


def test_a_push_follows_every_change_and_nothing_else(folder):
    context = engine_context(folder)
    engine = CopyingEngine()
    sync = sync_of(engine, context)
    sync.start()
    assert engine.syncs == 2  # changed on trial, and back
    policy = context.policy
    assert not sync.push_if_changed()
    state = copy.deepcopy(policy.state_dict())
    policy.lm_head.weight.data.neg_()
    assert sync.push_if_changed() and not sync.push_if_changed()
    policy.load_state_dict(state)
    assert sync.push_if_changed() and not sync.push_if_changed()
    sync.forget()
    assert sync.push_if_changed()
    assert engine.syncs == 5
    held = dict(engine._context.policy.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in policy.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_mismatch(dtype, folder):
    context = engine_context(folder)
    sync = sync_of(CopyingEngine(dtype), context)
    sync.start()
    for _ in range(3):
        perturb_(context.policy)
        assert sync.push_if_changed()


def test_an_engine_that_says_no_dtype_is_held_to_what_it_has_shown(folder):
    for dtype, expected in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        context, engine = engine_context(folder), CopyingEngine(dtype)
        sync = sync_of(engine, context)
        del engine.dtype
        assert sync._explained_by_rounding() == 0.2
        sync.start()
        assert sync._explained_by_rounding() == expected


def test_the_bound_is_a_setting_and_infinity_is_no_probe(folder):
    context = engine_context(folder)
    sync_of(NeverSyncs(), context, tolerance=50.0).start()
    engine = NeverSyncs()
    engine.generate = lambda *args, **kwargs: pytest.fail("nothing is to be sampled")
    sync_of(engine, context, tolerance=math.inf).start()


def test_a_probe_leaves_random_streams_and_modes_as_they_were(folder):
    context = engine_context(folder)
    context.policy.train()
    context.policy.lm_head.eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    engine = CopyingEngine()
    sync_of(engine, context).start()
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert context.policy.training and not context.policy.lm_head.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in context.policy.parameters())


@pytest.mark.parametrize("length", [2, 3, 8])
def test_a_probe_fits_into_the_shortest_lengths(length, folder):
    context = engine_context(folder, max_model_len=length)
    engine = TransformersEngine()
    engine.start(context)
    assert log_prob_difference(engine, context.policy, context).largest < 1e-5


def test_weights_with_which_the_policy_computes_no_numbers_are_not_tried(folder, monkeypatch):
    context = engine_context(folder)
    monkeypatch.setattr("tealightning.rollouts.weight_sync.gives_finite_log_probs", lambda *_: False)
    engine = CopyingEngine()
    sync = sync_of(engine, context)
    with pytest.warns(UserWarning, match="could not be tried"):
        sync.start()
    assert engine.syncs == 1
