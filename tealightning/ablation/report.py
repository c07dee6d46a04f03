"""Write the report of an ablation: tables, plots and a stand-alone HTML page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup, escape

from tealightning.ablation.plots import Plot, all_plots, image
from tealightning.ablation.results_view import Results, label, main_split, split_name, unfinished
from tealightning.ablation.summary import counted, equal_words, failures, summary
from tealightning.ablation.table_formats import interval_text, number_text, to_csv, to_latex, to_markdown
from tealightning.ablation.tables import Table, all_tables
from tealightning.reliability.files import write_whole


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page: what is shown at once, and tables that open on a click."""

    key: str
    title: str
    text: str
    tables: list[Table]
    plots: list[Plot]
    folded: list[Table]


def write_outputs(results: Results, folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv`, `table.tex`, `plots/*.png`, `plots/*.svg` and `report.html` into `folder`.

    Everything is made before anything is written, and every file is replaced as a whole: after an error, on a full disk
    for example, the files of an earlier call are as they were.

    Args:
        results: What results.json holds (docs/ablations-results.md).
        folder: Where to write; made if it is missing.

    Returns:
        The files written.
    """
    tables, plots = all_tables(results), all_plots(results)
    images = {plot.name: {kind: image(plot.figure, kind) for kind in ("png", "svg")} for plot in plots}
    title = str(results.get("title") or results["name"])
    files = {
        "table.md": to_markdown(tables, title).encode(),
        "table.csv": to_csv(results).encode(),
        "table.tex": to_latex(tables).encode(),
        **{f"plots/{name}.{kind}": data for name, kinds in images.items() for kind, data in kinds.items()},
        "report.html": report_html(
            results, tables, plots, {name: kinds["svg"] for name, kinds in images.items()}
        ).encode(),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
    for plot in (folder / "plots").glob("*.*"):  # of an earlier call, and nothing in these results any more
        if f"plots/{plot.name}" not in files and plot.suffix in (".png", ".svg"):
            plot.unlink()
    return [folder / name for name in files]


def report_html(results: Results, tables: Sequence[Table], plots: Sequence[Plot], images: dict[str, bytes]) -> str:
    """The page, with styles and pictures (`images`: SVG by a plot's name) inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "unbroken": unbroken}
    environment.globals |= {"number_text": number_text, "interval_text": interval_text, "label": label}
    runs = [table for table in tables if table.key == "runs"]
    return environment.get_template("report.html.j2").render(
        results=results,
        title=results.get("title") or results["name"],
        summary=summary(results),
        failures=failures(results, unfinished(results)),
        planned=len(results.get("runs") or ()),
        notices=notices(results),
        sections=sections(results, tables, plots),
        images={name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in images.items()},
        methods=methods(results),
        runs=runs[0] if runs else None,
        spec=yaml.safe_dump(results.get("spec"), sort_keys=False, allow_unicode=True),
    )


def breakable(name: str) -> Markup:
    """Escaped text that may be broken after an underscore, where names of variants are long."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))


def unbroken(text: str) -> str:
    """The text with `n = 1` held together."""
    return text.replace(" = ", "\u00a0=\u00a0")


def notices(results: Results) -> list[str]:
    """What a reader should know before trusting a comparison: different commits, different numbers of seeds."""
    found = []
    finished = [run for run in results.get("runs") or () if run["status"] == "finished"]
    commits = sorted({str(run["commit"]) for run in finished if run.get("commit")})
    if len(commits) > 1:
        found.append(f"The runs come from {len(commits)} different commits: {', '.join(commits)}.")
    seeds = {name: sum(run["variant"] == name for run in finished) for name in results["variants"]}
    most = max(seeds.values(), default=0)
    fewer = [f"{label(results, name)} {count}" for name, count in seeds.items() if count < most]
    if fewer:
        found.append(f"Not every variant has {counted(most, 'finished seed')}: {', '.join(fewer)}.")
    return found


def methods(results: Results) -> list[str]:
    """How the numbers came about: what was held equal, on what, and the statistics."""
    seeds = sorted({run["seed"] for run in results.get("runs") or ()})
    found = [f"Every run got {equal_words(results)}; what else it spent is in the budgets."]
    if seeds:
        found.append(f"Seeds: {', '.join(map(str, seeds))}, the same for every variant.")
    for split, one in (results.get("splits") or {}).items():
        found.append(
            f"{split_name(split).capitalize()}: {counted(one['num_prompts'], 'prompt')}, {one['samples_per_prompt']} "
            "samples of each, with the same prompts and sampling seeds for every variant."
        )
    return [*found, *(results.get("statistics") or ())]


def sections(results: Results, tables: Sequence[Table], plots: Sequence[Plot]) -> list[Section]:
    """The parts of the page in order; those without a table and a plot are left out."""
    split = main_split(results)
    parts = [
        *(LAYOUT if split is not None else ()),
        *(
            (f"split_{other}", split_name(other).capitalize(), HELD_OUT, *held_out(other))
            for other in results.get("splits") or {}
            if other != split
        ),
        ("training", "Training and budgets", "", ["budgets"], ["training", "training_panels"], []),
    ]
    by_key, by_name = {table.key: table for table in tables}, {plot.name: plot for plot in plots}
    found = []
    for key, title, text, shown, pictures, folded in parts:
        places = {"split": split, "reference": label(results, results["reference"]), "n": results["headline_n"]}
        section = Section(
            key=key,
            title=title.format(**places),
            text=text.format(**places),
            tables=[by_key[name] for item in shown if (name := item.format(**places)) in by_key],
            plots=[by_name[name] for name in pictures if name in by_name],
            folded=[by_key[name] for item in folded if (name := item.format(**places)) in by_key],
        )
        found += [section] if section.tables or section.plots or section.folded else []
    return found


HELD_OUT = "Prompts that neither training nor any choice made on the validation prompts has seen."


def held_out(split: str) -> tuple[list[str], list[str], list[str]]:
    """Tables, plots and folded tables of a prompt set after the main one."""
    names = ("best_of_n", "gold_best_of_n", "difference_to_reference", "difference_to_start")
    shown = [f"best_of_n_{split}", f"reference_{split}"]
    folded = [f"{key}_{split}" for key in ("against_reference", "against_start", "gold_best_of_n", "diagnostics")]
    return shown, [f"{name}_{split}" for name in names], folded


Part = tuple[str, str, str, list[str], list[str], list[str]]
LAYOUT: list[Part] = [
    (
        "best_of_n",
        "Best-of-n",
        "The reward of the best of n samples. At n = 1 that is the mean reward.",
        ["best_of_n_{split}"],
        ["best_of_n", "best_of_n_panels"],
        [],
    ),
    (
        "reference",
        "Against {reference}",
        "Differences are paired: the same prompts and sampling seeds for both.",
        ["reference_{split}"],
        ["difference_to_reference", "difference_to_reference_over_n"],
        ["against_reference_{split}"],
    ),
    (
        "start",
        "Against the policy before training",
        "What training was good for at all.",
        [],
        ["difference_to_start", "reward_histograms"],
        ["against_start_{split}"],
    ),
    (
        "kl",
        "At equal KL",
        "Variants that spend the same budget can move differently far from the start. Here they are compared where "
        "they have moved equally far.",
        ["equal_kl", "equal_kl_differences"],
        ["best_of_n_against_kl", "best_of_n_against_kl_panels"],
        [],
    ),
    (
        "gold",
        "Gold reward",
        "A second reward that was measured and never trained on. Best-of-n still picks by the training reward: a curve "
        "that falls while the training reward's rises is over-optimisation.",
        ["gold_best_of_n_{split}"],
        ["gold_best_of_n", "gold_best_of_n_panels", "gold_against_kl"],
        [],
    ),
    (
        "completions",
        "Completions",
        "Length and diversity: a policy that repeats itself gains little from more samples.",
        ["diagnostics_{split}"],
        ["completions"],
        [],
    ),
]
