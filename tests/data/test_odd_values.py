"""Whatever the rows of a file hold: refused as they are read, with the place, or good for all later use."""

import contextlib
import csv
import datetime
import io
import json
import math
import pickle
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tealightning.callbacks.report import table_rows
from tealightning.data import PromptDataModule
from tealightning.data.prompts import build_prompt_set
from tealightning.data.sources import read_rows
from tealightning.errors import UserError
from tealightning.rewards import HTTPReward, WeightedReward
from tealightning.text.chat import ChatFormatter
from tealightning.types import RolloutBatch

LONE = "half \ud83d"


@pytest.mark.parametrize("value", [LONE, [LONE], {"a": {"b": [LONE]}}, {LONE: 1}])
@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_half_a_character_is_refused_with_its_place(tmp_path: Path, policy_tokenizer, name, value):
    rows = [{"prompt": "a", "id": "x", "answer": 1}, {"prompt": "b", "id": "y", "answer": value}]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / name
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    place = "line 2" if name.endswith("l") else r"row 1 \(from 0\)"
    with pytest.raises(UserError, match=rf"p\.jsonl?: {place}: column 'answer': it holds half a character"):
        build_prompt_set(read_rows(str(path)), source=str(path), formatter=ChatFormatter(policy_tokenizer))


def test_half_a_character_in_an_identifier_or_a_name_is_refused(prompt_set):
    with pytest.raises(UserError, match=r"data: row 1 \(from 0\): column 'id': it holds half a character"):
        prompt_set([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": LONE}])
    with pytest.raises(UserError, match=r"column 'half \\ud83d': it holds half a character"):
        prompt_set([{"prompt": "a", LONE: 1}])
    with pytest.raises(UserError, match=r"system_prompt holds half a character .* at 5"):
        PromptDataModule(system_prompt=LONE)


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, Decimal("NaN")])
def test_blank_identifier_is_refused(prompt_set, value):
    with pytest.raises(UserError, match=r"data: row 1 \(from 0\): it has no identifier in column 'key'"):
        prompt_set([{"prompt": "a", "key": "x"}, {"prompt": "b", "key": value}], id_column="key")


@pytest.mark.parametrize("value", [b"x", ["x"], {"x": 1}])
def test_identifier_that_is_no_text_or_number_is_refused(prompt_set, value):
    message = rf"row 0 \(from 0\): column 'id': an identifier is a text or a number, got {type(value).__name__}"
    with pytest.raises(UserError, match=message):
        prompt_set([{"prompt": "a", "id": value}])


def test_identifiers_of_other_types_are_their_text(prompt_set):
    ids = [7, 1.0, True, Decimal("1.10"), datetime.date(2026, 1, 2), "a\0b", "é"]
    prompts = prompt_set([{"prompt": "a", "id": value} for value in ids])
    assert prompts.ids.to_pylist() == ["7", "1.0", "True", "1.10", "2026-01-02", "a\0b", "é"]


@pytest.mark.parametrize("role", ["reward", "gold"])
def test_column_that_a_reward_cannot_take_is_refused_at_the_start(tmp_path: Path, policy_tokenizer, role):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "x": 1}\n' * 3 + '{"prompt": "b", "x": NaN}\n')
    reward = WeightedReward({"server": HTTPReward("http://127.0.0.1:1/")}, {"server": 1.0})
    data = PromptDataModule(val=str(path))
    data.tokenizer = policy_tokenizer
    data.trainer = SimpleNamespace(callbacks=[SimpleNamespace(**{role: reward})], lightning_module=None)
    with pytest.raises(UserError, match=r"data\.val: .*p\.jsonl: line 4: reward 'http' cannot send column 'x'"):
        data.setup("validate")
    reward.rewards["server"].metadata_keys = []
    data.setup("validate")


class ForeignRows(list):
    """A data set of the hub whose second row has a value that Python cannot hold."""

    def select_columns(self, names):
        return self if "when" in names else [{}] * len(self)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if row.get("when") == "never":
            raise OverflowError("date value out of range")
        return row


