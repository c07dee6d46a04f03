"""Make the tables of docs/reliability.md from what the fault tests and the soak run wrote.

make test-faults
python tools/soak.py
python tools/reliability_report.py
python tools/update_estimator_pages.py --results docs/reliability.md
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tealightning.diagnostics.tables import markdown_table


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
    parser.add_argument("--out", type=Path, default=Path("runs/faults/faults.md"))
    args = parser.parse_args()
    args.out.write_text(fault_table(read_injected(args.injected)) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
