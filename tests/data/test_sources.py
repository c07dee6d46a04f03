import copy
import json
import os
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tealightning.data.sources import Source, columns_of, parse_source, place_of, read_rows

ROWS = [{"prompt": f"p{i}", "answer": i} for i in range(10)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b.jsonl", ("a/b.jsonl", None, None, "")),
        ("a/b.jsonl@[:90%]", ("a/b.jsonl", None, None, "[:90%]")),
        ("org/name", ("org/name", None, None, "")),
        ("org/name:main", ("org/name", "main", None, "")),
        ("org/name@test", ("org/name", None, "test", "")),
        ("org/name@[5:]", ("org/name", None, None, "[5:]")),
        ("org/name:main@train[:1000]", ("org/name", "main", "train", "[:1000]")),
    ],
)
def test_source_is_taken_apart(text, parts):
    source = parse_source(text)
    assert (source.name, source.config, source.split, source.slice) == parts
    assert source.text == text


def test_existing_file_wins_over_the_syntax(tmp_path: Path):
    path = tmp_path / "odd@name.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert parse_source(str(path)) == Source(text=str(path), name=str(path))
    assert list(read_rows(str(path))) == [{"prompt": "a"}]


@pytest.mark.parametrize("text", ["", "a@b@c", "name:config:more", "name@train[", "@train"])
def test_other_forms_are_errors(text):
    with pytest.raises(ValueError, match="a data source is a file"):
        parse_source(text)


@pytest.mark.parametrize("text", ["a.jsonl@train", "a.jsonl:main", "a.csv@train[:5]"])
def test_file_has_no_splits(text):
    with pytest.raises(ValueError, match="no configurations and splits"):
        parse_source(text)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:3]", range(3)),
        ("[90%:]", [9]),
        ("[2:4]", [2, 3]),
        ("[-2:]", [8, 9]),
        ("[:]", range(10)),
        ("[5:99]", range(5, 10)),
    ],
)
def test_slice_of_a_file(jsonl: Path, part, expected):
    assert [row["answer"] for row in read_rows(f"{jsonl}@{part}")] == list(expected)


def test_slice_that_is_none_or_empty_is_an_error(jsonl: Path):
    with pytest.raises(ValueError, match=r"\[a:b\] is no slice"):
        read_rows(f"{jsonl}@[a:b]")
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(f"{jsonl}@[:0]")


def test_formats_agree(jsonl: Path, tmp_path: Path):
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    (tmp_path / "p.csv").write_text("prompt,answer\n" + "".join(f'"p{i}",{i}\n' for i in range(10)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert list(read_rows(str(jsonl))) == ROWS
    assert list(read_rows(str(tmp_path / "p.json"))) == ROWS
    assert list(read_rows(str(tmp_path / "p.parquet"))) == ROWS
    assert list(read_rows(str(tmp_path / "p.csv"))) == [{"prompt": f"p{i}", "answer": str(i)} for i in range(10)]
    assert len(read_rows(f"{tmp_path}/p.parquet@[:3]")) == 3
    assert columns_of(read_rows(str(tmp_path / "p.parquet"))) == ["prompt", "answer"]


def test_values_are_what_the_file_says(tmp_path: Path):
    odd = [{"prompt": "null", "when": "2024-01-01", "x": {"a": 1}}, {"prompt": "é\u2028", "x": [1, "two"]}]
    path = tmp_path / "odd.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in odd), encoding="utf-8")
    assert list(read_rows(str(path))) == odd
    assert columns_of(odd) == ["prompt", "when", "x"]
    (tmp_path / "odd.csv").write_text('prompt,answer\n"null","007"\n"two\nlines",NA\n')
    expected = [{"prompt": "null", "answer": "007"}, {"prompt": "two\nlines", "answer": "NA"}]
    assert read_rows(str(tmp_path / "odd.csv")) == expected


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_changed_file_is_read_anew(tmp_path: Path, extension):
    path = tmp_path / f"p.{extension}"
    for prompt in ("old", "new"):  # of the same size and time: no cache can tell them apart
        if extension == "jsonl":
            path.write_text(json.dumps({"prompt": prompt}))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": prompt}]), path)
        os.utime(path, (0, 0))
        assert read_rows(str(path))[0] == {"prompt": prompt}


@pytest.mark.parametrize("part", ["", "@[2:5]"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_rows_are_copied_and_pickled(jsonl: Path, monkeypatch, duplicate, part):
    monkeypatch.chdir(jsonl.parent)
    rows = read_rows(f"{jsonl.name}{part}")
    monkeypatch.chdir("/")
    again = duplicate(rows)
    assert list(again) == list(rows) == (ROWS[2:5] if part else ROWS)
    assert place_of(again, 1) == place_of(rows, 1) == ("line 4" if part else "line 2")


def test_pickled_rows_notice_that_the_file_changed(jsonl: Path):
    pickled = pickle.dumps(read_rows(str(jsonl)))
    jsonl.write_text(jsonl.read_text().replace("p3", "q3"))
    rows = pickle.loads(pickled)
    assert rows[2] == ROWS[2]
    with pytest.raises(ValueError, match=r"line 4 was changed"):
        rows[3]


def test_folder_of_a_data_set_has_splits(tmp_path: Path, jsonl: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(jsonl.read_text())
    (folder / "test.jsonl").write_text('{"prompt": "only", "answer": 1}\n')
    assert len(read_rows(str(folder))) == 10
    assert [row["answer"] for row in read_rows(f"{folder}@train[:2]")] == [0, 1]
    assert list(read_rows(f"{folder}@test")) == [{"prompt": "only", "answer": 1}]
    with pytest.raises(ValueError, match=r"neither a file .* nor a data set"):
        read_rows(f"{folder}@nope")


def test_missing_file_names_its_absolute_path_and_the_nearest(jsonl: Path, monkeypatch):
    monkeypatch.chdir(jsonl.parent)
    with pytest.raises(FileNotFoundError, match=rf"{jsonl.parent}/promts\.jsonl\. Did you mean 'prompts\.jsonl'\?"):
        read_rows("promts.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file .*/nowhere/p\.csv"):
        read_rows("nowhere/p.csv")


def test_unknown_data_set_is_neither_file_nor_hub(monkeypatch):
    with pytest.raises(ValueError, match=r"'no-org/no-set' is neither a file \(nothing is at /.*no-set\) nor"):
        read_rows("no-org/no-set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"hello", r"cannot tell the format from '\.txt'. Known: \.jsonl"),
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"", "has no rows"),
        ("a.csv", b"prompt\n", "has no rows"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": \n',
            r"a\.jsonl, line 3 is not JSON: Expecting value",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', r"line 2: expected an object, \{\.\.\.\}, got list"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl, line 1 is not UTF-8 text: byte 0xff at 12"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', r"line 2, column 1\)\. Is it JSON lines"),
        ("a.json", b'{"prompt": "a"}', "expected a list of objects"),
        ("a.csv", b"prompt,answer\na,1\nb\n", "line 3: expected the header's 2 fields"),
        ("a.csv", b"prompt,answer\na,1,2\n", "line 2: expected the header's 2 fields"),
        ("a.csv", b'prompt\n"a"b\n', "is not CSV"),
        ("a.parquet", b"hello", "is not a Parquet file"),
    ],
)
def test_bad_file_is_explained(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))
