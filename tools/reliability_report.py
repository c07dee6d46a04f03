"""Make the tables of docs/reliability.md from what the fault tests and the soak run wrote.

make test-faults
python tools/soak.py
python tools/reliability_report.py
python tools/update_estimator_pages.py --results docs/reliability.md
"""

import argparse
import ast
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tealightning.reporting.tables import markdown_table

REPOSITORY = Path(__file__).parents[1]
PEERS = {
    "the loss changes with the split into micro-batches": ("TRL #3021", "TRL #5619", "open-instruct #1161"),
    "log-probs of vLLM and trainer differ at a temperature, top-p or top-k": ("TRL #4159", "TRL #6789"),
    "rollouts of stale weights go unnoticed": ("verl #7495", "TRL #5312"),
    "a weight sync or collective hangs without an error": ("TRL #6796", "TRL #2923"),
    "a resumed run drops or repeats prompts or rollouts": ("OpenRLHF #1322", "OpenRLHF #1103", "open-instruct #1523"),
    "groups without variance dilute or spike the loss": ("TRL #6367", "NeMo-RL #4158"),
    "tokens change when completions are tokenised again": ("TRL #5224", "verl #6719"),
    "pad = eos hides the end of a completion": ("TRL #4970",),
    "logits run out of memory": ("TRL #3678", "NeMo-RL #3124"),
    "what cannot be scored counts as reward 0": ("TRL #5902",),
    "best-of-n is biased low": ("verl #7240",),
    "the reward model gets the policy's tokens": ("OpenRLHF #242",),
    "a seed never reaches vLLM": ("TRL #7040",),
    "rewards are clipped or squashed by default": ("OpenRLHF clips",),
}
"""Public reports of failures in comparable frameworks; the docstring of each test that guards against one names it."""


def peer_table(root: Path = REPOSITORY / "tests") -> str:
    """One row a failure: where it was reported and the tests that guard against it."""
    tests = guarding_tests(root)
    return markdown_table(
        [
            {
                "failure": failure,
                "reported": ", ".join(references),
                "tests": ", ".join(f"`{name}`" for name in sorted({t for ref in references for t in tests[ref]})),
            }
            for failure, references in PEERS.items()
        ]
    )


def guarding_tests(root: Path) -> dict[str, list[str]]:
    """Report -> names of the tests whose docstring names it, as `TRL #3021` or among others: `TRL #3021, #5619`."""
    found: dict[str, list[str]] = {reference: [] for references in PEERS.values() for reference in references}
    for file in sorted(root.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for reference in named(ast.get_docstring(node) or "") & found.keys():
                    found[reference].append(node.name)
    return found


def named(docstring: str) -> set[str]:
    """The reports that a docstring names."""
    text = re.sub(r"\s+", " ", docstring)
    reports = re.findall(r"([A-Za-z-]+) (#\d+(?:(?:, | and |, and |/)#\d+)*)", text)
    numbered = {f"{peer} {number}" for peer, numbers in reports for number in re.findall(r"#\d+", numbers)}
    return numbered | {reference for reference in ("OpenRLHF clips",) if reference in text}


def fault_table(injected: Iterable[dict[str, Any]]) -> str:
    """One row a fault: how it was injected, how often in all tests, what was lost."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in sorted(injected, key=lambda one: one["test"].partition("[")[0]):
        row = rows.setdefault((one["fault"], one["how"]), {"times": 0, "lost": [], "test": one["test"]})
        row["times"] += one["times"]
        row["lost"] += [one["lost"]] if one["lost"] not in row["lost"] else []
    return markdown_table(
        [
            {
                "fault": fault,
                "injected": how,
                "times": f"{row['times']:,}",
                "lost": ", ".join(row["lost"]),
                "test": f"`{row['test'].partition('[')[0].rpartition('/')[2]}`",
            }
            for (fault, how), row in rows.items()
        ]
    )


def session(junit: Path) -> str:
    """What became of the tests, in a sentence: those that failed write no row.

    Raises:
        FileNotFoundError: if the fault tests have not run to their end.
    """
    if not junit.exists():
        raise FileNotFoundError(f"There is no {junit}: run `make test-faults` first, and let it end.")
    (suite,) = ElementTree.parse(junit).getroot()  # of our own pytest: what it wrote is trusted
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return (
        f"{count['tests']} tests at commit {suite.attrib['name']}, in {float(suite.attrib['time']) / 60:.0f} minutes: "
        f"{count['failures']} failed, {count['errors']} ended with an error, {count['skipped']} were skipped."
    )


def read_injected(file: Path) -> list[dict[str, Any]]:
    """
    Raises:
        FileNotFoundError: if the fault tests have not run.
    """
    if not file.exists():
        raise FileNotFoundError(f"There is no {file}: run `make test-faults` first.")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injected", type=Path, default=Path("runs/faults/injected.jsonl"))
    parser.add_argument("--junit", type=Path, default=Path("runs/faults/junit.xml"))
    parser.add_argument("--out", type=Path, default=Path("runs/faults/faults.md"))
    args = parser.parse_args()
    tables = {
        args.out: f"# Injected faults\n\n{fault_table(read_injected(args.injected))}\n\n{session(args.junit)}\n",
        args.out.with_name("peers.md"): f"# Known failures of peers\n\n{peer_table()}\n",
    }
    for file, text in tables.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
