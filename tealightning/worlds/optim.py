"""The optimizers and the schedule that both training loops share."""

import math
from collections.abc import Callable

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
    """

    def __init__(self, model: nn.Module, *, steps: int, adamw_lr: float, muon_lr: float, weight_decay: float) -> None:
        self.parameters = list(model.parameters())
        layers, matrices, vectors = _groups(model)
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.95)),
            torch.optim.Muon(layers, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
