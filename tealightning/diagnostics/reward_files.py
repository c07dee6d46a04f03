"""Read rewards of many prompts from JSON lines, CSV, or a run's folder."""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from tealightning.diagnostics.pool import RolloutPool
from tealightning.errors import UserError


def read_rewards(path: Path) -> RolloutPool:
    """The rewards in a file; prompts may have different numbers of them, NaN fills up.

    - `*.csv`: columns `prompt_id` and `reward`, a line a sample; an empty reward could not be scored.
    - otherwise JSON lines: `{"rewards": [...], "id": ...}` a prompt, with `key` for `id`, or without either; null or
      NaN could not be scored.

    Samples of one prompt are pooled wherever they stand.

    Raises:
        ValueError: naming file and line, if it does not exist, or holds something else, or nothing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    lines = _csv_lines(path) if path.suffix.lower() == ".csv" else _json_lines(path)
    by_id: dict[str, list[float]] = {}
    for prompt_id, rewards in lines:
        by_id.setdefault(prompt_id, []).extend(rewards)
    width = max(map(len, by_id.values()), default=0)
    if width == 0:
        raise UserError(f"{path}: there are no rewards in it.")
    rows = [rewards + [math.nan] * (width - len(rewards)) for rewards in by_id.values()]
    return RolloutPool(ids=list(by_id), rewards=torch.tensor(rows, dtype=torch.float64))


def read_run(folder: Path, which: Literal["before", "after"]) -> RolloutPool:
    """The validation rewards of a run before or after training.

    Raises:
        ValueError: if the run has not written them.
    """
    file = folder / f"rewards_{which}.jsonl"
    if not file.is_file():
        raise UserError(
            f"{file}: no such file. The callback BestOfNReport writes it once a run has two validations "
            "(trainer.num_sanity_val_steps=-1 makes the first one before training)."
        )
    return read_rewards(file)


def _json_lines(path: Path) -> Iterator[tuple[str, list[float]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: this is not JSON: {error.msg}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("rewards"), list):
            raise UserError(f'{place}: expected {{"rewards": [numbers]}}, got {line.strip()[:60]!r}.')
        for value in row["rewards"]:
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise _no_number(place, value)
        prompt_id = row.get("id", row.get("key", f"line {number}"))
        yield str(prompt_id), [math.nan if value is None else float(value) for value in row["rewards"]]


def _csv_lines(path: Path) -> Iterator[tuple[str, list[float]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    if {"prompt_id", "reward"} - set(reader.fieldnames or ()):
        raise UserError(f"{path}, line 1: expected columns prompt_id and reward, got {reader.fieldnames or 'nothing'}.")
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        text = row["reward"]
        if text is None:
            raise UserError(f"{place}: expected {len(reader.fieldnames or ())} columns, as in line 1.")
        try:
            yield row["prompt_id"], [float(text) if text.strip() else math.nan]
        except ValueError:
            raise _no_number(place, text) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text: {error.reason}.") from None


def _no_number(place: str, value: Any) -> ValueError:
    return UserError(
        f"{place}: a reward is a number, or null (in CSV: empty) if it could not be scored; got {value!r}."
    )
