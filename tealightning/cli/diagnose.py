"""Commands `diagnose gradients` (gradient fidelity in analytic worlds) and `diagnose tail` (tail checks of rewards)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tealightning.cli.options import at_least, new_parser, upper_share
from tealightning.errors import UserError
from tealightning.registry import did_you_mean

if TYPE_CHECKING:
    from tealightning.diagnostics.pool import RolloutPool

USAGE = """\
usage: tealightning diagnose WHAT [options]

what to diagnose:
  gradients  how faithful each estimator's gradient is to that of best-of-N
  tail       whether the upper tail of a reward is what the tail estimators assume

`tealightning diagnose WHAT --help` lists the options.
"""


def diagnose(args: Sequence[str]) -> None:
    """Run one of the instruments."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    commands = {"gradients": diagnose_gradients, "tail": diagnose_tail}
    if args[0] not in commands:
        raise UserError(f"Unknown instrument {args[0]!r}.{did_you_mean(args[0], list(commands))}")
    commands[args[0]](list(args[1:]))


# ---------------------------------------------------------------- diagnose gradients

GRADIENTS_DESCRIPTION = """\
How faithful is each estimator's gradient to the exact gradient of best-of-N?

Draws groups of m rollouts in worlds where the gradient of E[max of N rewards] is known, and reports bias, noise,
cosine, sign agreement and error of every estimator's gradient, with standard errors: fidelity.md, fidelity.csv and,
for the sweeps, plots.

With -c/--config (and the options that then apply: `tealightning diagnose gradients -c --help`) it measures them on a
policy and a reward instead.

  tealightning diagnose gradients -m 16 64 --worlds gaussian gpd_0.1 two_arms_0.2 --estimators direct "tea:scale=none"
"""


def gradients_parser() -> argparse.ArgumentParser:
    """Options of `diagnose gradients` without a configuration."""
    parser = new_parser("gradients", "runs/diagnose_gradients", description=GRADIENTS_DESCRIPTION)
    add = parser.add_argument
    add("-m", type=at_least(2), nargs="+", metavar="M", help="rollouts a prompt (default: 16 32)")
    add("-N", "--target_n", type=at_least(1), nargs="+", metavar="N", help="best-of-N of deployment (default: 128)")
    alpha_help = "tail levels of the tail estimators: the upper share that counts as the tail (default: 0.25)"
    add("--alpha", type=upper_share, nargs="+", default=[0.25], help=alpha_help)
    estimators_help = "default: all registered ones and a few variants; N, alpha and k = min(N, m) are filled in"
    add("--estimators", nargs="+", metavar="NAME[:PARAMETER=VALUE,...]", help=estimators_help)
    worlds_help = "gaussian, gpd_SHAPE, student_t5, mixture, bounded, discrete, two_arms_PROBABILITY (default: nine)"
    add("--worlds", nargs="+", metavar="WORLD", help=worlds_help)
    sweeps_help = "over m, alpha, or the tail index of the rewards; at the first m, N and alpha (default: none)"
    add("--sweeps", nargs="+", default=["none"], choices=["none", "m", "alpha", "tail", "all"], help=sweeps_help)
    groups = at_least(512, " (two steps over 256 prompts)")
    add("--groups", type=groups, default=20_000, help="groups behind each figure (default: 20000)")
    add("--decision", action="store_true", help="train in the two-arm world instead: decision.md, decision.csv")
    add("--seeds", type=at_least(1), default=5, help="trainings for each entry of --decision (default: 5)")
    return parser


def diagnose_gradients(args: Sequence[str]) -> None:
    """Measure gradient fidelity in analytic worlds; with a configuration, on a policy."""
    if any(arg in ("-c", "--config") or arg.startswith(("--config=", "-c=")) for arg in args):
        from tealightning.cli.diagnose_policy import diagnose_policy_gradients

        diagnose_policy_gradients(list(args))
        return
    options = gradients_parser().parse_args(args)
    from tealightning.diagnostics import fidelity_report, measurements, worlds
    from tealightning.reporting.provenance import provenance

    specs = measurements.parse_estimators(options.estimators)
    ms, target_ns, alphas = options.m or [16, 32], options.target_n or [128], options.alpha
    source = provenance(["diagnose", "gradients", *args], seed=options.seed)
    if options.decision:
        asked = options.m or options.target_n
        pairs = [(m, n) for m in ms for n in target_ns] if asked else measurements.DECISION_SETTINGS
        seeds = range(options.seed * options.seeds, (options.seed + 1) * options.seeds)
        rows = measurements.measure_decisions(specs, settings=pairs, alpha=alphas[0], seeds=seeds)
        files = fidelity_report.write_decisions(options.out, rows, source, seeds=options.seeds)
        print(files[0].read_text(encoding="utf-8"))
    else:
        names = list(dict.fromkeys(options.worlds or worlds.NAMES))
        sweeps = [sweep for sweep in measurements.SWEEPS if "all" in options.sweeps or sweep in options.sweeps]
        settings = []
        for sweep in ("main", *sweeps):
            settings += measurements.measurements_of(sweep, names, ms, target_ns, alphas)
        rows = measurements.measure(settings, specs, groups=options.groups, seed=options.seed)
        files = fidelity_report.write_fidelity(options.out, rows, source, groups=options.groups)
        print(f"{names[0]}\n\n{fidelity_report.table_of_world(rows, names[0])}\n")
    print("\n".join(map(str, files)))


