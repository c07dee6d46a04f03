"""The optimizers and the schedule that both training loops share."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Descent:
    """One training step: clipped gradients, Muon on the layers' matrices, AdamW on everything else, a shared schedule.

    Muon (Jordan et al., 2024) orthogonalises each matrix's momentum. From scratch on a small corpus it reaches in 300
    steps a held-out loss for which AdamW needs several times as many.

    Args:
        model: What is trained.
        steps: Length of the schedule: linear warm-up over the first 5%, cosine decay to a tenth of the peak.
        adamw_lr: Peak learning rate of embeddings, heads and norms.
        muon_lr: Peak learning rate of the layers' matrices, on AdamW's scale.
        weight_decay: Decoupled weight decay of the matrices (norms have none).
        muon: `torch.optim.Muon`, or `Float32Muon`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        adamw_lr: float,
        muon_lr: float,
        weight_decay: float,
        muon: Callable[..., torch.optim.Optimizer] = torch.optim.Muon,
    ) -> None:
        self.parameters = list(model.parameters())
        layers, matrices, vectors = _groups(model)
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.95)),
            muon(layers, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        schedule = warmup_cosine(steps)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in self.optimizers]

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of `loss`."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its matrix products in float32: a CPU without bfloat16 products needs a twentieth of the
    time.

    Args:
        params: Matrices.
        lr: Learning rate, on AdamW's scale.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the Nesterov momentum.
        adjust_lr_fn: "match_rms_adamw", the only one.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        assert adjust_lr_fn == "match_rms_adamw", adjust_lr_fn
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; there is no closure."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with about the singular vectors of `matrix` and singular values near 1, by five Newton-Schulz steps."""
    x = matrix / matrix.norm().clamp_min(1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear to 1 over the first 5% of `steps`, then a cosine down to 0.1."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The layers' matrices, the other matrices (embeddings and heads), the vectors."""
    layers: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        else:
            (layers if ".layers." in name else matrices).append(parameter)
    return layers, matrices, vectors
