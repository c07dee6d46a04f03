"""Report of an ablation: its findings in sentences, tables, plots and a stand-alone HTML page; upload to wandb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tealightning.ablation.plots import all_plots
from tealightning.ablation.tables import BUDGETS, START, ResultsView, Row, all_tables, split_name, to_csv, to_latex
from tealightning.errors import MissingPackageError
from tealightning.reliability.files import write_whole
from tealightning.reporting.style import image
from tealightning.reporting.tables import Box, Plot, Section, Table, html_page, markdown_page, rounded

SHOWN_FAILURES = 12


def write_outputs(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write tables, plots and page, and return the files.

    Everything is made before anything is written, and every file is replaced as a whole: after an error, on a full disk
    for example, the files of an earlier call are as they were.
    """
    tables, plots = all_tables(results), all_plots(results)
    images = {f"{plot.name}.{kind}": image(plot.figure, kind) for plot in plots for kind in ("png", "svg")}
    svgs = {plot.name: images[f"{plot.name}.svg"] for plot in plots}
    files = {
        "table.md": markdown_page(results["title"], tables).encode(),
        "table.csv": to_csv(results).encode(),
        "table.tex": to_latex(tables).encode(),
        **{f"plots/{name}": data for name, data in images.items()},
        "report.html": report_html(results, tables, plots, svgs).encode(),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
    for plot in (folder / "plots").glob("*.*"):  # of an earlier call, and nothing in these results any more
        if plot.name not in images and plot.suffix in (".png", ".svg"):
            plot.unlink()
    return [folder / name for name in files]


def report_html(
    results: dict[str, Any], tables: Sequence[Table], plots: Sequence[Plot], images: dict[str, bytes]
) -> str:
    """The page, with styles and pictures (`images`: SVG by a plot's name) inside."""
    view, source = ResultsView(results), dict(results["provenance"])
    spec = yaml.safe_dump(results["spec"], sort_keys=False, allow_unicode=True)
    prompts = [
        f"{split_name(split).capitalize()}: {_counted(content['num_prompts'], 'prompt')}, "
        f"{content['samples_per_prompt']} samples of each."
        for split, content in results["splits"].items()
    ]
    lines, (lead, *sentences) = _failures(view), summary(view)
    more = [f"… {len(lines) - SHOWN_FAILURES} more are under Runs"] if len(lines) > SHOWN_FAILURES else []
    text = "What follows is computed without them."
    title = f"{len(lines)} of {len(results['runs'])} runs did not finish"
    boxes = [
        Box(title=title, text=text, bullets=[*lines[:SHOWN_FAILURES], *more], warning=True),
        Box(title="Mind when comparing", bullets=_notices(view), warning=True),
        Box(title="Summary", lead=lead, text=" ".join(sentences)),
    ]
    return html_page(
        results["title"],
        boxes=[box for box in boxes if box.bullets or box.lead],
        sections=[
            *_sections(view, tables, plots),
            Section(key="methods", title="Methods", bullets=[*results["statistics"], *prompts]),
            Section(key="runs", title="Runs", tables=[table for table in tables if table.key == "runs"]),
            Section(
                key="origin",
                title="Spec and provenance",
                code=source.pop("command"),
                facts=source,
                folded_code=("The spec as it was resolved", spec),
            ),
        ],
        images=images,
        description=results["description"] or "",
        meta=f"Ablation {results['name']}, {results['created']}, commit {source['commit']}",
    )


def _sections(view: ResultsView, tables: Sequence[Table], plots: Sequence[Plot]) -> list[Section]:
    """The parts of the page in order; those without a table and a plot are left out."""
    by_key, by_name = {table.key: table for table in tables}, {plot.name: plot for plot in plots}
    sections, split = [], view.main_split

    def add(key: str, title: str, text: str, shown: str, pictures: str, folded: str = "") -> None:
        """A part with the tables and the plots that there are of those named, separated by spaces."""
        parts: dict[str, Any] = {"plots": [by_name[name] for name in pictures.split() if name in by_name]}
        for part, names in (("tables", shown), ("folded", folded)):
            parts[part] = [by_key[name] for name in names.split() if name in by_key]
        if any(parts.values()):
            sections.append(Section(key=key, title=title, text=text, **parts))

    text = "The reward of the best of n samples. At n = 1 that is the mean reward."
    add("best_of_n", "Best-of-n", text, f"best_of_n_{split}", "best_of_n")
    text = "Differences are paired: the same prompts and sampling seeds for both."
    pictures = "difference_to_reference difference_to_reference_over_n"
    add("reference", f"Against {view.reference}", text, f"reference_{split}", pictures, f"against_reference_{split}")
    text, pictures = "What training was good for at all.", "difference_to_start reward_histograms"
    add("start", "Against the policy before training", text, "", pictures, f"against_start_{split}")
    text = (
        "Variants that spend the same budget can move differently far from the start. Here they are compared where "
        "they have moved equally far."
    )
    add("kl", "At equal KL", text, "equal_kl equal_kl_differences", "best_of_n_against_kl")
    text = (
        "A second reward that was measured and never trained on. Best-of-n still picks by the training reward: a curve "
        "that falls while the training reward's rises is over-optimisation."
    )
    add("gold", "Gold reward", text, f"gold_best_of_n_{split}", "gold_best_of_n gold_against_kl")
    text = "Length and diversity: a policy that repeats itself gains little from more samples."
    add("completions", "Completions", text, f"diagnostics_{split}", "completions")
    for other in view.splits[1:]:
        text = "Prompts that neither training nor any choice made on the validation prompts has seen."
        shown = f"best_of_n_{other} reference_{other}"
        pictures = (
            f"best_of_n_{other} gold_best_of_n_{other} difference_to_reference_{other} difference_to_start_{other}"
        )
        folded = f"against_reference_{other} against_start_{other} gold_best_of_n_{other} diagnostics_{other}"
        add(f"split_{other}", split_name(other).capitalize(), text, shown, pictures, folded)
    add("training", "Training and budgets", "", "budgets", "training")
    return sections


def upload(results: dict[str, Any], folder: Path, *, project: str) -> str:
    """Log tables, plots and report to wandb, as one run named after the ablation; returns where it is."""
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError("--wandb needs wandb: pip install 'tealightning[wandb]'.") from error
    columns: list[Any] = ["variant", *(f"best_of_{n}" for n in results["ns"])]
    with wandb.init(project=project, name=results["name"], config=results["spec"], job_type="compare") as run:
        for split, content in results["splits"].items():
            variants = content["variants"].items()
            rows = [[name, *(row["mean"] for row in policy["best_of_n"])] for name, policy in variants]
            run.log({f"{split}/best_of_n": wandb.Table(columns=columns, data=rows)})
        for file in sorted((folder / "plots").glob("*.png")):
            run.log({f"plots/{file.stem}": wandb.Image(str(file))})
        artifact = wandb.Artifact(f"{results['name']}-results", type="results")
        for name in ("results.json", "table.csv", "table.md", "table.tex", "report.html"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        return f"Uploaded to {run.url or run.dir}"


# The findings in sentences


def summary(view: ResultsView) -> list[str]:
    """The findings as sentences: who leads, what survives the correction, the start, gold, equal KL, held-out prompts.

    Nothing is said about what was not measured.
    """
    split, *others = view.splits
    sentences = [
        _leader(view, split),
        _setting(view, split),
        _corrected(view, split),
        _mean_leader(view, split),
        _against_start(view, split),
        _gold_leader(view, split),
        _equal_kl_leader(view, split),
        *(_leader(view, other) for other in others),
    ]
    return [sentence for sentence in sentences if sentence]


def _failures(view: ResultsView) -> list[str]:
    """A line for each run that did not finish, failed ones first: which, and of its error the last line."""
    runs = [run for run in view.results["runs"] if run["status"] != "finished"]
    lines = []
    for run in sorted(runs, key=lambda run: run["status"] != "failed"):
        error = str(run.get("error") or "").strip()
        error = error.splitlines()[-1] if error.startswith("Traceback") else " ".join(error.split())
        reason = f": {error[:300]}{' …' if len(error) > 300 else ''}" if error else ""
        lines.append(f"{view.label(run['variant'])}, seed {run['seed']}: {run['status']}{reason}")
    return lines


def _notices(view: ResultsView) -> list[str]:
    """What a reader should know before trusting a comparison: different commits, different numbers of seeds."""
    lines = []
    finished = [run for run in view.results["runs"] if run["status"] == "finished"]
    commits = sorted({str(run["commit"]) for run in finished if run.get("commit")})
    if len(commits) > 1:
        lines.append(f"The runs come from {len(commits)} different commits: {', '.join(commits)}.")
    seeds = {name: sum(run["variant"] == name for run in finished) for name in view.names}
    most = max(seeds.values(), default=0)
    if fewer := [f"{view.label(name)} {count}" for name, count in seeds.items() if count < most]:
        lines.append(f"Not every variant has {_counted(most, 'finished seed')}: {', '.join(fewer)}.")
    return lines


def _setting(view: ResultsView, split: str) -> str:
    """How much was run and measured."""
    content, equal = view.results["splits"][split], view.results["equal"]
    seeds = sorted({len(policy["seeds"]) for name, policy in view.policies(split).items() if name != START})
    few = "" if seeds[0] == seeds[-1] else f"{seeds[0]} to "
    return (
        f"Compared are {_counted(len(view.names), 'variant')} with {few}{_counted(seeds[-1], 'finished seed')} each, "
        f"{equal['amount']:,} {BUDGETS[equal['what']]} a run, on {content['num_prompts']} {split_name(split)} with "
        f"{content['samples_per_prompt']} samples a prompt; {view.interval} intervals in brackets."
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
    differences = view.at(split, "against_reference", n)
    tested = {name: one for name, one in differences.items() if one.get("p_adjusted") is not None}
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
    n, unit = view.headline_n, (view.results["equal_kl"] or {}).get("unit")
    for kl in reversed(view.equal_kls):
        ranked = _ranked(view, split, "equal_kl.best_of_n", n, kl)
        if len(ranked) > 1:
            return (
                f"At an equal KL of {kl:.3g} {unit}, which {_counted(len(ranked), 'variant')} "
                f"reached, {view.label(ranked[0][0])} has the highest best-of-{n}: {_number(ranked[0][1])}."
            )
    return ""


def _ranked(view: ResultsView, split: str, quantity: str, n: int, kl: float | None = None) -> list[tuple[str, Row]]:
    """The variants with their rows, from the highest mean to the lowest."""
    trained = {name: row for name, row in view.at(split, quantity, n, kl).items() if name != START}
    return sorted(trained.items(), key=lambda item: -item[1]["mean"])


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
