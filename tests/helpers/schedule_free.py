"""`schedulefree.SGDScheduleFree` (Defazio et al., 2024) with the same contract, where that package is not installed."""

import torch


class SGDScheduleFree(torch.optim.Optimizer):
    """Parameters hold y in train mode and the average x in eval mode, as in schedulefree 1.4."""

    def __init__(self, params, lr=1.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": False})

    def _lerp(self, weight_of, train_mode):
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=weight_of(group["momentum"]))
                group["train_mode"] = train_mode

    @torch.no_grad()
    def eval(self):
        self._lerp(lambda beta: 1 - 1 / beta, False)

    @torch.no_grad()
    def train(self):
        self._lerp(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise Exception("Optimizer was not in train mode when step is called.")
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(end=z, weight=share)
                p.add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1
