"""Best-of-n curves over prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import extrapolated_best_of_n


def check_budgets(name: str, ns: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """`ns` as a tuple if it holds different integers of at least 1.

    Raises:
        ValueError: naming `name` and what is wrong.
    """
    budgets = tuple(ns)
    wrong = [n for n in budgets if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong or len(set(budgets)) != len(budgets) or not (budgets or may_be_empty):
        raise ValueError(f"{name} must hold different integers of at least 1, for example [1, 4, 16]; got {list(ns)}.")
    return budgets


class BestOfN(Metric):
    """Unbiased `E[max of n rewards]`, averaged over prompts, with a standard error clustered by prompt.

    `compute()` returns float64 scalars:

    - `best_of_{n}` for each n of `ns`: mean over the prompts with at least n scored samples of
      `functional.best_of_n.best_of_n` (no bootstrap: that is biased low);
    - `best_of_{n}_se`: its standard error, with the prompt as the unit (NaN for a single prompt);
    - `best_of_{n}_prompts`: how many prompts counted, only when some had to be left out;
    - `best_of_{n}_extrapolated` and `..._extrapolated_se`: `mu_a + ct_n sigma_a` from each prompt's own upper tail, for
      n of `extrapolate_ns`, and for n of `ns` that no prompt has samples for: those have no measured key at all.

    Samples of a prompt that arrive in several updates, or on several ranks, are pooled by key. Without keys every row
    is a prompt of its own. Before any update every measured key is NaN.

    Args:
        ns: Budgets to measure.
        extrapolate_ns: Budgets to extrapolate to.
        alpha: Upper-tail level of the extrapolation, in (0, 1].

    Raises:
        ValueError: for budgets or an alpha out of range.
    """

    full_state_update = False
    higher_is_better = True

    rewards: list[Tensor]  # each [samples] float64, all scored samples, prompt after prompt
    counts: list[Tensor]  # each [P] int64, samples of each prompt
    keys: list[Tensor]  # each [P] int64, or nothing at all where no keys are given

    def __init__(
        self,
        ns: Sequence[int] = (1, 4, 16, 64, 128),
        extrapolate_ns: Sequence[int] = (),
        alpha: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ns = check_budgets("ns", ns)
        self.extrapolate_ns = check_budgets("extrapolate_ns", extrapolate_ns, may_be_empty=True)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha!r}.")
        self.alpha = alpha
        for state in ("rewards", "counts", "keys"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, valid: Tensor | None = None, keys: Tensor | None = None) -> None:
        """Add the samples of some prompts; M may differ between calls.

        Args:
            rewards: [P, M] float; NaN or inf = could not be scored, left out.
            valid: [P, M] bool, False = left out.
            keys: [P] int64, which prompt each row belongs to. Give them always or never.

        Raises:
            ValueError: if shapes do not fit.
        """
        if rewards.ndim != 2:
            raise ValueError(f"rewards must have shape [P, M], got {tuple(rewards.shape)}.")
        for name, given, shape in (("valid", valid, rewards.shape), ("keys", keys, rewards.shape[:1])):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(given.shape)}.")
        scored = torch.isfinite(rewards) if valid is None else torch.isfinite(rewards) & valid.bool()
        self._append(scored, rewards.detach(), keys)

    def _append(self, scored: Tensor, rewards: Tensor, keys: Tensor | None = None) -> None:
        self.rewards.append(rewards[scored].double())
        self.counts.append(scored.sum(dim=1))
        self.keys.append(scored.new_empty(0, dtype=torch.int64) if keys is None else keys.long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather from all ranks; a rank without updates takes part with empty tensors of the right dtype."""
        if not self.rewards:
            self._append(torch.empty(0, 0, dtype=torch.bool, device=self.device), torch.empty(0, 0, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The keys that the class describes, each a float64 scalar."""
        _, samples = self._pooled()
        return self._measured(samples) | self._extrapolated(samples)

    def per_prompt(self) -> tuple[Tensor, Tensor]:
        """Keys [Q] int64, sorted, and best-of-n [Q, len(ns)] float64 (NaN: too few samples), the same on every rank.

        Made for `functional.statistics.paired_difference`. Without keys they count the prompts in order of arrival,
        rank after rank. Every rank must call it.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=not self._is_synced,
            should_unsync=not self._is_synced,
            distributed_available=self.distributed_available_fn,
        ):
            keys, samples = self._pooled()
        return keys, best_of_n(samples, self.ns, ~samples.isnan())

    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Sorted keys [Q] and the samples of each prompt, [Q, M] padded with NaN."""
        rewards, counts, keys = (_concatenated(state, self.device) for state in (self.rewards, self.counts, self.keys))
        if keys.numel() == 0:
            keys = torch.arange(counts.numel(), device=counts.device)
        if keys.numel() != counts.numel():
            raise ValueError(
                f"keys were given for {keys.numel()} of {counts.numel()} prompts; give them always or never."
            )
        keys, row = keys.long().unique(return_inverse=True)
        owner, order = row.repeat_interleave(counts.long()).sort(stable=True)
        totals = owner.bincount(minlength=keys.numel())
        position = torch.arange(owner.numel(), device=owner.device) - (totals.cumsum(0) - totals)[owner]
        width = max(int(totals.max()) if totals.numel() else 0, 1)
        samples = torch.full((keys.numel(), width), float("nan"), dtype=torch.float64, device=rewards.device)
        samples[owner, position] = rewards.double()[order]
        return keys, samples

    def _measured(self, samples: Tensor) -> dict[str, Tensor]:
        """The measured keys; budgets beyond every prompt's samples have none."""
        measured = mean_over_prompts(best_of_n(samples, self.ns, ~samples.isnan()))
        result: dict[str, Tensor] = {}
        for column, n in enumerate(self.ns):
            if len(samples) and n > samples.shape[1]:
                continue
            result[f"best_of_{n}"] = measured.mean[column]
            result[f"best_of_{n}_se"] = measured.standard_error[column]
            if measured.num_prompts[column] < len(samples):
                result[f"best_of_{n}_prompts"] = measured.num_prompts[column].double()
        return result

    def _extrapolated(self, samples: Tensor) -> dict[str, Tensor]:
        """The extrapolated keys."""
        unmeasured = [n for n in self.ns if len(samples) and n > samples.shape[1]]
        ns = list(dict.fromkeys([*self.extrapolate_ns, *unmeasured]))
        if not ns:
            return {}
        fitted = mean_over_prompts(extrapolated_best_of_n(samples, ns, alpha=self.alpha, valid=~samples.isnan()))
        result: dict[str, Tensor] = {}
        for column, n in enumerate(ns):
            result[f"best_of_{n}_extrapolated"] = fitted.mean[column]
            result[f"best_of_{n}_extrapolated_se"] = fitted.standard_error[column]
        return result


def _concatenated(state: list[Tensor] | Tensor, device: torch.device) -> Tensor:
    """A list state as one tensor: synced states already are, and nothing is an empty one."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.empty(0, dtype=torch.int64, device=device)
