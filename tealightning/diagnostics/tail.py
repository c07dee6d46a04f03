"""Report of the tail checks: verdict, tables and plots."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tealightning.diagnostics.plots import plot_prediction, plot_qq
from tealightning.diagnostics.pool import RolloutPool
from tealightning.diagnostics.tail_verdict import Verdict, interval, judge_tail
from tealightning.errors import UserError
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import tail_size
from tealightning.functional.tail_checks import TailChecks, check_tail, summarise
from tealightning.functional.tail_shape import gaussian_tail_null
from tealightning.reporting.provenance import provenance_lines
from tealightning.reporting.tables import markdown_table, write_csv

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TailDiagnosis:
    """The checks of a pool of rewards and what they amount to."""

    ids: list[str]  # Q prompts that were checked
    num_prompts: int  # that there were
    m: int
    alpha: float
    checks: TailChecks
    verdict: Verdict


def diagnose_pool(
    pool: RolloutPool,
    *,
    m: int = 16,
    alpha: float = 0.25,
    tested_share: float | None = None,
    ns: Sequence[int] | None = None,
    seed: int = 0,
) -> TailDiagnosis:
    """Check the upper tails of a pool; see `functional.tail_checks.check_tail` for the arguments.

    Raises:
        UserError: if the group is too small for a tail of 2, or a budget is larger than M - m.
    """
    try:
        checks = check_tail(pool.rewards, pool.valid, m=m, alpha=alpha, tested_share=tested_share, ns=ns, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    ids = [pool.ids[row] for row in checks.rows.tolist()]
    return TailDiagnosis(
        ids=ids,
        num_prompts=len(pool.ids),
        m=m,
        alpha=alpha,
        checks=checks,
        verdict=judge_tail(checks, training_tail=tail_size(alpha, m)),
    )


def check_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each check: what was found, and what Gaussian rewards give."""
    checks = diagnosis.checks
    size, k, tested = checks.samples.shape[1], checks.tail.shape[1], checks.tested.shape[1]
    upper = f"upper {checks.tested_share:g}"
    found = {name.removeprefix("tail_"): float(value) for name, value in summarise(checks).items()}
    rows: list[Row] = []
    if checks.shape is not None:
        fit, null = checks.shape, gaussian_tail_null(size, tested)
        low, high = interval(fit.shape, fit.standard_error, fit.num_prompts)
        rows += [
            _row(f"QQ line of the {upper}: mean R²", f"{found['qq_r2']:.3f}", f"{float(null.r2.mean()):.3f}"),
            _row("prompts whose QQ line is rejected", f"{found['qq_rejected']:.1%}", "5.0%"),
            _row(
                f"shape of the {upper}",
                f"{found['shape']:.3f} ± {found['shape_se']:.3f} (95%: {low:.2f} to {high:.2f})",
                f"{found['shape_gaussian']:.3f}",
            ),
            _row(
                f"variance of the {upper} between two clusters (median)",
                _percent(checks.two_clusters),
                f"{float(null.two_clusters):.0%}",
            ),
        ]
    if checks.held_out is not None:
        error = f"{found['prediction_error']:.3f} ± {found['prediction_error_se']:.3f}"
        name = f"best-of-{checks.held_out.ns[-1]} from {diagnosis.m}, predicted - measured"
        rows.append(_row(name, error, f"{found['prediction_error_gaussian']:.3f}"))
        rows.append(_row("covered by its 90% interval", f"{found['coverage']:.1%}", "90.0%"))
    rows.append(_row(f"most frequent value of the {upper} (median)", _percent(checks.atoms), "0%"))
    tail = f"upper {diagnosis.alpha:g}"
    rows.append(_row(f"tied samples in the {tail}", f"{found['ties']:.1%}", "0.0%"))
    rows.append(_row(f"different values in the {tail} (median)", f"{_median(checks.distinct_in_tail)} of {k}", f"{k}"))
    return rows


def _row(check: str, found: str, gaussian: str) -> Row:
    return {"check": check, "found": found, "Gaussian rewards": gaussian}


def _median(values: Tensor) -> int:
    return int(values.median()) if values.numel() else 0


def _percent(values: Tensor) -> str:
    """The median of shares, `-` if none is known."""
    known = values[~values.isnan()]
    return f"{float(known.median()):.0%}" if known.numel() else "-"


def prediction_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each n, numbers in standard deviations of a prompt's rewards; empty without held-out samples."""
    held_out = diagnosis.checks.held_out
    if held_out is None:
        return []
    columns = {
        "predicted": mean_over_prompts(held_out.predicted),
        "measured": mean_over_prompts(held_out.measured),
        "error": mean_over_prompts(held_out.error),
        "covered": mean_over_prompts(held_out.covered),
    }
    rows = []
    for index, n in enumerate(held_out.ns):
        row: Row = {"n": n}
        for name, estimate in columns.items():
            row[name] = float(estimate.mean[index])
            row[f"{name}_se"] = float(estimate.standard_error[index])
        row["gaussian_error"] = float(held_out.gaussian_error[index])
        rows.append(row)
    return rows


