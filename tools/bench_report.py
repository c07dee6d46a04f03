"""Collect what the benchmarks printed into one table for the documentation.

    python tools/bench_step.py --size 10m --engine vllm | tee runs/bench/step-10m-vllm.txt
    python tools/bench_report.py runs/bench/*.txt --out runs/bench/figures.md
    python tools/update_estimator_pages.py --results docs/benchmarks.md

The last line of each file is the benchmark's JSON line. Every figure names its command, commit and clock.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tealightning.reporting.tables import markdown_table

Figure = tuple[str, Any]
"""(what, a ratio with its range or a number)"""


def step_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_step.py`."""
    first = next(iter(line["seconds"]))
    for name, ratio in line["train_over_plain"].items():
        yield f"train phase over the plain pass, {name}", ratio
    if line["engine"] == "none":
        return
    yield f"step over the sum of bare parts, {first}", line["step_over_bare"]
    for name, ratio in line["train_over_first"].items():
        yield f"train phase, {name} over {first}", ratio
    yield "weight sync, share of a step", line["sync_share"]


def peer_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_peer.py`."""
    for name, ratio in line["step_over_trl"].items():
        yield f"step over TRL {line['trl']}'s GRPO step, {name}", ratio


def scale_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_scale.py`."""
    for name, value in line["exponent"].items():
        yield f"exponent of step time in {name}", value
    seconds = line.get("process_seconds", {})
    for count, value in list(seconds.items())[1:]:
        yield f"speed-up, {count} processes", next(iter(seconds.values())) / value


def memory_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_memory.py`."""
    for row in line["rows"]:
        yield f"peak loss memory over naive, vocabulary {row['vocabulary']:,}, {row['tokens']:,} tokens", row["ratio"]


def step_memory_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_step_memory.py`."""
    yield "peak memory of a training step over the plain pass", line["peak_over_plain"]


def quality_figures(line: dict[str, Any]) -> Iterator[Figure]:
    """Of `bench_quality.py`."""
    found = line["seconds_over_trl"]
    at_most = ", at most" if found["is_bound"] else ""
    # A run that never gets there has no ratio, and the table says so: infinitely many seconds.
    ratio = float("inf") if found["ratio"] is None else found["ratio"]
    yield f"seconds to best-of-{line['n']} {line['until']:g} over TRL {line['trl']}'s{at_most}", ratio


FIGURES: dict[str, Callable[[dict[str, Any]], Iterator[Figure]]] = {
    "step": step_figures,
    "peer": peer_figures,
    "scale": scale_figures,
    "memory": memory_figures,
    "step_memory": step_memory_figures,
    "quality": quality_figures,
}


def read_line(file: Path) -> dict[str, Any]:
    """The JSON line of a benchmark.

    Raises:
        ValueError: if the file does not end with one that this report knows.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        line = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise ValueError(f"{file}: the last line is no JSON line of a benchmark ({error}).") from error
    if line.get("bench") not in FIGURES:
        raise ValueError(f"{file}: bench must be one of {sorted(FIGURES)}, got {line.get('bench')!r}.")
    return line


def rows_of(line: dict[str, Any], number: int) -> Iterator[dict[str, str]]:
    """The rows of one benchmark; `number` refers to its command below the table."""
    for what, value in FIGURES[line["bench"]](line):
        ratio = value if isinstance(value, dict) else {"median": value}
        spread = f"{ratio['min']:.2f} to {ratio['max']:.2f}" if "min" in ratio else ""
        yield {
            "figure": what,
            "model": line["size"],
            "engine": line["engine"],
            "P, m, prompt, T": shape_of(line),
            "median": f"{ratio['median']:.3f}",
            "range": spread,
            "run": f"({number})",
        }


def shape_of(line: dict[str, Any]) -> str:
    """Prompts, group size, tokens of a prompt and of a completion."""
    if "prompts" not in line:
        return ""
    prompt = line.get("prompt_tokens") or "varied"
    return f"{line['prompts']}, {line['group_size']}, {prompt}, {line['tokens']}"


def report(lines: list[dict[str, Any]]) -> str:
    """The page's text."""
    rows = [row for number, line in enumerate(lines, 1) for row in rows_of(line, number)]
    sources = [
        f"({number}) `{line['command']}`, commit {line['commit']}, torch {line['torch']}, {line['threads']} thread(s), "
        f"{line['clock']} clock, load {line['load']}"
        for number, line in enumerate(lines, 1)
    ]
    return "# Benchmarks\n\n" + markdown_table(rows) + "\n\n" + "  \n".join(sources) + "\n"


def main() -> None:
    """Read, write and name the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what the benchmarks printed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/figures.md"))
    options = parser.parse_args()
    text = report([read_line(file) for file in options.files])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
