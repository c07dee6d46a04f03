"""Command `diagnose tail`: tail checks of a run, a file of rewards or a policy."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tealightning.errors import UserError

if TYPE_CHECKING:
    from tealightning.diagnostics.pool import RolloutPool

DESCRIPTION = """\
Is the upper tail of a reward what the tail estimators assume, and how well does best-of-n predicted from m samples
match what is measured at larger n?

The rewards come from a file, from a finished run, or are sampled from the policy that a config names. Writes tail.md
(verdict, tables), tail.csv (a line a prompt), tail.json, qq.png and prediction.png.
"""

EPILOG = """\
examples:
  tealightning diagnose tail --run runs/maze/version_0
  tealightning diagnose tail --run runs/maze/version_0 --which before -m 32
  tealightning diagnose tail --rewards rewards.jsonl
  tealightning diagnose tail -c configs/experiments/prose.yaml --prompts 64 --samples 256 --model.policy=my_policy

files for --rewards: JSON lines {"rewards": [0.1, 2.3, null], "id": "optional"}, a prompt a line, null = could not be
scored; or CSV with the columns prompt_id and reward, a sample a line.

With -c, all further options are settings of the config, as in `tealightning fit`.
"""


def diagnose_tail(args: Sequence[str]) -> None:
    """Check the tail of a reward, print the verdict and write the report.

    Raises:
        ValueError: for options that do not go together, or files that do not hold rewards (with file and line).
    """
    options, overrides = parser().parse_known_args(list(args))
    _check(options, overrides)
    pool = _pool(options, overrides)
    from tealightning.diagnostics.tail import diagnose_pool, tables_text, verdict_text, write_diagnosis
    from tealightning.reporting.provenance import provenance

    print(f"Checking the rewards of {len(pool.ids)} prompts ...", flush=True)
    diagnosis = diagnose_pool(
        pool,
        m=options.group_size,
        alpha=options.alpha,
        tested_share=options.tested_share,
        ns=options.ns,
        seed=options.seed,
    )
    origin = provenance(["diagnose", "tail", *args], seed=options.seed)
    files = write_diagnosis(options.out, diagnosis, origin)
    print(f"\n{verdict_text(diagnosis)}\n\n{tables_text(diagnosis)}\n")
    print("\n".join(str(file) for file in files))


def _pool(options: argparse.Namespace, overrides: Sequence[str]) -> "RolloutPool":
    """The rewards from where the options say."""
    from tealightning.diagnostics.reward_files import read_rewards, read_run

    if options.rewards is not None:
        return read_rewards(options.rewards)
    if options.run is not None:
        return read_run(options.run, options.which)
    from tealightning.cli.policy_pool import collect_pool

    print(f"Sampling {options.samples} completions for each of {options.prompts} prompts ...", flush=True)
    config = [part for path in options.config for part in ("-c", path)]
    _, pool = collect_pool([*config, *overrides], num_prompts=options.prompts, num_samples=options.samples)
    return pool


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse what does not go together before anything is read or sampled."""
    if overrides and not options.config:
        raise UserError(f"Unknown options: {' '.join(overrides)}. Settings of a config need -c CONFIG.")
    if not 0 < options.alpha <= 1:
        raise UserError(f"--alpha must be in (0, 1], got {options.alpha}.")
    if options.tested_share is not None and not 0 < options.tested_share <= 1:
        raise UserError(f"--tested-share must be in (0, 1], got {options.tested_share}.")
    counts = {"--group-size": options.group_size, "--prompts": options.prompts, "--samples": options.samples}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    if options.seed < 0:
        raise UserError(f"--seed must be at least 0, got {options.seed}.")


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="tealightning diagnose tail",
        usage="tealightning diagnose tail (--rewards FILE | --run FOLDER | -c CONFIG [--setting=value]...) [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--rewards", type=Path, metavar="FILE", help="rewards in JSON lines or CSV")
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run: its validation rewards")
    source.add_argument(
        "-c", "--config", action="append", metavar="CONFIG", help="sample from this policy (repeatable, later ones win)"
    )
    add = result.add_argument
    add(
        "--which",
        choices=["before", "after"],
        default="after",
        help="with --run: before or after training (default: after)",
    )
    add("--prompts", type=int, default=64, help="with -c: validation prompts (default: 64)")
    add("--samples", type=int, default=128, help="with -c: completions a prompt (default: 128)")
    add(
        "-m",
        "--group-size",
        type=int,
        default=16,
        help="samples that best-of-n is predicted from: the group_size of training (default: 16)",
    )
    add("--alpha", type=float, default=0.25, help="upper-tail level, that of the estimator (default: 0.25)")
    add(
        "--tested-share",
        type=float,
        metavar="SHARE",
        help="upper share of each prompt's rewards that is compared with a Gaussian (default: 2 * alpha, the part that "
        "an estimator with that alpha assumes to be Gaussian)",
    )
    add("--ns", type=int, nargs="+", metavar="N", help="budgets to predict (default: powers of two up to samples - m)")
    add("--seed", type=int, default=0, help="which samples form a group (default: 0)")
    add(
        "--out",
        type=Path,
        default=Path("runs/diagnose_tail"),
        help="folder for the report (default: runs/diagnose_tail)",
    )
    return result
