"""Projected score vectors: the gradient of each rollout's log-prob by the policy's weights, as one short vector."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tealightning.errors import UserError
from tealightning.training.micro_batches import score_through_logits, split_rows
from tealightning.types import RolloutBatch


class LinearProjection:
    """A random projection of the gradient of every `nn.Linear` weight, seeded.

    The gradient of a weight [out, in] for one rollout is `sum_t delta_t a_t^T` (a_t the input at token t, delta_t the
    gradient of the log-prob by the output). With Gaussian `U [out, k]` and `V [in, k]` its projection is

        U^T (sum_t delta_t a_t^T) V / k = (Delta U)^T (A V) / k,    k^2 numbers,

    which never forms the gradient. Over seeds it is unbiased for inner products: `E <PG, PH> = <G, H>`, exactly.
    Weights of other modules (embeddings, norms, biases, `Conv1D`) are left out, and so are frozen ones: all gradients
    are compared on the subset of parameters that is covered. A weight that several modules share has one block. A head
    tied to the embedding counts with its part as a head.
    """

    def __init__(self, policy: nn.Module, *, size: int = 8, seed: int = 0) -> None:
        self.layers = {name: m for name, m in policy.named_modules() if isinstance(m, nn.Linear)}
        self.layers = {name: m for name, m in self.layers.items() if m.weight.requires_grad}
        if not self.layers:
            raise UserError("the policy has no trainable nn.Linear, which is what gradients are projected from.")
        self._blocks: dict[int, tuple[slice, Tensor, Tensor]] = {}
        covered = 0
        for name, layer in self.layers.items():
            if id(layer.weight) not in self._blocks:
                first = len(self._blocks) * size**2
                matrices = _gaussians(layer.weight, size, f"{seed}\0{name}")
                self._blocks[id(layer.weight)] = (slice(first, first + size**2), *matrices)
                covered += layer.weight.numel()
        self.num_features = len(self._blocks) * size**2
        """D."""
        self.covered = covered / sum(each.numel() for each in policy.parameters() if each.requires_grad)
        """Share of the policy's trainable parameters."""

    def block(self, layer: nn.Linear) -> tuple[slice, Tensor, Tensor]:
        """Where in the D features the layer's weight is, its U [out, k], and its V [in, k] divided by k."""
        return self._blocks[id(layer.weight)]


def _gaussians(weight: Tensor, size: int, key: str) -> tuple[Tensor, Tensor]:
    """U [out, k] and V [in, k] / k, from a seed that depends on the layer's name and not on the other layers."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 2
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, size, generator=generator, dtype=torch.float64) for side in weight.shape)
    return left.to(weight), (right / size).to(weight)


def score_vectors(
    policy: nn.Module,
    rollouts: RolloutBatch,
    projection: LinearProjection,
    *,
    max_tokens: int = 16_384,
    on_progress: Callable[[int], Any] = lambda rows: None,
) -> Tensor:
    """`s_i = P grad log pi(y_i | x)` [B, D] of every rollout, under the distribution that it was sampled from; float32
    on the CPU (float64 for a float64 policy).

    One forward and one backward pass per micro-batch of at most `max_tokens` padded tokens: sequences never interact,
    so the gradients of the sum of their log-probs by a layer's outputs are each rollout's own. No weight's gradient is
    computed. The policy runs in eval mode, without gradient checkpointing, and is restored afterwards. `on_progress`
    is called with the number of rollouts that each micro-batch finished.

    Raises:
        UserError: if a layer's input does not keep rollouts apart: [rows, ..., in] is expected.
    """
    dtype = torch.promote_types(next(iter(projection.layers.values())).weight.dtype, torch.float32)
    scores = torch.zeros(len(rollouts.completion_ids), projection.num_features, dtype=dtype)
    device = next(policy.parameters()).device
    lengths = rollouts.prompt_lengths, rollouts.completion_lengths
    micro_batches = split_rows(*lengths, torch.arange(len(scores)), max_tokens=max_tokens)
    rollouts = rollouts.to(device)
    with _only_activations(policy), torch.enable_grad():
        for rows in micro_batches:
            sums = torch.zeros(len(rows), projection.num_features, dtype=dtype, device=device)
            with _adding_to(sums, projection):
                score_through_logits(policy, rollouts, rows.to(device)).log_probs.sum().backward()
            scores[rows] = sums.cpu()
            on_progress(len(rows))
    return scores


@contextmanager
def _adding_to(sums: Tensor, projection: LinearProjection) -> Iterator[None]:
    """Hooks that add each rollout's projected gradient to its row of `sums` [rows, D] during backward."""

    def forward_hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        activation = inputs[0].detach()
        if activation.ndim < 3 or len(activation) != len(sums):
            raise UserError(
                f"a Linear of the policy got an input of shape {tuple(activation.shape)}, and [{len(sums)}, tokens, "
                f"{activation.shape[-1]}] was expected: policies that flatten or route tokens cannot be projected."
            )
        slot, left, right = projection.block(layer)
        seen = (activation @ right).flatten(1, -2)  # [rows, t, k]
        if not output.requires_grad:  # the first layers: no parameter before them requires a gradient now
            output.requires_grad_(True)

        def backward_hook(delta: Tensor) -> None:
            moved = (delta @ left).flatten(1, -2)
            block = torch.einsum("rti,rtj->rij", moved.to(sums.dtype), seen.to(sums.dtype))
            sums[:, slot] += block.flatten(1)

        output.register_hook(backward_hook)

    handles = [layer.register_forward_hook(forward_hook) for layer in projection.layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only_activations(policy: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no recomputation of activations) and no gradients of parameters."""
    training = [module for module in policy.modules() if module.training]
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
