"""Write the report of an ablation: tables, plots and a stand-alone HTML page; upload it to wandb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tealightning.ablation.plots import all_plots
from tealightning.ablation.results_view import Results, label, main_split, split_name, to_csv
from tealightning.ablation.summary import failures, methods, notices, summary
from tealightning.ablation.tables import all_tables, to_latex
from tealightning.errors import MissingPackageError
from tealightning.reliability.files import write_whole
from tealightning.reporting.page import Box, Plot, Section, html_page
from tealightning.reporting.style import image
from tealightning.reporting.tables import Table, markdown_page

SHOWN_FAILURES = 12
HELD_OUT = "Prompts that neither training nor any choice made on the validation prompts has seen."


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
    images = {f"{plot.name}.{kind}": image(plot.figure, kind) for plot in plots for kind in ("png", "svg")}
    svgs = {plot.name: images[f"{plot.name}.svg"] for plot in plots}
    files = {
        "table.md": markdown_page(_title(results), tables).encode(),
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


def report_html(results: Results, tables: Sequence[Table], plots: Sequence[Plot], images: dict[str, bytes]) -> str:
    """The page, with styles and pictures (`images`: SVG by a plot's name) inside."""
    source = dict(results.get("provenance") or {})
    commit = f", commit {source['commit']}" if source else ""
    return html_page(
        _title(results),
        boxes=_boxes(results),
        sections=[
            *_sections(results, tables, plots),
            Section(key="methods", title="Methods", bullets=methods(results)),
            *(Section(key="runs", title="Runs", tables=[table]) for table in tables if table.key == "runs"),
            Section(
                key="origin",
                title="Spec and provenance",
                code=source.pop("command", ""),
                facts=source,
                folded_code=(
                    "The spec as it was resolved",
                    yaml.safe_dump(results.get("spec"), sort_keys=False, allow_unicode=True),
                ),
            ),
        ],
        images=images,
        description=results.get("description") or "",
        meta=f"Ablation {results['name']}, {results['created']}{commit}",
    )


def _title(results: Results) -> str:
    return str(results.get("title") or results["name"])


def _boxes(results: Results) -> list[Box]:
    """What did not finish, what to mind, and the summary."""
    boxes, lines = [], failures(results)
    if lines:
        more = [f"… {len(lines) - SHOWN_FAILURES} more are under Runs"] if len(lines) > SHOWN_FAILURES else []
        boxes.append(
            Box(
                title=f"{len(lines)} of {len(results['runs'])} runs did not finish",
                text="What follows is computed without them.",
                bullets=[*lines[:SHOWN_FAILURES], *more],
                warning=True,
            )
        )
    if remarks := notices(results):
        boxes.append(Box(title="Mind when comparing", bullets=remarks, warning=True))
    lead, *sentences = summary(results)
    return [*boxes, Box(title="Summary", lead=lead, text=" ".join(sentences))]


def _sections(results: Results, tables: Sequence[Table], plots: Sequence[Plot]) -> list[Section]:
    """The parts of the page in order; those without a table and a plot are left out."""
    split, reference = main_split(results), label(results, results["reference"])
    by_key, by_name = {table.key: table for table in tables}, {plot.name: plot for plot in plots}
    sections = []

    def add(key: str, title: str, text: str, shown: Sequence[str], pictures: Sequence[str], *folded: str) -> None:
        section = Section(
            key=key,
            title=title,
            text=text,
            tables=[by_key[name] for name in shown if name in by_key],
            plots=[by_name[name] for name in pictures if name in by_name],
            folded=[by_key[name] for name in folded if name in by_key],
        )
        if section.tables or section.plots or section.folded:
            sections.append(section)

    text = "The reward of the best of n samples. At n = 1 that is the mean reward."
    add("best_of_n", "Best-of-n", text, [f"best_of_n_{split}"], ["best_of_n"])
    text = "Differences are paired: the same prompts and sampling seeds for both."
    pictures = ["difference_to_reference", "difference_to_reference_over_n"]
    folded = f"against_reference_{split}"
    add("reference", f"Against {reference}", text, [f"reference_{split}"], pictures, folded)
    text = "What training was good for at all."
    pictures = ["difference_to_start", "reward_histograms"]
    add("start", "Against the policy before training", text, [], pictures, f"against_start_{split}")
    text = (
        "Variants that spend the same budget can move differently far from the start. Here they are compared where "
        "they have moved equally far."
    )
    add("kl", "At equal KL", text, ["equal_kl", "equal_kl_differences"], ["best_of_n_against_kl"])
    text = (
        "A second reward that was measured and never trained on. Best-of-n still picks by the training reward: a curve "
        "that falls while the training reward's rises is over-optimisation."
    )
    add("gold", "Gold reward", text, [f"gold_best_of_n_{split}"], ["gold_best_of_n", "gold_against_kl"])
    text = "Length and diversity: a policy that repeats itself gains little from more samples."
    add("completions", "Completions", text, [f"diagnostics_{split}"], ["completions"])
    for other in [name for name in results.get("splits") or {} if name != split]:
        pictures = ["best_of_n", "gold_best_of_n", "difference_to_reference", "difference_to_start"]
        hidden = ("against_reference", "against_start", "gold_best_of_n", "diagnostics")
        shown = [f"best_of_n_{other}", f"reference_{other}"]
        title, names = split_name(other).capitalize(), [f"{name}_{other}" for name in pictures]
        add(f"split_{other}", title, HELD_OUT, shown, names, *(f"{name}_{other}" for name in hidden))
    add("training", "Training and budgets", "", ["budgets"], ["training"])
    return sections


def upload(results: dict[str, Any], folder: Path, *, project: str) -> str:
    """Log tables, plots and report of an ablation to wandb, as one run named after it; each fit can log for itself with
    Lightning's `WandbLogger` in the base config.

    Args:
        results: results.json.
        folder: Where `write_outputs` wrote.
        project: Of wandb.

    Returns:
        Where it is.

    Raises:
        MissingPackageError: if wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError("--wandb needs wandb: pip install 'tealightning[wandb]'.") from error
    with wandb.init(project=project, name=results["name"], config=results["spec"], job_type="compare") as run:
        for split, content in results["splits"].items():
            columns: list[Any] = ["variant", *(f"best_of_{n}" for n in results["ns"])]
            rows: list[list[Any]] = [
                [name, *(row["mean"] for row in content["variants"][name]["best_of_n"])] for name in results["variants"]
            ]
            run.log({f"{split}/best_of_n": wandb.Table(columns=columns, data=rows)})
        for file in sorted((folder / "plots").glob("*.png")):
            run.log({f"plots/{file.stem}": wandb.Image(str(file))})
        artifact = wandb.Artifact(f"{results['name']}-results", type="results")
        for name in ("results.json", "table.csv", "table.md", "table.tex", "report.html"):
            if (folder / name).is_file():
                artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        return f"Uploaded to {run.url or run.dir}"
