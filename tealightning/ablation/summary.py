"""Summarise the results of an ablation in sentences made from its numbers."""

from collections.abc import Sequence

from tealightning.ablation.tables import BUDGETS, START, ResultsView, Row, split_name
from tealightning.reporting.tables import rounded


def summary(view: ResultsView) -> list[str]:
    """The findings as sentences: who leads, what survives the correction, the start, gold, equal KL, held-out prompts.

    Nothing is said about what was not measured.
    """
    split, *others = [split for split in view.splits if view.policies(split).keys() - {START}] or [None]
    if split is None or split != view.main_split:
        return ["No run has finished: there is nothing to compare yet."]
    sentences = [
        _leader(view, split),
        _setting(view, split),
        _corrected(view, split),
        _mean_leader(view, split),
        _against_start(view, split),
        _gold_leader(view, split),
        _equal_kl_leader(view, split),
        *(_leader(view, other) for other in others if other),
    ]
    return [sentence for sentence in sentences if sentence]


def failures(view: ResultsView) -> list[str]:
    """A line for each run that did not finish, failed ones first: which, and of its error the last line."""
    runs = [run for run in view.results.get("runs") or () if run["status"] != "finished"]
    lines = []
    for run in sorted(runs, key=lambda run: run["status"] != "failed"):
        error = str(run.get("error") or "").strip()
        error = error.splitlines()[-1] if error.startswith("Traceback") else " ".join(error.split())
        reason = f": {error[:300]}{' …' if len(error) > 300 else ''}" if error else ""
        lines.append(f"{view.label(run['variant'])}, seed {run['seed']}: {run['status']}{reason}")
    return lines


def notices(view: ResultsView) -> list[str]:
    """What a reader should know before trusting a comparison: different commits, different numbers of seeds."""
    lines = []
    finished = [run for run in view.results.get("runs") or () if run["status"] == "finished"]
    commits = sorted({str(run["commit"]) for run in finished if run.get("commit")})
    if len(commits) > 1:
        lines.append(f"The runs come from {len(commits)} different commits: {', '.join(commits)}.")
    seeds = {name: sum(run["variant"] == name for run in finished) for name in view.names}
    most = max(seeds.values(), default=0)
    if fewer := [f"{view.label(name)} {count}" for name, count in seeds.items() if count < most]:
        lines.append(f"Not every variant has {_counted(most, 'finished seed')}: {', '.join(fewer)}.")
    return lines


def methods(view: ResultsView) -> list[str]:
    """How the numbers came about: what was held equal, on what, and the statistics."""
    seeds = sorted({run["seed"] for run in view.results.get("runs") or ()})
    contents = {split: view.results["splits"][split] for split in view.splits}
    return [
        f"Every run got {_equal(view)}; what else it spent is in the budgets.",
        *([f"Seeds: {', '.join(map(str, seeds))}, the same for every variant."] if seeds else []),
        *(
            f"{split_name(split).capitalize()}: {_counted(one['num_prompts'], 'prompt')}, {one['samples_per_prompt']} "
            "samples of each, with the same prompts and sampling seeds for every variant."
            for split, one in contents.items()
        ),
        *(view.results.get("statistics") or ()),
    ]


def _setting(view: ResultsView, split: str) -> str:
    """How much was run and measured."""
    content = view.results["splits"][split]
    seeds = sorted({len(policy["seeds"]) for name, policy in view.policies(split).items() if name != START})
    few = "" if seeds[0] == seeds[-1] else f"{seeds[0]} to "
    return (
        f"Compared are {_counted(len(view.names), 'variant')} with {few}{_counted(seeds[-1], 'finished seed')} each, "
        f"{_equal(view)} a run, on {content['num_prompts']} {split_name(split)} with {content['samples_per_prompt']} "
        f"samples a prompt; {view.interval} intervals in brackets."
    )


def _leader(view: ResultsView, split: str) -> str:
    """Who has the highest best-of-n at the headline n, and by how much against the reference; where the reference
    leads, who is second."""
    n, where, ranked = view.headline_n, split_name(split), _ranked(view, split, "best_of_n", view.headline_n)
    if not ranked:
        return f"There is no best-of-{n} on the {where}."
    (name, value), *others = ranked
    text = f"At n = {n} on the {where}, {view.label(name)} has the highest best-of-n, {_number(value)}"
    gap = f": {{}} over {view.reference}"
    if name == view.results["reference"] and others:
        name, gap = others[0][0], ", {} against it"
        text += f"; second is {view.label(name)}"
    if (difference := view.at(split, "against_reference", n).get(name)) is not None:
        text += gap.format(_number(difference, signed=True))
        if (p := difference.get("p_adjusted")) is not None:
            text += f" (p {'< 0.001' if p < 0.001 else '= ' + rounded(p)} after correction)"
    return f"{text}."


