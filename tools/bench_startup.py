"""CPU time to start commands, as ratios to importing the libraries that they need; one JSON line.

    python tools/bench_startup.py
    python tools/bench_startup.py --repeats 9

Each command and its libraries run in turn, as processes of their own, so that a busy machine slows both; user and
system time are added, and the ratio is that of the medians. `refused` is a `fit` with a setting of a wrong type.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
COMMANDS = {  # name: (arguments of tealightning, libraries, exit status)
    "estimators": (["estimators"], "torch", 0),
    "help": (["fit", "--help"], "lightning.pytorch, transformers", 0),
    "refused": (
        ["fit", "-c", "configs/experiments/prose.yaml", "--rollout.group_size=abc"],
        "lightning.pytorch, transformers",
        2,
    ),
}


def cpu_seconds(args: Sequence[str], status: int = 0) -> float:
    """User and system time of `python ARGS`.

    Raises:
        RuntimeError: if it ends with another status.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != status:
        raise RuntimeError(f"python {' '.join(args)} ended with status {done.returncode}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def startup_ratio(args: Sequence[str], libraries: str, status: int, repeats: int) -> float:
    """Median CPU time of `tealightning ARGS` over that of `import LIBRARIES`."""
    own, imports = [], []
    for _ in range(repeats):
        imports.append(cpu_seconds(["-c", f"import {libraries}"]))
        own.append(cpu_seconds(["-m", "tealightning", *args], status))
    return median(own) / median(imports)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="NAME")
    options = parser.parse_args()
    ratios = {name: round(startup_ratio(*COMMANDS[name], options.repeats), 3) for name in options.commands}
    print(json.dumps({"bench": "startup", "repeats": options.repeats} | ratios))


if __name__ == "__main__":
    main()
