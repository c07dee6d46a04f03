"""Best-of-n over prompts: measured, extrapolated, and as a curve."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import extrapolated_best_of_n
from tealightning.metrics.prompt_samples import PromptSamples


def check_budgets(name: str, ns: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """`ns` as a tuple if it holds different integers of at least 1.

    Raises:
        ValueError: naming `name` and what is wrong.
    """
    budgets = tuple(ns)
    wrong = [n for n in budgets if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong or len(set(budgets)) != len(budgets) or not (budgets or may_be_empty):
        raise UserError(f"{name} must hold different integers of at least 1, for example [1, 4, 16]; got {list(ns)}.")
    return budgets


class BestOfN(PromptSamples):
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

    Example:
        >>> import torch
        >>> metric = BestOfN(ns=(1, 2))
        >>> metric.update(torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
        >>> {key: round(value.item(), 3) for key, value in metric.compute().items()}
        {'best_of_1': 0.5, 'best_of_1_se': 0.25, 'best_of_2': 0.75, 'best_of_2_se': 0.25}
    """

    higher_is_better = True

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
            raise UserError(f"alpha must be in (0, 1], got {alpha!r}.")
        self.alpha = alpha

    def compute(self) -> dict[str, Tensor]:
        """The keys that the class describes, each a float64 scalar."""
        _, samples = self._pooled()
        return self._measured(samples) | self._extrapolated(samples)

    def per_prompt(self) -> tuple[Tensor, Tensor]:
        """Keys [Q] int64, sorted, and best-of-n [Q, len(ns)] float64 (NaN: too few samples), the same on every rank.

        Made for `functional.statistics.paired_difference`. Without keys they count the prompts in order of arrival,
        rank after rank. Every rank must call it.
        """
        keys, samples = self.pooled()
        return keys, best_of_n(samples, self.ns, ~samples.isnan())

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """Plot best-of-n over n with standard errors; extrapolated budgets are open circles.

        Args:
            val: A result of `compute` or `forward`, or several, each a curve of its own; None = the result now.
            ax: Axis to draw on; None = one of a new figure.

        Returns:
            Figure and axis.
        """
        import matplotlib.pyplot as plt

        results = [self.compute()] if val is None else [val] if isinstance(val, Mapping) else val
        fig, ax = plt.subplots() if ax is None else (ax.figure, ax)
        for i, result in enumerate(results):
            for kind, style in (("", "o-"), ("_extrapolated", "o")):
                matches = (re.fullmatch(rf"best_of_(\d+){kind}", key) for key in result)
                keys = {int(match[1]): match[0] for match in matches if match}
                ns = sorted(keys)
                means = [float(result[keys[n]]) for n in ns]
                errors = [float(result[f"{keys[n]}_se"]) for n in ns]
                fill = "none" if kind else "full"
                if ns:
                    ax.errorbar(ns, means, errors, fmt=style, color=f"C{i}", fillstyle=fill, capsize=2)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("n")
        ax.set_ylabel("best of n")
        return fig, ax

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
