"""Check the upper tail of a reward and write the report: verdict, tables, plots."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tealightning.diagnostics.fidelity import Row
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
    verdict = judge_tail(checks, training_tail=tail_size(alpha, m))
    ids = [pool.ids[row] for row in checks.rows.tolist()]
    return TailDiagnosis(ids=ids, num_prompts=len(pool.ids), m=m, alpha=alpha, checks=checks, verdict=verdict)


def check_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each check: the result, and what Gaussian rewards give."""
    checks = diagnosis.checks
    size, k, tested = checks.samples.shape[1], checks.tail.shape[1], checks.tested.shape[1]
    upper, tail = f"upper {checks.tested_share:g}", f"upper {diagnosis.alpha:g}"
    value = {name.removeprefix("tail_"): float(number) for name, number in summarise(checks).items()}
    rows: list[tuple[str, str, str]] = []
    if checks.shape is not None:
        fit, null = checks.shape, gaussian_tail_null(size, tested)
        low, high = interval(fit.shape, fit.standard_error, fit.num_prompts)
        shape = f"{value['shape']:.3f} ± {value['shape_se']:.3f} (95%: {low:.2f} to {high:.2f})"
        clusters = f"variance of the {upper} between two clusters (median)"
        rows += [
            (f"QQ line of the {upper}: mean R²", f"{value['qq_r2']:.3f}", f"{float(null.r2.mean()):.3f}"),
            ("prompts whose QQ line is rejected", f"{value['qq_rejected']:.1%}", "5.0%"),
            (f"shape of the {upper}", shape, f"{value['shape_gaussian']:.3f}"),
            (clusters, _median_share(checks.two_clusters), f"{float(null.two_clusters):.0%}"),
        ]
    if checks.held_out is not None:
        error = f"{value['prediction_error']:.3f} ± {value['prediction_error_se']:.3f}"
        check = f"best-of-{checks.held_out.ns[-1]} from {diagnosis.m}, predicted - measured"
        rows.append((check, error, f"{value['prediction_error_gaussian']:.3f}"))
        rows.append(("covered by its 90% interval", f"{value['coverage']:.1%}", "90.0%"))
    distinct = int(checks.distinct_in_tail.median()) if checks.distinct_in_tail.numel() else 0
    rows += [
        (f"most frequent value of the {upper} (median)", _median_share(checks.atoms), "0%"),
        (f"tied samples in the {tail}", f"{value['ties']:.1%}", "0.0%"),
        (f"different values in the {tail} (median)", f"{distinct} of {k}", f"{k}"),
    ]
    return [dict(zip(("check", "found", "Gaussian rewards"), row, strict=True)) for row in rows]


def _median_share(shares: Tensor) -> str:
    """The median, `-` if none is known."""
    known = shares[~shares.isnan()]
    return f"{float(known.median()):.0%}" if known.numel() else "-"


def prediction_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each n, numbers in standard deviations of a prompt's rewards; empty without held-out samples."""
    held_out = diagnosis.checks.held_out
    if held_out is None:
        return []
    names = ("predicted", "measured", "error", "covered")
    estimates = {name: mean_over_prompts(getattr(held_out, name)) for name in names}
    rows = []
    for index, n in enumerate(held_out.ns):
        row: Row = {"n": n}
        for name, estimate in estimates.items():
            row |= {name: float(estimate.mean[index]), f"{name}_se": float(estimate.standard_error[index])}
        rows.append(row | {"gaussian_error": float(held_out.gaussian_error[index])})
    return rows


def prompt_rows(diagnosis: TailDiagnosis) -> list[Row]:
    """A row for each prompt; the shapes here are noisy and not corrected for their bias."""
    checks = diagnosis.checks
    columns = {
        "ties": checks.ties,
        "most_frequent": checks.atoms,
        "two_clusters": checks.two_clusters,
        "qq_r2": checks.qq_r2,
        "qq_p": checks.qq_p,
        "raw_shape": checks.shapes,
    }
    rows = []
    for index, prompt_id in enumerate(diagnosis.ids):
        row: Row = {"id": prompt_id, "samples": checks.samples.shape[1], "distinct": int(checks.distinct[index])}
        row |= {name: float(values[index]) for name, values in columns.items() if values is not None}
        if checks.held_out is not None:
            n = checks.held_out.ns[-1]
            row[f"prediction_error_{n}"] = float(checks.held_out.error[index, -1])
            row[f"covered_{n}"] = float(checks.held_out.covered[index, -1])
        rows.append(row)
    return rows


def verdict_text(diagnosis: TailDiagnosis) -> str:
    """The verdict, its reason, what was tested, and the estimator to use."""
    verdict, checks = diagnosis.verdict, diagnosis.checks
    settings = "".join(f", {name}: {value}" for name, value in verdict.settings.items())
    return (
        f"Verdict: **{verdict.name}**. {verdict.reason}\n\n"
        f"{len(diagnosis.ids)} of {diagnosis.num_prompts} prompts with {checks.samples.shape[1]} samples each. Tested: "
        f"the upper {checks.tested_share:g} of each prompt's rewards, {checks.tested.shape[1]} samples; an estimator "
        f"with alpha = {diagnosis.alpha:g} reads the upper {diagnosis.alpha:g} and assumes that the upper "
        f"{min(1.0, 2 * diagnosis.alpha):g} is Gaussian.\n\n"
        f"Estimator: `{verdict.estimator}{settings}`{f' (or {verdict.alternative})' if verdict.alternative else ''}."
    )


def tables_text(diagnosis: TailDiagnosis) -> str:
    """Both tables as markdown."""
    text = markdown_table(check_rows(diagnosis))
    lines = [
        {
            "n": row["n"],
            **{name: f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in ("predicted", "measured", "error")},
            "Gaussian error": f"{row['gaussian_error']:.3f}",
            "covered": f"{row['covered']:.1%}",
        }
        for row in prediction_rows(diagnosis)
    ]
    if lines:
        text += (
            f"\n\nBest-of-n predicted from {diagnosis.m} samples and measured on the prompt's others, above its mean, "
            f"in standard deviations of its rewards; ± standard error over prompts.\n\n{markdown_table(lines)}"
        )
    return text


def write_diagnosis(folder: Path, diagnosis: TailDiagnosis, provenance: Mapping[str, str]) -> list[Path]:
    """Write `tail.md`, `.csv`, `.json` and the plots that M is large enough for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = verdict_text(diagnosis), tables_text(diagnosis), provenance_lines(dict(provenance))
    parts = ["# Tail of the reward", *texts]
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
