import sys

import lightning.pytorch as pl
import pytest
import torch
from module_fixtures import make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama, trained
from transformers import AutoModelForCausalLM

from tealightning import LoRA, PolicyGradientLoss, PostTrainingModule
from tealightning.diagnostics.pool import LinearProjection, score_vectors
from tealightning.estimators import build_estimator
from tealightning.training import policy_module as module_file
from tealightning.training.lora import adapter_off, add_adapter
from tealightning.training.policy_weights import policy_weights, weight_names
from tealightning.training.scoring import score_completions

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]
ROWS = torch.arange(8)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, *, kl_coef=0.0, lr=0.1, **kwargs):
    settings = {"lora": LoRA(rank=4, alpha=8), "gradient_clip_norm": None} | kwargs
    return PostTrainingModule(
        policy=policy,
        estimator=build_estimator("grpo"),
        loss=PolicyGradientLoss(kl_coef=kl_coef),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        **settings,
    )


def fitted(policy, *, steps=3, **kwargs):
    """A module after some steps, its trainer, and the gradient and metrics of each step."""
    torch.manual_seed(0)  # of the matrix A
    module = module_of(policy, **kwargs)
    keep = KeepMetrics()
    trainer, gradients = run_steps(module, [make_batch(make_rollouts(REWARDS, seed=i)) for i in range(steps)], [keep])
    return module, trainer, gradients, keep.metrics


class KeepMetrics(pl.Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *args):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@torch.no_grad()
def log_probs(model, seed=9):
    """Of left-padded prompts and completions of several lengths."""
    return score_completions(model, make_rollouts(REWARDS, seed=seed), ROWS).log_probs


def adapted(seed=0, model=None, **settings):
    """A model whose adapter has been trained: neither matrix is zero."""
    model = tiny_llama() if model is None else model
    add_adapter(model, LoRA(**{"rank": 4} | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"lora\.rank must be an integer of at least 1, got 0"),
        ({"alpha": 0.0}, r"lora\.alpha must be a finite number above 0, got 0\.0"),
        ({"target_modules": []}, r"lora\.target_modules is empty"),
    ],
)
def test_lora_refuses_settings_that_train_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["query"], r"model\.lora\.target_modules=\['query'\] does not fit the policy"),
        (["norm"], r"model\.lora\.target_modules=\['norm'\] does not fit the policy"),
        (["q_proj", "lm_head"], r"this policy ties \(model\.embed_tokens\.weight, lm_head\.weight\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_add_adapter_names_what_cannot_be_adapted(target, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(tiny_llama(), LoRA(target_modules=target))


def test_add_adapter_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "tealightning\[lora\]"'):
        add_adapter(tiny_llama(), LoRA())


def test_new_adapter_leaves_every_log_prob_as_it_is(policy):
    module = module_of(policy)
    module.configure_model()
    assert torch.equal(log_probs(module.policy), log_probs(tiny_llama()))
    assert not any(submodule.training for submodule in module.policy.modules())


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("all-linear", {"self_attn": 8, "mlp": 6}),
        (["q_proj", "v_proj"], {"self_attn": 4}),
        (r".*\.1\.mlp\.up_proj", {"mlp": 1}),
    ],
)
def test_the_targeted_weights_move_and_no_others(target, layers):
    loaded = dict(tiny_llama().named_parameters(remove_duplicate=False))
    merged = policy_weights(adapted(target_modules=target))
    moved = [name.split(".")[3] for name, tensor in merged if not torch.equal(tensor, loaded[name])]
    assert {kind: moved.count(kind) for kind in set(moved)} == layers


def test_training_moves_the_adapter_and_nothing_else(policy):
    module, trainer, gradients, _ = fitted(policy)
    names = {name for name, parameter in module.policy.named_parameters() if parameter.requires_grad}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * 2 * len(LINEAR)
    assert gradients[0].numel() == sum(parameter.numel() for parameter in trained(module.policy))
    loaded = dict(tiny_llama().named_parameters())
    for name, parameter in module.policy.named_parameters():
        if name not in names:
            assert parameter.grad is None
            assert torch.equal(parameter, loaded[name.replace(".base_layer", "")])
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in trained(module.policy)}
    assert (log_probs(module.policy) - log_probs(tiny_llama())).abs().max() > 1e-2