def prompt_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each prompt; the shapes here are noisy and not corrected for their bias."""
    checks = diagnosis.checks
    rows = []
    for index, prompt_id in enumerate(diagnosis.ids):
        row: Row = {"id": prompt_id, "samples": checks.samples.shape[1], "distinct": int(checks.distinct[index])}
        row["ties"] = float(checks.ties[index])
        row["most_frequent"] = float(checks.atoms[index])
        row["two_clusters"] = float(checks.two_clusters[index])
        for name, values in (("qq_r2", checks.qq_r2), ("qq_p", checks.qq_p), ("raw_shape", checks.shapes)):
            if values is not None:
                row[name] = float(values[index])
        if checks.held_out is not None:
            n = checks.held_out.ns[-1]
            row[f"prediction_error_{n}"] = float(checks.held_out.error[index, -1])
            row[f"covered_{n}"] = float(checks.held_out.covered[index, -1])
        rows.append(row)
    return rows


def verdict_text(diagnosis: TailDiagnosis) -> str:
    """The verdict, its reason, what was looked at, and the estimator to use."""
    verdict, checks = diagnosis.verdict, diagnosis.checks
    settings = "".join(f", {name}: {value}" for name, value in verdict.settings.items())
    lines = [
        f"Verdict: **{verdict.name}**. {verdict.reason}",
        f"{len(diagnosis.ids)} of {diagnosis.num_prompts} prompts with {checks.samples.shape[1]} samples each. Tested: "
        f"the upper {checks.tested_share:g} of each prompt's rewards, {checks.tested.shape[1]} samples; an estimator "
        f"with alpha = {diagnosis.alpha:g} reads the upper {diagnosis.alpha:g} and assumes that the upper "
        f"{min(1.0, 2 * diagnosis.alpha):g} is Gaussian.",
        f"Estimator: `{verdict.estimator}{settings}`{f' (or {verdict.alternative})' if verdict.alternative else ''}.",
    ]
    return "\n\n".join(lines)


def tables_text(diagnosis: TailDiagnosis) -> str:
    """Both tables as markdown."""
    text = markdown_table(check_rows(diagnosis))
    rows = prediction_rows(diagnosis)
    if rows:
        shown = [
            {
                "n": row["n"],
                "predicted": f"{row['predicted']:.3f} ± {row['predicted_se']:.3f}",
                "measured": f"{row['measured']:.3f} ± {row['measured_se']:.3f}",
                "error": f"{row['error']:.3f} ± {row['error_se']:.3f}",
                "Gaussian error": f"{row['gaussian_error']:.3f}",
                "covered": f"{row['covered']:.1%}",
            }
            for row in rows
        ]
        text += (
            f"\n\nBest-of-n predicted from {diagnosis.m} samples and measured on the prompt's others, above its mean, "
            f"in standard deviations of its rewards; ± standard error over prompts.\n\n{markdown_table(shown)}"
        )
    return text


def write_diagnosis(folder: Path, diagnosis: TailDiagnosis, provenance: Mapping[str, str]) -> list[Path]:
    """Write `tail.md`, `.csv`, `.json` and the plots that M is large enough for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Tail of the reward",
        verdict_text(diagnosis),
        tables_text(diagnosis),
        provenance_lines(dict(provenance)),
    ]
    (folder / "tail.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_csv(folder / "tail.csv", prompt_rows(diagnosis))
    record = {
        "verdict": asdict(diagnosis.verdict),
        "prompts": len(diagnosis.ids),
        "samples": diagnosis.checks.samples.shape[1],
        "m": diagnosis.m,
        "alpha": diagnosis.alpha,
        "tested_share": diagnosis.checks.tested_share,
        "summary": {name: float(value) for name, value in summarise(diagnosis.checks).items()},
        "predictions": prediction_rows(diagnosis),
        "provenance": dict(provenance),
    }
    (folder / "tail.json").write_text(json.dumps(_without_nan(record), indent=2) + "\n", encoding="utf-8")
    files = [folder / "tail.md", folder / "tail.csv", folder / "tail.json"]
    if diagnosis.checks.shape is not None and int(diagnosis.checks.shape.num_prompts) > 0:
        files.append(plot_qq(diagnosis.checks, folder / "qq.png"))
    if diagnosis.checks.held_out is not None:
        files.append(plot_prediction(prediction_rows(diagnosis), diagnosis.m, folder / "prediction.png"))
    return files


def _without_nan(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
