"""Projected score vectors against per-rollout gradients from autograd."""

import pytest
import torch
from module_fixtures import make_rollouts, tiny_llama
from torch import nn

from tealightning.diagnostics.pool import LinearProjection, score_vectors
from tealightning.training.scoring import score_completions


def gradients(policy, rollouts) -> list[dict[str, torch.Tensor]]:
    """The gradient of each rollout's log-prob by every Linear's weight, one backward pass a rollout."""
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    result = []
    for row in range(len(rollouts.completion_ids)):
        policy.zero_grad()
        score_completions(policy, rollouts, torch.tensor([row])).log_probs.sum().backward()
        result.append({name: layer.weight.grad.clone() for name, layer in layers.items()})
    return result


def projected(policy, rollouts, projection) -> torch.Tensor:
    """[B, D] by the definition: U^T G V for every weight."""
    rows = torch.zeros(len(rollouts.completion_ids), projection.num_features, dtype=torch.float64)
    for row, grads in enumerate(gradients(policy, rollouts)):
        for name, grad in grads.items():
            slot, left, right = projection.block(projection.layers[name])
            rows[row, slot] = (left.T @ grad @ right).flatten()
    return rows


@pytest.fixture
def policy():
    """A float64 Llama whose head has weights of its own."""
    model = tiny_llama().double()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1)
    return model


ROLLOUTS = make_rollouts([[0.0] * 3] * 2, sampling={"temperature": 0.7, "top_k": 20})


def test_score_vectors_are_projected_gradients(policy):
    """Float64, up to the log-probs' float32."""
    projection = LinearProjection(policy, size=3, seed=5)
    assert projection.num_features == 15 * 9  # 2 layers of 7, and the head
    expected = projected(policy, ROLLOUTS, projection)
    scores = score_vectors(policy, ROLLOUTS, projection)
    assert expected.abs().mean() > 0.1
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_score_vectors_do_not_depend_on_the_split(policy):
    projection = LinearProjection(policy, size=4)
    whole = score_vectors(policy, ROLLOUTS, projection)
    done: list[int] = []
    single = score_vectors(policy, ROLLOUTS, projection, max_tokens=1, on_progress=done.append)
    assert done == [1] * 6
    assert torch.allclose(single, whole, rtol=1e-5, atol=1e-6)


def test_score_vectors_keep_inner_products_on_average(policy):
    """Over seeds: <s_i, s_j> estimates <g_i, g_j>, here within 4 standard errors for every pair."""
    grads = torch.stack([torch.cat([g.flatten() for g in each.values()]) for each in gradients(policy, ROLLOUTS)])
    exact = grads @ grads.T
    draws = []
    for seed in range(150):
        scores = score_vectors(policy, ROLLOUTS, LinearProjection(policy, size=2, seed=seed))
        draws.append(scores @ scores.T)
    found = torch.stack(draws)
    standard_error = found.std(dim=0) / len(draws) ** 0.5
    assert ((found.mean(dim=0) - exact).abs() < 4 * standard_error).all()
    assert (standard_error.diagonal() < 0.1 * exact.diagonal()).all()


def test_projection_is_seeded_and_covers_what_it_says(policy):
    one, same, other = (LinearProjection(policy, seed=seed) for seed in (1, 1, 2))
    head = policy.lm_head
    assert torch.equal(one.block(head)[1], same.block(head)[1])
    assert not torch.equal(one.block(head)[1], other.block(head)[1])
    left_out = policy.model.embed_tokens.weight.numel() + 5 * 16  # embeddings, and a norm's weights five times
    assert one.covered == pytest.approx(1 - left_out / sum(p.numel() for p in policy.parameters()))


def test_tied_head_counts_as_a_head(policy):
    """Its part of the shared weight's gradient: what an untied head with the same values gets."""
    untied = tiny_llama().double()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    tied = tiny_llama().double()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    scores = [score_vectors(model, ROLLOUTS, LinearProjection(model)) for model in (tied, untied)]
    assert torch.allclose(*scores, rtol=1e-5, atol=1e-6)


def test_shared_weights_have_one_block_with_the_sum_of_their_gradients(policy):
    """Two layers of one weight: autograd adds their gradients, and so does the projection. One module that is called
    twice is the same thing."""
    first, second = (layer.mlp.up_proj for layer in policy.model.layers)
    second.weight = first.weight
    projection = LinearProjection(policy, size=3)
    assert projection.num_features == 14 * 9
    assert torch.allclose(
        score_vectors(policy, ROLLOUTS, projection), projected(policy, ROLLOUTS, projection), rtol=1e-5, atol=1e-5
    )
    policy.model.layers[1].mlp.up_proj = first
    again = LinearProjection(policy, size=3)
    assert torch.allclose(
        score_vectors(policy, ROLLOUTS, again), projected(policy, ROLLOUTS, again), rtol=1e-5, atol=1e-5
    )


def test_score_vectors_leave_the_policy_as_it_was(policy):
    policy.gradient_checkpointing_enable()
    policy.train()
    hooks = [len(module._forward_hooks) for module in policy.modules()]
    policy.model.embed_tokens.weight.requires_grad_(False)
    projection = LinearProjection(policy, size=3)
    scores = score_vectors(policy, ROLLOUTS, projection)
    assert policy.training and policy.model.layers[0].mlp.training
    assert {name for name, p in policy.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert [len(module._forward_hooks) for module in policy.modules()] == hooks
    policy.eval()
    policy.gradient_checkpointing_disable()
    assert torch.equal(scores, score_vectors(policy, ROLLOUTS, projection))


def test_frozen_layers_are_left_out(policy):
    policy.model.layers[0].requires_grad_(False)
    projection = LinearProjection(policy, size=3)
    assert projection.num_features == 8 * 9
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable nn\.Linear"):
        LinearProjection(policy)


def test_layers_that_see_flat_tokens_are_refused(policy):
    def flat(layer, inputs):
        return (inputs[0].flatten(0, 1),)

    policy.model.layers[0].mlp.up_proj.register_forward_pre_hook(flat)
    with pytest.raises(ValueError, match="policies that flatten or route tokens cannot be projected"):
        score_vectors(policy, ROLLOUTS, LinearProjection(policy))
