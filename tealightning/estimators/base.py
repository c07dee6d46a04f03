"""The contract of an advantage estimator."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.registry import Registry, snake_case

ESTIMATORS = Registry("estimator")


class AdvantageEstimator(ABC):
    """Map the rewards of each prompt's group to advantages, in the *mean convention*:

        (1/m) * sum_i A_i * grad log pi(y_i | x)

    estimates the gradient of the estimator's objective for that prompt. A subclass holds its hyperparameters
    (keyword-only) and implements `compute` for a full group; the `valid` mask, dtypes and the group-size check are
    handled here, once.
    """

    registry: ClassVar[Registry] = ESTIMATORS
    objective: ClassVar[str] = ""  # what it ascends, for tables: "E[max of N]"
    lowest_reward: ClassVar[float] = -math.inf  # rewards below it are refused ...
    rewards_advice: ClassVar[str] = ""  # ... and this ends the message: what to do instead

    @property
    def name(self) -> str:
        """The snake_case of the class name: the registry key, the YAML file, the table row, the doc page."""
        return snake_case(type(self).__name__)

    @property
    def min_group_size(self) -> int:
        """Fewest rollouts a group needs; smaller groups (after unscorable ones are left out) get zeros."""
        return 1

    @property
    def has_off_policy_form(self) -> bool:
        """True: `compute_off_policy` is exact for rollouts of another policy than the one that is trained."""
        return False

    @abstractmethod
    def compute(self, rewards: Tensor) -> Tensor:
        """Advantages [P, m] float64 of finite rewards [P, m] float64, m >= min_group_size."""

    def compute_off_policy(self, rewards: Tensor, ratios: Tensor) -> Tensor:
        """The same for rollouts of a policy mu when pi is trained; `ratios` [P, m] float64 are `pi/mu` of completions.

        A ValueError unless the estimator has such a form.
        """
        raise UserError(f"{self.name} has no off-policy form.")

    def check_group_size(self, group_size: int) -> None:
        """Raise a ValueError that says which parameter to change if `group_size` is too small."""
        if group_size < self.min_group_size:
            raise UserError(
                f"{self.name} needs at least {self.min_group_size} rollouts a prompt, got group_size={group_size}: "
                f"{self.group_size_advice}"
            )

    @property
    def group_size_advice(self) -> str:
        """The end of the message of `check_group_size`: which parameter to change."""
        return f"raise group_size to {self.min_group_size} or more."

    def __call__(self, rewards: Tensor, valid: Tensor | None = None) -> Tensor:
        """Advantages [P, m] of every group, computed in float64, in the dtype of `rewards`.

        Args:
            rewards: [P, m] float; NaN or inf counts as unscorable.
            valid: [P, m] bool, False = unscorable: gets 0 and takes no part in any statistic. The others are
                weighted as a group of that smaller size (mean convention over the valid ones); groups with fewer than
                `min_group_size` of them are all zeros.

        Raises:
            ValueError: if shapes do not fit, rewards are not floating point, m < min_group_size, or a reward is below
                `lowest_reward`.
        """
        if rewards.ndim != 2 or not rewards.is_floating_point():
            raise ValueError(
                f"{self.name}: rewards must be a float tensor of shape [P, m], "
                f"got {rewards.dtype} {tuple(rewards.shape)}."
            )
        if valid is not None and valid.shape != rewards.shape:
            raise ValueError(
                f"{self.name}: valid must have the shape of rewards {tuple(rewards.shape)}, got {tuple(valid.shape)}."
            )
        return self._by_group_size(self.compute, valid, rewards)

    def off_policy(self, rewards: Tensor, ratios: Tensor, valid: Tensor | None = None) -> Tensor:
        """Advantages at a policy that has moved on since the rollouts were sampled, for an estimator with such a form.

        `ratios` [P, m] are the probability of each completion now over that when it was sampled; the rest is as in
        `__call__`. `(1/m) sum_i A_i grad log pi(y_i | x)` estimates the gradient at the policy as it is now.
        """
        return self._by_group_size(self.compute_off_policy, valid, rewards, ratios)

    def _by_group_size(
        self, compute: Callable[..., Tensor], valid: Tensor | None, rewards: Tensor, *ratios: Tensor
    ) -> Tensor:
        """Call `compute` on the valid rollouts of all groups that have equally many; the others get 0."""
        self.check_group_size(rewards.shape[1])
        finite = torch.isfinite(rewards)
        usable = finite if valid is None else finite & valid.bool()
        if self.lowest_reward > -math.inf and bool((rewards[usable] < self.lowest_reward).any()):
            lowest = float(rewards[usable].min())
            raise UserError(
                f"{self.name} takes rewards of at least {self.lowest_reward:g}, got {lowest:.4g}: {self.rewards_advice}"
            )
        advantages = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
        counts = usable.sum(dim=1)
        # One dense call for each number of valid rollouts (nearly always one): estimators never see a mask.
        for count in counts.unique().tolist():
            if count < self.min_group_size:
                continue
            members = usable & (counts == count)[:, None]
            dense = (values.detach().double()[members].view(-1, count) for values in (rewards, *ratios))
            advantages[members] = compute(*dense).reshape(-1)
        return advantages.to(rewards.dtype)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({arguments})"
