"""Command `diagnose gradients | tail`: picks the instrument."""

from collections.abc import Sequence

from tealightning.registry import did_you_mean

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
        raise ValueError(f"Unknown instrument {what!r}.{did_you_mean(what, ['gradients', 'tail'])}")