def _corrected(view: ResultsView, split: str) -> str:
    """Which differences to the reference survive the correction, or that none does."""
    n, reference = view.headline_n, view.reference
    tested = {k: v for k, v in view.at(split, "against_reference", n).items() if v.get("p_adjusted") is not None}
    if not tested:
        is_missing = view.results["reference"] not in view.names
        text = f"Nothing is compared with {reference}, the reference: it has no finished run to compare with."
        return text if is_missing else ""
    comparisons, significant = _counted(len(tested), "comparison"), view.significant(tested)
    if not significant:
        return (
            f"No difference to {reference} at n = {n} survives the correction for {comparisons}: these runs do not "
            "tell the variants apart from it."
        )
    better = [view.label(name) for name, one in tested.items() if name in significant and one["mean"] > 0]
    worse = [view.label(name) for name, one in tested.items() if name in significant and not one["mean"] > 0]
    rest = len(tested) - len(significant)
    return (
        f"After the correction for {comparisons} at n = {n}, better than {reference}: {_listed(better)}; worse: "
        f"{_listed(worse)}{f'; not told apart from it: {rest}' if rest else ''}."
    )


def _mean_leader(view: ResultsView, split: str) -> str:
    """Who leads at n = 1, which need not be who leads at the headline n."""
    means, values = (_ranked(view, split, "best_of_n", n) for n in (1, view.headline_n))
    if not means or not values or view.headline_n == 1:
        return ""
    name, mean = means[0]
    too = "too" if name == values[0][0] else "instead"
    return f"{view.label(name)} leads at n = 1, the mean reward, {too}: {_number(mean)}."


def _against_start(view: ResultsView, split: str) -> str:
    """How many variants are above and below the policy before training, by intervals that exclude 0."""
    differences = view.at(split, "against_start", view.headline_n)
    if not differences:
        return ""
    above = sum((one["low"] or 0) > 0 for one in differences.values())
    lowered = {name: one for name, one in differences.items() if (one["high"] or 0) < 0}
    below = [f"{view.label(name)} ({_number(one, signed=True)})" for name, one in lowered.items()]
    return (
        f"Training raised best-of-{view.headline_n} above the starting policy's in {above} of "
        f"{_counted(len(differences), 'variant')} (intervals that exclude 0)"
        f"{f'; it lowered it in {_listed(below)}' if below else ' and lowered it in none'}."
    )


def _gold_leader(view: ResultsView, split: str) -> str:
    """Who leads by the reward that nobody was trained on, and for whom it fell below the start."""
    n, ranked = view.headline_n, _ranked(view, split, "gold_best_of_n", view.headline_n)
    if not ranked:
        return ""
    text = f"By the gold reward, the highest at n = {n} is {view.label(ranked[0][0])}, {_number(ranked[0][1])}"
    golds = view.at(split, "gold_best_of_n", n)
    if (start := golds.pop(START, None)) is None:
        return f"{text}."
    fell = [view.label(name) for name, gold in golds.items() if gold["mean"] < start["mean"]]
    none, who = ("", f": {_listed(fell)}") if fell else ("none is ", "")
    return f"{text}; {none}below the mean before training, {_number(start)}{who}."


def _equal_kl_leader(view: ResultsView, split: str) -> str:
    """Who leads at the largest KL that at least two variants reached."""
    n, equal = view.headline_n, view.results.get("equal_kl") or {}
    for kl in reversed(view.equal_kls):
        ranked = _ranked(view, split, "equal_kl.best_of_n", n, kl)
        if len(ranked) > 1:
            return (
                f"At an equal KL of {kl:.3g} {equal.get('unit', 'nats')}, which {_counted(len(ranked), 'variant')} "
                f"reached, {view.label(ranked[0][0])} has the highest best-of-{n}: {_number(ranked[0][1])}."
            )
    return ""


def _ranked(view: ResultsView, split: str, quantity: str, n: int, kl: float | None = None) -> list[tuple[str, Row]]:
    """The variants with their rows, from the highest mean to the lowest."""
    trained = {name: row for name, row in view.at(split, quantity, n, kl).items() if name != START}
    return sorted(trained.items(), key=lambda item: -item[1]["mean"])


def _equal(view: ResultsView) -> str:
    """`40 optimizer steps`."""
    equal = view.results["equal"]
    return f"{equal['amount']:,} {BUDGETS.get(equal['what'], equal['what'])}"


def _counted(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(row: Row, *, signed: bool = False) -> str:
    """`1.234 [1.100, 1.300]`, `+0.123 [0.050, 0.190]`."""
    mean, low, high = row["mean"], row.get("low"), row.get("high")
    interval = "" if low is None or high is None else f" [{rounded(low)}, {rounded(high)}]"
    return f"{'+' if signed and mean > 0 else ''}{rounded(mean)}{interval}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    """`a, b`; `none`; of many the first ones and how many more."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
