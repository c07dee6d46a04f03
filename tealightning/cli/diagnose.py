"""Commands `diagnose gradients` (gradient fidelity in analytic worlds) and `diagnose tail` (tail checks of rewards)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Run one of the instruments.

    Raises:
        UserError: for an unknown one.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    commands = {"gradients": diagnose_gradients, "tail": diagnose_tail}
    if args[0] not in commands:
        raise UserError(f"Unknown instrument {args[0]!r}.{did_you_mean(args[0], list(commands))}")
    commands[args[0]](list(args[1:]))


def at_least(low: int, why: str = "", **values: int) -> None:
    """Check options against their smallest value.

    Raises:
        UserError: naming the option, with `why`.
    """
    for name, value in values.items():
        option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        if value < low:
            raise UserError(f"{option} must be at least {low}{why and f' ({why})'}, got {value}.")


def new_parser(prog: str, **texts: Any) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of its texts and takes whole option names only."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"tealightning {prog}", formatter_class=layout, allow_abbrev=False, **texts)


# ---------------------------------------------------------------- diagnose gradients

SWEEP_CHOICES = ("none", "m", "alpha", "tail", "all")
GRADIENTS_DESCRIPTION = """\
How faithful is each estimator's gradient to the exact gradient of best-of-N?

Draws groups of m rollouts in worlds where the gradient of E[max of N rewards] is known, and reports bias, noise,
cosine, sign agreement and error of every estimator's gradient, with standard errors: fidelity.md, fidelity.csv and,
for the sweeps, plots.

With -c/--config (and the options that then apply: `tealightning diagnose gradients -c --help`) it measures them on a
policy and a reward instead.
"""
GRADIENTS_EPILOG = """\
examples:
  tealightning diagnose gradients
  tealightning diagnose gradients --estimators direct prefix_tea:rotations=1 "tea:scale=none,alpha=0.5"
  tealightning diagnose gradients -m 16 64 -N 128 512 --worlds gaussian mixture gpd_0.1 two_arms_0.2
  tealightning diagnose gradients --worlds gaussian --sweeps all --groups 100000
  tealightning diagnose gradients --decision
"""


def diagnose_gradients(args: Sequence[str]) -> None:
    """Measure gradient fidelity in analytic worlds; with a configuration, on a policy.

    Raises:
        UserError: for an unknown estimator, world or sweep (with the nearest valid names), or a value out of range.
    """
    if any(arg in ("-c", "--config") or arg.startswith(("--config=", "-c=")) for arg in args):
        from tealightning.cli.diagnose_policy import diagnose_policy_gradients

        diagnose_policy_gradients(list(args))
        return
    options = gradients_parser().parse_args(args)
    from tealightning.diagnostics import fidelity_report, measurements
    from tealightning.diagnostics.fidelity import MIN_GROUPS
    from tealightning.diagnostics.worlds import NAMES
    from tealightning.reporting.provenance import provenance

    specs, sweeps = measurements.parse_estimators(options.estimators), sweeps_of(options.sweeps)
    ms, target_ns = options.m or [16, 32], options.target_n or [128]
    worlds = list(dict.fromkeys(options.worlds or NAMES))
    at_least(2, m=min(ms))
    at_least(1, N=min(target_ns), seeds=options.seeds)
    at_least(MIN_GROUPS, "two steps over 256 prompts", groups=options.groups)
    for alpha in options.alpha:
        if not 0 < alpha <= 1:
            raise UserError(f"--alpha must be in (0, 1], the upper share that counts as the tail; got {alpha}.")
    command = ["diagnose", "gradients", *args]
    alpha = options.alpha[0]
    if options.decision:
        asked = options.m or options.target_n
        pairs = [(m, n) for m in ms for n in target_ns] if asked else measurements.DECISION_SETTINGS
        seeds = range(options.seed * options.seeds, (options.seed + 1) * options.seeds)
        rows = measurements.measure_decisions(specs, settings=pairs, alpha=alpha, seeds=seeds, progress=True)
        source = provenance(command, seed=options.seed)
        files = fidelity_report.write_decisions(options.out, rows, source, seeds=options.seeds)
        print(files[0].read_text(encoding="utf-8"))
    else:
        settings = measurements.main_measurements(worlds, ms, target_ns, options.alpha)
        for sweep in sweeps:
            settings += measurements.sweep_measurements(sweep, m=ms[0], target_n=target_ns[0], alpha=alpha)
        rows = measurements.measure(settings, specs, groups=options.groups, seed=options.seed, progress=True)
        source = provenance(command, seed=options.seed)
        files = fidelity_report.write_fidelity(options.out, rows, source, groups=options.groups)
        print(f"{worlds[0]}\n\n{fidelity_report.table_of_world(rows, worlds[0])}\n")
    print("\n".join(str(file) for file in files))


def sweeps_of(names: Sequence[str]) -> tuple[str, ...]:
    """Resolve names of sweeps: `all` is every one, `none` is none.

    Raises:
        UserError: for an unknown one.
    """
    for name in names:
        if name not in SWEEP_CHOICES:
            raise UserError(f"--sweeps: unknown sweep {name!r}.{did_you_mean(name, SWEEP_CHOICES)}")
    return tuple(sweep for sweep in ("m", "alpha", "tail") if "all" in names or sweep in names)


def gradients_parser() -> argparse.ArgumentParser:
    """Options of `diagnose gradients` without a configuration."""
    parser = new_parser("diagnose gradients", description=GRADIENTS_DESCRIPTION, epilog=GRADIENTS_EPILOG)
    add = parser.add_argument
    add("-m", type=int, nargs="+", metavar="M", help="rollouts a prompt (default: 16 32)")
    add("-N", "--target_n", type=int, nargs="+", metavar="N", help="best-of-N budgets of deployment (default: 128)")
    add("--alpha", type=float, nargs="+", default=[0.25], help="tail levels of the tail estimators (default: 0.25)")
    estimators_help = "default: all registered ones and a few variants; N, alpha and k = min(N, m) are filled in"
    add("--estimators", nargs="+", metavar="NAME[:PARAMETER=VALUE,...]", help=estimators_help)
    worlds_help = (
        "default: gaussian gpd_-0.3 gpd_0 gpd_0.2 student_t5 mixture bounded discrete two_arms; "
        "also gpd_SHAPE and two_arms_PROBABILITY_OF_B"
    )
    add("--worlds", nargs="+", metavar="WORLD", help=worlds_help)
    sweeps_help = (
        "none, m (16 to 512), alpha (0.1 to 1), tail (generalised Pareto rewards of index -0.4 to 0.3), all; at "
        "the first m, N and alpha (default: none)"
    )
    add("--sweeps", nargs="+", default=["none"], metavar="SWEEP", help=sweeps_help)
    add("--groups", type=int, default=20_000, help="groups behind each figure (default: 20000)")
    add("--decision", action="store_true", help="train in the two-arm world instead: decision.md, decision.csv")
    add("--seeds", type=int, default=5, help="trainings for each entry of --decision (default: 5)")
    add("--seed", type=int, default=0, help="all random numbers follow from it (default: 0)")
    out_help = "folder for the report (default: runs/diagnose_gradients)"
    add("--out", type=Path, default=Path("runs/diagnose_gradients"), help=out_help)
    return parser


# ---------------------------------------------------------------- diagnose tail

TAIL_DESCRIPTION = """\
Is the upper tail of a reward what the tail estimators assume, and how well does best-of-n predicted from m samples
match what is measured at larger n?

