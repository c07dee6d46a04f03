"""Best-of-n over prompts: measured, extrapolated, and as a curve."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tealightning.checks import check_share
from tealightning.errors import UserError
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import extrapolated_best_of_n
from tealightning.metrics.prompt_samples import PromptSamples


def check_budgets(name: str, ns: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """`ns` as a tuple if it holds different integers of at least 1, else a ValueError that names `name`."""
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
        self.alpha = check_share("alpha", alpha)

    def compute(self) -> dict[str, Tensor]:
        """The keys that the class describes, each a float64 scalar."""
        _, samples = self._pooled()
        valid, width = ~samples.isnan(), samples.shape[1]
        beyond = [n for n in self.ns if len(samples) and n > width]
        result: dict[str, Tensor] = {}
        measured = mean_over_prompts(best_of_n(samples, self.ns, valid))
        for n, mean, error, num_prompts in zip(self.ns, *measured, strict=True):
            if n not in beyond:
                result[f"best_of_{n}"], result[f"best_of_{n}_se"] = mean, error
                if num_prompts < len(samples):
                    result[f"best_of_{n}_prompts"] = num_prompts.double()
        if ns := list(dict.fromkeys([*self.extrapolate_ns, *beyond])):
            fitted = mean_over_prompts(extrapolated_best_of_n(samples, ns, alpha=self.alpha, valid=valid))
            for n, mean, error, _ in zip(ns, *fitted, strict=True):
                result[f"best_of_{n}_extrapolated"], result[f"best_of_{n}_extrapolated_se"] = mean, error
        return result

    def per_prompt(self) -> tuple[Tensor, Tensor]:
        """Keys [Q] and best-of-n [Q, len(ns)] float64 (NaN: too few samples), for `paired_difference`; see `pooled`."""
        keys, samples = self.pooled()
        return keys, best_of_n(samples, self.ns, ~samples.isnan())

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """Plot best-of-n over n with standard errors, extrapolated budgets as open circles; returns figure and axis.

        `val` is a result of `compute` or `forward`, or several, each a curve of its own; None = the result now.
        """
        import matplotlib.pyplot as plt

        results = [self.compute()] if val is None else [val] if isinstance(val, Mapping) else val
        fig, ax = plt.subplots() if ax is None else (ax.figure, ax)
        for i, result in enumerate(results):
            for kind, style, fill in (("", "o-", "full"), ("_extrapolated", "o", "none")):
                matches = (re.fullmatch(rf"best_of_(\d+){kind}", key) for key in result)
                keys = sorted((int(match[1]), match[0]) for match in matches if match)
                if keys:
                    means = [float(result[key]) for _, key in keys]
                    errors = [float(result[f"{key}_se"]) for _, key in keys]
                    ns = [n for n, _ in keys]
                    ax.errorbar(ns, means, errors, fmt=style, color=f"C{i}", fillstyle=fill, capsize=2)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("n")
        ax.set_ylabel("best of n")
        return fig, ax
