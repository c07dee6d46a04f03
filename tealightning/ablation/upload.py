"""Upload the results of an ablation to wandb."""

from pathlib import Path
from typing import Any

from tealightning.errors import UserError


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
        ValueError: if wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs wandb: pip install 'tealightning[wandb]'.") from error
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