The rewards come from a file, from a finished run, or are sampled from the policy that a config names. Writes tail.md
(verdict, tables), tail.csv (a line a prompt), tail.json, qq.png and prediction.png.
"""
TAIL_EPILOG = """\
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
        UserError: for options that do not go together, or files that do not hold rewards (with file and line).
    """
    options, overrides = tail_parser().parse_known_args(list(args))
    if overrides and not options.config:
        raise UserError(f"Unknown options: {' '.join(overrides)}. Settings of a config need -c CONFIG.")
    for name, share in (("--alpha", options.alpha), ("--tested-share", options.tested_share)):
        if share is not None and not 0 < share <= 1:
            raise UserError(f"{name} must be in (0, 1], got {share}.")
    at_least(1, group_size=options.group_size, prompts=options.prompts, samples=options.samples)
    at_least(0, seed=options.seed)
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
    files = write_diagnosis(options.out, diagnosis, provenance(["diagnose", "tail", *args], seed=options.seed))
    print(f"\n{verdict_text(diagnosis)}\n\n{tables_text(diagnosis)}\n")
    print("\n".join(str(file) for file in files))


def _pool(options: argparse.Namespace, overrides: Sequence[str]) -> "RolloutPool":
    """Read or sample the rewards, as the options say."""
    from tealightning.diagnostics.pool import read_rewards, read_run

    if options.rewards is not None:
        return read_rewards(options.rewards)
    if options.run is not None:
        return read_run(options.run, options.which)
    from tealightning.cli.diagnose_policy import collect_pool

    print(f"Sampling {options.samples} completions for each of {options.prompts} prompts ...", flush=True)
    config = [part for path in options.config for part in ("-c", path)]
    return collect_pool([*config, *overrides], num_prompts=options.prompts, num_samples=options.samples)[1]


def tail_parser() -> argparse.ArgumentParser:
    """Options of `diagnose tail`."""
    usage = "tealightning diagnose tail (--rewards FILE | --run FOLDER | -c CONFIG [--setting=value]...) [options]"
    parser = new_parser("diagnose tail", usage=usage, description=TAIL_DESCRIPTION, epilog=TAIL_EPILOG)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--rewards", type=Path, metavar="FILE", help="rewards in JSON lines or CSV")
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run: its validation rewards")
    config_help = "sample from this policy (repeatable, later ones win)"
    source.add_argument("-c", "--config", action="append", metavar="CONFIG", help=config_help)
    add = parser.add_argument
    which_help = "with --run: before or after training (default: after)"
    add("--which", choices=["before", "after"], default="after", help=which_help)
    add("--prompts", type=int, default=64, help="with -c: validation prompts (default: 64)")
    add("--samples", type=int, default=128, help="with -c: completions a prompt (default: 128)")
    size_help = "samples that best-of-n is predicted from: the group_size of training (default: 16)"
    add("-m", "--group-size", type=int, default=16, help=size_help)
    add("--alpha", type=float, default=0.25, help="upper-tail level, that of the estimator (default: 0.25)")
    share_help = (
        "upper share of each prompt's rewards that is compared with a Gaussian (default: 2 * alpha, the part that "
        "an estimator with that alpha assumes to be Gaussian)"
    )
    add("--tested-share", type=float, metavar="SHARE", help=share_help)
    add("--ns", type=int, nargs="+", metavar="N", help="budgets to predict (default: powers of two up to samples - m)")
    add("--seed", type=int, default=0, help="which samples form a group (default: 0)")
    out_help = "folder for the report (default: runs/diagnose_tail)"
    add("--out", type=Path, default=Path("runs/diagnose_tail"), help=out_help)
    return parser
