"""Write the report of an ablation: tables, plots and a stand-alone HTML page; upload it to wandb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tealightning.ablation.plots import all_plots
from tealightning.ablation.summary import failures, methods, notices, summary
from tealightning.ablation.tables import Results, ResultsView, all_tables, split_name, to_csv, to_latex
from tealightning.errors import MissingPackageError
from tealightning.reliability.files import write_whole
from tealightning.reporting.page import Box, Plot, Section, html_page
from tealightning.reporting.style import image
from tealightning.reporting.tables import Table, markdown_page

SHOWN_FAILURES = 12


def write_outputs(results: Results, folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv`, `table.tex`, `plots/*.png`, `plots/*.svg` and `report.html`; returns the files.

    Everything is made before anything is written, and every file is replaced as a whole: after an error, on a full disk
    for example, the files of an earlier call are as they were.
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
    spec = yaml.safe_dump(results.get("spec"), sort_keys=False, allow_unicode=True)
    view = ResultsView(results)
    return html_page(
        _title(results),
        boxes=_boxes(view),
        sections=[
            *_sections(view, tables, plots),
            Section(key="methods", title="Methods", bullets=methods(view)),
            *(Section(key="runs", title="Runs", tables=[table]) for table in tables if table.key == "runs"),
            Section(
                key="origin",
                title="Spec and provenance",
                code=source.pop("command", ""),
                facts=source,
                folded_code=("The spec as it was resolved", spec),
            ),
        ],
        images=images,
        description=results.get("description") or "",
        meta=f"Ablation {results['name']}, {results['created']}{commit}",
    )


def _title(results: Results) -> str:
    return str(results.get("title") or results["name"])


def _boxes(view: ResultsView) -> list[Box]:
    """What did not finish, what to mind, and the summary."""
    boxes, lines = [], failures(view)
    if lines:
        more = [f"… {len(lines) - SHOWN_FAILURES} more are under Runs"] if len(lines) > SHOWN_FAILURES else []
        title = f"{len(lines)} of {len(view.results['runs'])} runs did not finish"
        text = "What follows is computed without them."
        boxes.append(Box(title=title, text=text, bullets=[*lines[:SHOWN_FAILURES], *more], warning=True))
    if remarks := notices(view):
        boxes.append(Box(title="Mind when comparing", bullets=remarks, warning=True))
    lead, *sentences = summary(view)
    return [*boxes, Box(title="Summary", lead=lead, text=" ".join(sentences))]


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
        shown, pictures, folded = (
            " ".join(f"{name}_{other}" for name in names.split())
            for names in (
                "best_of_n reference",
                "best_of_n gold_best_of_n difference_to_reference difference_to_start",
                "against_reference against_start gold_best_of_n diagnostics",
            )
        )
        add(f"split_{other}", split_name(other).capitalize(), text, shown, pictures, folded)
    add("training", "Training and budgets", "", "budgets", "training")
    return sections


def upload(results: dict[str, Any], folder: Path, *, project: str) -> str:
    """Log tables, plots and report to wandb, as one run named after the ablation; returns where it is."""
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