def test_gradients_of_the_adapter_follow_from_those_of_the_merged_weights(policy, tmp_path):
    """dL/dB = scale * dL/dW A^T and dL/dA = scale * B^T dL/dW."""
    module = module_of(policy, lr=0.0)
    module.configure_model()
    with torch.no_grad():
        for parameter in trained(module.policy):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module.export(str(tmp_path / "merged"))
    merged = module_of(str(tmp_path / "merged"), lora=None, lr=0.0)
    batch = make_batch(make_rollouts(REWARDS))
    run_steps(module, [batch])
    run_steps(merged, [batch])
    full = dict(merged.policy.named_parameters())
    for name, layer in module.policy.named_modules():
        if name.split(".")[-1] in LINEAR:
            gradient, a, b = full[f"{name}.weight"].grad, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert torch.allclose(b.grad, 2.0 * gradient @ a.T, atol=1e-5), name
            assert torch.allclose(a.grad, 2.0 * b.T @ gradient, atol=1e-5), name
            assert a.grad.abs().max() > 1e-4


def test_gradient_checkpointing_changes_no_gradient_of_the_adapter(policy):
    plain, checkpointed = (fitted(policy, gradient_checkpointing=on)[2] for on in (False, True))
    for expected, found in zip(plain, checkpointed, strict=True):
        assert expected.abs().max() > 1e-3
        assert torch.allclose(expected, found, atol=1e-5)


def test_kl_starts_at_zero_and_its_reference_stays_the_loaded_policy(policy):
    module, _, _, metrics = fitted(policy, kl_coef=0.5)
    assert metrics[0]["train/kl"] == 0.0
    assert metrics[2]["train/kl"] > 1e-3
    before = [parameter.clone() for parameter in trained(module.policy)]
    assert torch.equal(log_probs(module.reference), log_probs(tiny_llama()))
    assert not torch.equal(log_probs(module.policy), log_probs(tiny_llama()))
    assert all(torch.equal(p, q) for p, q in zip(trained(module.policy), before, strict=True))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_adapter_that_is_off_is_the_reference_that_would_be_loaded(policy, monkeypatch, gradient_checkpointing):
    loads = []
    load = module_file.load_policy
    monkeypatch.setattr(module_file, "load_policy", lambda path, **kwargs: loads.append(path) or load(path, **kwargs))
    # The plain pass: the reference would compute its prompts once, which a checkpointed policy does not.
    settings = {"kl_coef": 0.5, "inner_epochs": 2, "gradient_checkpointing": gradient_checkpointing}
    settings["share_prompts"] = not gradient_checkpointing
    _, _, switched, metrics = fitted(policy, **settings)
    assert len(loads) == 1
    _, _, loaded, expected = fitted(policy, reference=policy, **settings)
    assert len(loads) == 3
    assert all(torch.equal(a, b) for a, b in zip(switched, loaded, strict=True))
    assert [step["train/kl"] for step in metrics] == [step["train/kl"] for step in expected]


def test_adapter_is_on_again_after_an_error():
    model = adapted()
    expected = log_probs(model)
    with pytest.raises(KeyError), adapter_off(model):
        assert not torch.equal(log_probs(model), expected)
        raise KeyError
    assert torch.equal(log_probs(model), expected) and len(trained(model)) == 28


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_weights_are_the_sum_under_the_names_of_the_policy(rank_stabilized):
    model = adapted(alpha=6, rank_stabilized=rank_stabilized)
    scale = 6 / (2 if rank_stabilized else 4)
    merged = dict(policy_weights(model))
    assert merged.keys() == weight_names(model) == {name for name, _ in tiny_llama().named_parameters()}
    layer = model.model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + scale * b @ a
    assert torch.allclose(merged["model.layers.1.mlp.down_proj.weight"], expected, atol=1e-6)
    assert not any(tensor.requires_grad for tensor in merged.values())
    assert list(dict(policy_weights(torch.compile(model)))) == list(merged)


