"""Options of `tealightning compare`, and how they change a spec."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tealightning.ablation.spec import AblationSpec

DESCRIPTION = """\
Run what is missing of an ablation - every variant with every seed - and write tables, plots and a report.

Runs that have finished are never repeated: stop at any time, and the same command goes on. A run that failed is
reported, keeps the others going, and is tried again by the next call.
"""

EPILOG = """\
examples:
  tealightning compare -c configs/ablations/prose.yaml --dry-run      what would run, and for how long
  tealightning compare -c configs/ablations/prose.yaml                run it, or go on with it
  tealightning compare -c configs/ablations/prose.yaml --report-only  results and report again, nothing run
  tealightning compare -c configs/ablations/prose.yaml --seeds 0 1 --variants grpo tea
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="tealightning compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("-c", "--config", type=Path, required=True, metavar="SPEC", help="the ablation, a YAML file")
    result.add_argument("--dry-run", action="store_true", help="check everything and print the plan; nothing is run")
    result.add_argument("--no-pilot", action="store_true", help="with --dry-run: do not measure how long a run takes")
    result.add_argument("--report-only", action="store_true", help="rebuild results and report from the run folders")
    result.add_argument(
        "--workers", type=int, metavar="K", help="runs at a time; default: one a GPU, or one a CPU core"
    )
    result.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants of the spec")
    result.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these seeds instead of the spec's")
    result.add_argument("--out", metavar="DIR", help="folder of runs and results instead of the spec's")
    result.add_argument(
        "--wandb", metavar="PROJECT", help="upload tables, plots and the report to this project as well"
    )
    return result


def restricted(spec: "AblationSpec", options: argparse.Namespace) -> "AblationSpec":
    """The spec with what the options change."""
    from dataclasses import replace

    from tealightning.ablation.spec import placeholders

    changes: dict[str, Any] = {}
    if options.variants is not None:
        if unknown := [name for name in options.variants if name not in spec.variants]:
            raise ValueError(f"--variants: the spec has no {unknown[0]!r}; it has {', '.join(spec.variants)}.")
        kept = {*options.variants, spec.reference}
        changes["variants"] = {name: settings for name, settings in spec.variants.items() if name in kept}
        used = placeholders([spec.settings, *changes["variants"].values()])
        changes["grid"] = {axis: values for axis, values in spec.grid.items() if axis in used}
    if options.seeds is not None:
        changes["seeds"] = options.seeds
    if options.out is not None:
        changes["out"] = options.out
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}.")
    return replace(spec, **changes)
