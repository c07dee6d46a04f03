"""Optimizers: built for a policy, and tried before anything is loaded; Muon together with AdamW."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from tealightning.errors import UserError
from tealightning.training.policy_weights import shard

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the weight matrices of the layers, and AdamW for all else: embeddings, output
    layer, norms, biases, and the fused experts of a mixture, which are no matrices.

    `torch.optim.Muon` as `model.optimizer` means this class, with the same arguments.

    Args:
        params: Groups with `use_muon` (true or false), as `build_optimizer` makes them.
        lr: Learning rate of the matrices.
        weight_decay: Of the matrices.
        adjust_lr_fn: `match_rms_adamw` gives updates the size of AdamW's, so that its learning rates fit; `original`
            is Muon's own size, whose usual learning rate is 0.02.
        adamw_lr: Learning rate of all else; None = `lr`.
        adamw_betas: Of AdamW.
        adamw_eps: Of AdamW.
        adamw_weight_decay: Of all else.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = _groups(groups, {id(p) for p in groups if p.ndim == 2})
        matrices, others = ([group for group in groups if group["use_muon"] is use] for use in (True, False))
        settings: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "eps": eps,
        }
        settings |= {"ns_coefficients": tuple(ns_coefficients), "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self._muon = Muon(matrices, **settings)
        self._adamw = AdamW(
            others,
            lr=lr if adamw_lr is None else adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=adamw_weight_decay,
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both, on the groups and the state that this optimizer has: loading replaces them."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for part, use in ((self._muon, True), (self._adamw, False)):
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is use]
            part.state = self.state
            part.step()


def build_optimizer(make: Callable[[Any], Optimizer], policy: nn.Module) -> Optimizer:
    """The optimizer of the policy's trainable parameters. Muon is told which of them are matrices of layers."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    probe = make([nn.Parameter(torch.zeros(2, 2))])
    if not isinstance(probe, (Muon, MuonWithAdamW)):
        return make(trained)
    groups = _groups(trained, _layer_matrices(policy))
    return make(groups) if isinstance(probe, MuonWithAdamW) else MuonWithAdamW(groups, **probe.defaults)


def _groups(params: Iterable[nn.Parameter], matrices: set[int]) -> list[dict[str, Any]]:
    """What is in `matrices`, by id, and what is not."""
    both: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in params:
        both[id(p) in matrices].append(p)
    return [{"params": chosen, "use_muon": use} for use, chosen in both.items()]


def _layer_matrices(policy: nn.Module) -> set[int]:
    """Ids of the weight matrices of layers: neither of an embedding nor of the output layer, tied or not."""
    head = getattr(policy, "get_output_embeddings", lambda: None)()
    outer = [m for m in policy.modules() if isinstance(m, nn.Embedding)] + ([] if head is None else [head])
    excluded = {id(p) for module in outer for p in module.parameters()}
    weights = (getattr(module, "weight", None) for module in policy.modules())
    return {id(w) for w in weights if isinstance(w, nn.Parameter) and w.ndim == 2} - excluded


def switch_weights(optimizer: Any, mode: str) -> None:
    """Let an optimizer whose weights differ between training and evaluation (schedule-free ones have the methods
    `train` and `eval`) put those of `mode` in place; the weights of all others are the same."""
    if has_two_weights(optimizer):
        getattr(optimizer, mode)()


def has_two_weights(optimizer: Any) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def try_optimizer(make: Callable[[Any], Optimizer], device: torch.device, mesh: Any = None) -> Optimizer:
    """The optimizer of a model of one small layer, after a step, a change to evaluation and back, and a checkpoint;
    a UserError says what an optimizer cannot do that training needs. With a mesh the layer is sharded over it."""
    layer = nn.utils.skip_init(nn.Linear, 4, 4, device=device)
    if mesh is not None:
        shard(layer, mesh)
    for p in layer.parameters():
        nn.init.constant_(p, 0.5)
        p.grad = torch.full_like(p, 0.25)
    optimizer = build_optimizer(make, layer)
    name = type(optimizer).__name__
    for setting, value in optimizer.defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{setting} must be a finite number, got {value}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{name} is not supported: its step() computes the loss again, several times, and here a loss needs new "
            "rollouts. Use an optimizer of gradients alone, such as AdamW, SGD or MuonWithAdamW."
        )
    calls: list[None] = []
    doing = "make a step with dense gradients"
    try:
        switch_weights(optimizer, "train")
        optimizer.step(closure=lambda: calls.append(None) or 0.0)  # type: ignore[func-returns-value]
        doing = "change between the weights of evaluation and training"
        for mode in ("eval", "train"):
            switch_weights(optimizer, mode)
        doing = "load its own state, as a resumed run does"
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure=lambda: calls.append(None) or 0.0)  # type: ignore[func-returns-value]
    except Exception as error:  # whatever a class of any origin raises: it would end the run at the same place
        raise UserError(f"{name} is not supported: it cannot {doing} ({type(error).__name__}: {error}).") from error
    if mesh is not None and has_two_weights(optimizer):
        raise UserError(f"{name} is not supported with sharded weights, of which a checkpoint holds one set: use ddp.")
    if len(calls) != 2:
        raise UserError(
            f"{name} is not supported: its step(closure) has to call the closure, which runs Lightning's hooks."
        )
    return optimizer
