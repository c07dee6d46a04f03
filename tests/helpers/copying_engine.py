"""An engine with weights of its own, as vLLM has, without vLLM; and ways to get their update wrong."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tealightning.rollouts import TransformersEngine


class CopyingEngine(TransformersEngine):
    """Samples from a copy of the policy, in `dtype`."""

    shares_weights = False

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = self.holds = dtype
        self.syncs = 0

    def start(self, context: Any) -> None:
        super().start(replace(context, policy=copy.deepcopy(context.policy).to(self.holds)))

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        held = dict(self._context.policy.named_parameters(remove_duplicate=False))
        for name, tensor in self.taken(list(weights)):
            held[name].data.copy_(tensor)
        self.syncs += 1

    def taken(self, weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return weights


class NeverSyncs(CopyingEngine):
    def taken(self, weights):
        return []


class DropsEverySecondTensor(CopyingEngine):
    def taken(self, weights):
        return weights[::2]


class SyncsOnce(CopyingEngine):
    def taken(self, weights):
        return weights if self.syncs <= 1 else []  # of the weights as loaded, and of those after the first step


class StepsAhead(CopyingEngine):
    """Passes for one that works elsewhere."""

    is_concurrent = True


class NeverSyncsAhead(NeverSyncs):
    is_concurrent = True