# ---------------------------------------------------------------- diagnose tail

TAIL_DESCRIPTION = """\
Is the upper tail of a reward what the tail estimators assume, and how well does best-of-n predicted from m samples
match what is measured at larger n?

The rewards come from a file, from a finished run, or are sampled from the policy that a config names. Writes tail.md
(verdict, tables), tail.csv (a line a prompt), tail.json, qq.png and prediction.png.

files for --rewards: JSON lines {"rewards": [0.1, 2.3, null], "id": "optional"}, a prompt a line, null = could not be
scored; or CSV with the columns prompt_id and reward, a sample a line.

With -c, all further options are settings of the config, as in `tealightning fit`.
"""


def tail_parser() -> argparse.ArgumentParser:
    """Options of `diagnose tail`."""
    usage = "tealightning diagnose tail (--rewards FILE | --run FOLDER | -c CONFIG [--setting=value]...) [options]"
    parser = new_parser("tail", "runs/diagnose_tail", usage=usage, description=TAIL_DESCRIPTION)
    source, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    source.add_argument("--rewards", type=Path, metavar="FILE", help="rewards in JSON lines or CSV")
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run: its validation rewards")
    config_help = "sample from this policy (repeatable, later ones win)"
    source.add_argument("-c", "--config", action="append", metavar="CONFIG", help=config_help)
    add("--which", choices=["before", "after"], default="after", help="training, with --run (default: after)")
    add("--prompts", type=at_least(1), default=64, help="with -c: validation prompts (default: 64)")
    add("--samples", type=at_least(1), default=128, help="with -c: completions a prompt (default: 128)")
    size_help = "samples that best-of-n is predicted from: the group_size of training (default: 16)"
    add("-m", "--group-size", type=at_least(1), default=16, help=size_help)
    add("--alpha", type=upper_share, default=0.25, help="upper-tail level, that of the estimator (default: 0.25)")
    share_help = "upper share of each prompt's rewards that is compared with a Gaussian (default: 2 * alpha)"
    add("--tested-share", type=upper_share, metavar="SHARE", help=share_help)
    add("--ns", type=int, nargs="+", metavar="N", help="budgets to predict (default: powers of two up to samples - m)")
    return parser


def diagnose_tail(args: Sequence[str]) -> None:
    """Check the tail of a reward, print the verdict and write the report."""
    options, overrides = tail_parser().parse_known_args(list(args))
    if overrides and not options.config:
        raise UserError(f"Unknown options: {' '.join(overrides)}. Settings of a config need -c CONFIG.")
    pool = _pool(options, overrides)
    from tealightning.diagnostics import tail
    from tealightning.reporting.provenance import provenance

    print(f"Checking the rewards of {len(pool.ids)} prompts ...", flush=True)
    settings = {name: getattr(options, name) for name in ("alpha", "tested_share", "ns", "seed")}
    diagnosis = tail.diagnose_pool(pool, m=options.group_size, **settings)
    source = provenance(["diagnose", "tail", *args], seed=options.seed)
    files = tail.write_diagnosis(options.out, diagnosis, source)
    print(f"\n{tail.verdict_text(diagnosis)}\n\n{tail.tables_text(diagnosis)}\n")
    print("\n".join(map(str, files)))


def _pool(options: argparse.Namespace, overrides: Sequence[str]) -> "RolloutPool":
    """Read or sample the rewards, as the options say."""
    if options.config:
        from tealightning.cli.diagnose_policy import collect_pool

        print(f"Sampling {options.samples} completions for each of {options.prompts} prompts ...", flush=True)
        config = [part for path in options.config for part in ("-c", path)]
        return collect_pool([*config, *overrides], num_prompts=options.prompts, num_samples=options.samples)[1]
    from tealightning.diagnostics.pool import read_rewards

    file = options.rewards or options.run / f"rewards_{options.which}.jsonl"
    if options.run and not file.is_file():
        raise UserError(
            f"{file}: no such file. The callback BestOfNReport writes it once a run has two validations "
            "(trainer.num_sanity_val_steps=-1 makes the first one before training)."
        )
    return read_rewards(file)