def test_merged_weights_are_computed_layer_by_layer(monkeypatch):
    from peft.tuners.lora.layer import Linear

    model, calls = adapted(), []
    compute = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: calls.append(name) or compute(self, name))
    weight_names(model)
    assert calls == []
    for name, _ in policy_weights(model):
        layer = name.split(".")[2]
        done = int(layer) + 1 if layer.isdigit() else len(calls) // len(LINEAR)
        assert len(calls) == len(LINEAR) * done, name
    assert len(calls) == 2 * len(LINEAR)


def test_adapter_of_a_bfloat16_policy_is_float32_and_merges_into_bfloat16():
    model = adapted(model=tiny_llama().to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    assert {tensor.dtype for _, tensor in policy_weights(model)} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_export_is_the_adapted_policy_without_an_adapter(policy, tied, tmp_path):
    module = module_of(policy)
    module.configure_model()
    if not tied:
        module.policy.lm_head.weight = torch.nn.Parameter(module.policy.lm_head.weight.detach() * 1.5, False)
        module.policy.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in trained(module.policy):
            parameter.add_(0.1)
    before = module.policy.state_dict()
    module.export(str(tmp_path))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(log_probs(exported), log_probs(module.policy), atol=1e-5)
    assert (log_probs(exported) - log_probs(tiny_llama())).abs().max() > 1e-2
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    assert [n for n, _ in exported.named_parameters()] == [n for n, _ in tiny_llama_names(tied)]
    assert not list(tmp_path.glob("adapter*"))
    assert all(torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())


def tiny_llama_names(tied):
    model = tiny_llama()
    return list(model.named_parameters(remove_duplicate=tied))


def test_checkpoint_holds_the_adapter_alone_and_restores_it(policy, tmp_path):
    module, trainer, _, _ = fitted(policy)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    state = torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]
    adapter = {f"policy.{name}": p for name, p in module.policy.named_parameters() if p.requires_grad}
    assert state.keys() == adapter.keys()
    assert all(torch.equal(state[name], value) for name, value in adapter.items())
    fresh = module_of(policy)
    fresh.configure_model()
    fresh.load_state_dict(state)
    assert torch.equal(log_probs(fresh.policy), log_probs(module.policy))


def test_checkpoint_with_an_unknown_or_without_an_adapters_weight_is_refused(policy):
    module = module_of(policy)
    module.configure_model()
    state = {name: value for name, value in module.state_dict().items() if ".lora_" in name}
    first, *_ = state
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"policy\.other\""):
        module.load_state_dict(state | {"policy.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        module.load_state_dict({name: value for name, value in state.items() if name != first})


@pytest.mark.parametrize(
    ("written", "read"),
    [(LoRA(rank=4), LoRA(rank=4, alpha=8)), (None, LoRA(rank=4)), (LoRA(rank=4), None)],
)
def test_checkpoint_of_other_settings_is_refused(policy, tmp_path, written, read):
    _, trainer, _, _ = fitted(policy, steps=1, lora=written)
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint was written with model\.lora=.*resume with the same"):
        run_steps(module_of(policy, lora=read), [make_batch(make_rollouts(REWARDS))], ckpt_path=tmp_path / "step.ckpt")


def test_gradients_of_an_adapter_can_be_projected():
    """The instruments of `diagnose gradients` see the layers that are trained."""
    model = adapted()
    projection = LinearProjection(model, size=2)
    scores = score_vectors(model, make_rollouts(REWARDS), projection)
    assert projection.covered == 1.0
    assert scores.shape == (8, 28 * 4) and (scores.abs().amax(dim=0) > 0).all()
    assert len(trained(model)) == 28
