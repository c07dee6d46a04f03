"""Commands `diagnose`: picks the instrument; `diagnose gradients`: gradient fidelity in analytic worlds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tealightning.errors import UserError
from tealightning.registry import did_you_mean

DESCRIPTION = """\
How faithful is each estimator's gradient to the exact gradient of best-of-N?

Draws groups of m rollouts in worlds where the gradient of E[max of N rewards] is known, and reports bias, noise,
cosine, sign agreement and error of every estimator's gradient, with standard errors: fidelity.md, fidelity.csv and,
for the sweeps, plots.

With -c/--config (and the options that then apply: `tealightning diagnose gradients -c --help`) it measures them on a
policy and a reward instead.
"""

EPILOG = """\
examples:
  tealightning diagnose gradients
  tealightning diagnose gradients --estimators direct prefix_tea:rotations=1 "tea:scale=none,alpha=0.5"
  tealightning diagnose gradients -m 16 64 -N 128 512 --worlds gaussian mixture gpd_0.1 two_arms_0.2
  tealightning diagnose gradients --worlds gaussian --sweeps all --groups 100000
  tealightning diagnose gradients --decision
"""

SWEEP_CHOICES = ("none", "m", "alpha", "tail", "all")


def diagnose_gradients(args: Sequence[str]) -> None:
    """Measure gradient fidelity in analytic worlds; with a configuration, on a policy.

    Raises:
        ValueError: for an unknown estimator, world or sweep (with the nearest valid names), or a value out of range.
    """
    if any(arg in ("-c", "--config") or arg.startswith(("--config=", "-c=")) for arg in args):
        from tealightning.cli.diagnose_policy import diagnose_policy_gradients

        diagnose_policy_gradients(list(args))
        return
    options = parser().parse_args(args)
    from tealightning.diagnostics.decision import SETTINGS
    from tealightning.diagnostics.gradients import GradientSettings, diagnose, diagnose_decision, table_of_world
    from tealightning.diagnostics.measurements import parse_estimators
    from tealightning.diagnostics.worlds import NAMES

    settings = GradientSettings(
        estimators=parse_estimators(options.estimators),
        worlds=options.worlds or NAMES,
        ms=options.m or (16, 32),
        target_ns=options.target_n or (128,),
        alphas=options.alpha,
        sweeps=sweeps_of(options.sweeps),
        groups=options.groups,
        seed=options.seed,
        out=options.out,
        args=["diagnose", "gradients", *args],
    )
    if options.decision:
        asked = options.m or options.target_n
        pairs = [(m, n) for m in settings.ms for n in settings.target_ns] if asked else SETTINGS
        _, files = diagnose_decision(settings, pairs=pairs, seeds=options.seeds, progress=True)
        print(files[0].read_text(encoding="utf-8"))
    else:
        rows, files = diagnose(settings, progress=True)
        print(f"{settings.worlds[0]}\n\n{table_of_world(rows, settings.worlds[0])}\n")
    print("\n".join(str(file) for file in files))


def sweeps_of(names: Sequence[str]) -> tuple[str, ...]:
    """`all` is every sweep, `none` is none.

    Raises:
        ValueError: for an unknown one.
    """
    for name in names:
        if name not in SWEEP_CHOICES:
            raise UserError(f"--sweeps: unknown sweep {name!r}.{did_you_mean(name, SWEEP_CHOICES)}")
    return ("m", "alpha", "tail") if "all" in names else tuple(name for name in names if name != "none")


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="tealightning diagnose gradients",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("-m", type=int, nargs="+", metavar="M", help="rollouts a prompt (default: 16 32)")
    add("-N", "--target_n", type=int, nargs="+", metavar="N", help="best-of-N budgets of deployment (default: 128)")
    add("--alpha", type=float, nargs="+", default=[0.25], help="tail levels of the tail estimators (default: 0.25)")
    add(
        "--estimators",
        nargs="+",
        metavar="NAME[:PARAMETER=VALUE,...]",
        help="default: all registered ones and a few variants; N, alpha and k = min(N, m) are filled in",
    )
    add(
        "--worlds",
        nargs="+",
        metavar="WORLD",
        help="default: gaussian gpd_-0.3 gpd_0 gpd_0.2 student_t5 mixture bounded discrete two_arms; "
        "also gpd_SHAPE and two_arms_PROBABILITY_OF_B",
    )
    add(
        "--sweeps",
        nargs="+",
        default=["none"],
        metavar="SWEEP",
        help="none, m (16 to 512), alpha (0.1 to 1), tail (generalised Pareto rewards of index -0.4 to 0.3), all; at "
        "the first m, N and alpha (default: none)",
    )
    add("--groups", type=int, default=20_000, help="groups behind each figure (default: 20000)")
    add("--decision", action="store_true", help="train in the two-arm world instead: decision.md, decision.csv")
    add("--seeds", type=int, default=5, help="trainings for each entry of --decision (default: 5)")
    add("--seed", type=int, default=0, help="all random numbers follow from it (default: 0)")
    add(
        "--out",
        type=Path,
        default=Path("runs/diagnose_gradients"),
        help="folder for the report (default: runs/diagnose_gradients)",
    )
    return result


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
        ValueError: for an unknown one.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    what, rest = args[0], list(args[1:])
    if what == "gradients":
        from tealightning.cli.diagnose_gradients import diagnose_gradients

        diagnose_gradients(rest)
    elif what == "tail":
        from tealightning.cli.diagnose_tail import diagnose_tail

        diagnose_tail(rest)
    else:
        raise UserError(f"Unknown instrument {what!r}.{did_you_mean(what, ['gradients', 'tail'])}")