def test_value_that_cannot_be_read_is_named_by_row_and_column(prompt_set):
    rows = ForeignRows([{"prompt": "a", "when": "now"}, {"prompt": "b", "when": "never"}])
    rows.column_names = ["prompt", "when"]
    with pytest.raises(UserError, match=r"data: row 1 \(from 0\), column 'when': date value out of range"):
        prompt_set(rows)


# ---------------------------------------------------------------- a sweep

ODD = "aé😀\0\ud83d\ude00\n\t\r\"',|{[ "  # half characters and NUL included
TEXTS = st.text(ODD, max_size=4) | st.text(max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4
)
ARROW = st.sampled_from(
    [
        pyarrow.array([b"\xff", b""], pyarrow.binary()),
        pyarrow.array([b"\xff", b"a"], pyarrow.binary()).view(pyarrow.string()),
        pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([[(1, b"x")], None], pyarrow.map_(pyarrow.int64(), pyarrow.binary())),
        pyarrow.array([0, 5 * 10**18], pyarrow.timestamp("us")),
        pyarrow.array([0, 1], pyarrow.timestamp("ns", "UTC")),
        pyarrow.array([1, None], pyarrow.duration("ns")),
        pyarrow.array([Decimal("1.1"), None]),
        pyarrow.array(["u", "v"]).dictionary_encode(),
        pyarrow.array([float("nan"), float("inf")], pyarrow.float16()),
        pyarrow.nulls(2),
    ]
)


def written(path: Path, rows: list[dict[str, Any]], odd: pyarrow.Array) -> None:
    """`rows` in the format of `path`, as programs write them that do not look at what they write."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        columns = {key: [str(row.get(key, "")).encode(errors="replace").decode() for row in rows] for key in rows[0]}
        pyarrow.parquet.write_table(pyarrow.table(columns | {"odd": odd}), path)
    else:
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), dialect="excel" if path.suffix == ".csv" else "excel-tab")
            table.writeheader()
            table.writerows([{key: row.get(key, "") for key in rows[0]} for row in rows])


def use(batch: Any) -> None:
    """All that is done with a batch: tables, JSON, CSV, processes."""
    pickle.loads(pickle.dumps(batch))
    count = len(batch.ids)
    batch.rollouts = RolloutBatch(
        prompt_ids=torch.ones(count, 1, dtype=torch.long),
        prompt_lengths=torch.ones(count, dtype=torch.long),
        completion_ids=torch.ones(count, 1, dtype=torch.long),
        completion_lengths=torch.ones(count, dtype=torch.long),
        rollout_log_probs=torch.zeros(count, 1),
        truncated=torch.zeros(count, dtype=torch.bool),
        rewards=torch.zeros(count, 1),
        completions=["é"] * count,
    )
    rows = table_rows(batch, phase="val", step=0, num_prompts=count)
    json.dumps(rows, ensure_ascii=False).encode()
    csv.DictWriter(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), list(rows[0])).writerows(rows)
    for metadata in batch.metadata:
        json.dumps(metadata, ensure_ascii=False, default=str, skipkeys=True).encode()
    pyarrow.array(batch.ids)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_any_row_is_refused_with_its_place_or_good_for_all_that_follows(tmp_path, policy_tokenizer, extension):
    outcomes = {"used": 0, "refused": 0}
    path = tmp_path / f"p.{extension}"
    formatter = ChatFormatter(policy_tokenizer)

    @seed(20261201)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(TEXTS, TEXTS, VALUES), min_size=2, max_size=2), TEXTS, ARROW)
    def sweep(values, column, odd) -> None:
        rows = [
            {"prompt": "p" + prompt, "id": f"{i}{key}", "x" + column: value}
            for i, (prompt, key, value) in enumerate(values)
        ]
        with contextlib.suppress(UnicodeEncodeError, pyarrow.ArrowInvalid):  # the writer would not write it
            written(path, rows, odd)
            try:
                prompts = build_prompt_set(read_rows(str(path)), source=str(path), formatter=formatter)
            except UserError as error:
                told = str(error)
                told.encode()
                assert str(path) in told and ("line " in told or "row " in told or "column" in told), told
                outcomes["refused"] += 1
                return
        if "prompts" in locals():
            use(prompts.batch([0, 1]))
            outcomes["used"] += 1

    sweep()
    assert min(outcomes.values()) >= 5, outcomes
