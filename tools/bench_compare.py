"""Compare training speed of two commits: ratios of `bench_step.py`, in turn.

    python tools/bench_compare.py main HEAD --tolerance 0.05 -- --size playground --engine vllm

What follows `--` goes to `bench_step.py`, that of this checkout for both commits. Each commit is checked out into a
folder of its own and measured `--rounds` times, the commits taking turns. Prints a table and one JSON line; the exit
status is 1 if a ratio of the second commit is worse than that of the first by more than `--tolerance`, relatively.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The tree of `commit` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tealightning-compare-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def bench_step(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """The JSON line of one run with the package of `tree`."""
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tools" / "bench_step.py"), *arguments]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"bench_step.py failed with the package of {tree}:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def ratios_of(result: dict[str, Any]) -> dict[str, float]:
    """What is compared: ratios of one process, which do not depend on how fast the machine is."""
    ratios = {"step_over_bare": result["step_over_bare"]["median"]}
    ratios |= {f"{phase}_over_bare": value for phase, value in result["phase_over_bare"].items()}
    return ratios | {f"{name}_train_over_first": r["median"] for name, r in result["train_over_first"].items()}


def compare(before: list[dict[str, float]], after: list[dict[str, float]], tolerance: float) -> dict[str, Any]:
    """ratio -> its medians before and after, and whether it is worse."""
    rows = {}
    for name in before[0]:
        old, new = median(r[name] for r in before), median(r[name] for r in after)
        rows[name] = {"before": round(old, 4), "after": round(new, 4), "worse": new > old * (1 + tolerance)}
    return rows


def main() -> None:
    """Measure, print and exit."""
    own, given = sys.argv[1:], []
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="commit, branch or tag")
    parser.add_argument("after", help="commit, branch or tag")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(own)
    with checkout(options.before) as old, checkout(options.after) as new:
        runs = [(bench_step(old, given), bench_step(new, given)) for _ in range(options.rounds)]
    before, after = ([ratios_of(result) for result in column] for column in zip(*runs, strict=True))
    rows = compare(before, after, options.tolerance)
    print(f"| {'ratio':<24} | {'before':>8} | {'after':>8} | worse |\n|{'-' * 26}|{'-' * 10}|{'-' * 10}|-------|")
    for name, row in rows.items():
        print(f"| {name:<24} | {row['before']:8.3f} | {row['after']:8.3f} | {'yes' if row['worse'] else '':<5} |")
    commits = {"before": runs[0][0]["commit"], "after": runs[0][1]["commit"]}
    facts = {"commits": commits, "tolerance": options.tolerance, "rounds": options.rounds, "arguments": given}
    print("\n" + json.dumps({"bench": "compare"} | facts | {"ratios": rows}))
    raise SystemExit(int(any(row["worse"] for row in rows.values())))


if __name__ == "__main__":
    main()
