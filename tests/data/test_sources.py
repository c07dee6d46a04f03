import bz2
import copy
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tealightning.data.sources import Source, columns_of, parse_source, place_of, read_rows
from tealightning.errors import UserError

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
        ("a.parquet", b"", "is not a Parquet file"),
        ("a.csv", b'a,b\n"x\ny",1\n"z\nw"\n', "line 4: expected the header's 2 fields, got 1"),
        ("a.csv", b'a,b\nx,1\n"y,2\nz,3\n', "in the row that begins in line 3: unexpected end of data"),
        ("a.csv", b"a,b,a\n1,2,3\n", "several columns have the same name: 'a'"),
        ("a.csv", b"prompt\n" + b"a" * 20_000 + b"\n\xe9\n", r"a\.csv, line 3 is not UTF-8 text"),
        ("a.csv", "prompt\na".encode("utf-16"), "It is UTF-16: convert it"),
        ("a.csv", "prompt,id\na,1".encode("utf-16-le"), "NUL characters in the names of columns. Is it UTF-16"),
        ("a.csv", b"PK\x03\x04\xff", "It is a zip archive: unpack it"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1 is not UTF-8 text: byte 0xff .* It is UTF-16"),
        ("a.jsonl", b'[{"prompt": "a"}]', r"line 1: expected an object.* Is it a list of objects \(\.json\)"),
        ("a.jsonl", b'[\n{"prompt": "a"}\n]', r"line 1 is not JSON.* Is it a list of objects"),
        ("a.jsonl", b'{"a": 1}\n{"a": {"x": 1, "x": 2}}', "line 2 cannot be read: the key 'x' comes twice"),
        ("a.jsonl", b"PAR1abc", "It is a Parquet file: name it .parquet"),
        ("a.json", b'[{"a": 1, "a": 2}]', r"a\.json cannot be read: the key 'a' comes twice"),
        ("a.json", b'[{"a": 1}, "b"]', r"row 1 \(from 0\) is str"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", r"a\.json cannot be read: Exceeds the limit"),
        ("a.tar.gz", b"", r"cannot tell the format from '\.gz'"),
    ],
)
def test_bad_file_is_explained(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


PLAIN = b'{"prompt": "a"}\n{"prompt": "b", "x": 1}\n'
READ = [{"prompt": "a"}, {"prompt": "b", "x": 1}]
PACKED = {
    "gz": gzip.compress(PLAIN),
    "bz2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "zst": pyarrow.compress(PLAIN, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", ["p.jsonl.{}", "p.ndjson.{}", "P.JSONL.{}", "p.jsonl"])
@pytest.mark.parametrize("packed", PACKED)
def test_compressed_lines_are_read_sliced_and_pickled(tmp_path: Path, name, packed):
    path = tmp_path / name.format(packed)
    path.write_bytes(PACKED[packed])
    rows = read_rows(str(path))
    assert list(rows) == list(pickle.loads(pickle.dumps(rows))) == list(copy.deepcopy(rows)) == READ
    assert (rows[1], place_of(rows, 1)) == (READ[1], "line 2")
    assert list(read_rows(f"{path}@[1:]")) == READ[1:]
    path.unlink()
    assert list(rows) == READ


def test_name_of_a_compression_without_one_is_read(tmp_path: Path):
    (tmp_path / "p.jsonl.gz").write_bytes(PLAIN)
    assert list(read_rows(str(tmp_path / "p.jsonl.gz"))) == READ


def test_every_format_is_read_compressed(tmp_path: Path):
    rows = [{"prompt": 'say "hi", now', "answer": "1"}]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    contents = {
        "csv": b'prompt,answer\n"say ""hi"", now",1\n',
        "tsv": b'prompt\tanswer\nsay "hi", now\t1\n',
        "json": json.dumps(rows).encode(),
        "ndjson": json.dumps(rows[0]).encode(),
        "parquet": parquet.getvalue(),
    }
    for extension, content in contents.items():
        for name, data in ((f"p.{extension}", content), (f"p.{extension}.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(data)
            assert list(read_rows(str(tmp_path / name))) == rows, name


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_compressed_file_is_named(tmp_path: Path, packed, damage):
    path = tmp_path / f"p.jsonl.{packed}"
    content = PACKED[packed]
    path.write_bytes(content[:-5] if damage == "cut" else content[:12] + b"x" * 40)
    with pytest.raises(UserError, match=rf"p\.jsonl\.{packed} cannot be unpacked into /"):
        read_rows(str(path))


ODD_NAMES = ["a@b", "a:b", "run:3/p@2", "a b", "a#b", "a?b", "a%20b", "ü😀", "a[1]", "a\nb", "~a", "x@[:1]", "a,b='c'"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_file_that_is_there_is_read_whatever_its_name(tmp_path: Path, monkeypatch, name):
    path = tmp_path / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PLAIN)
    monkeypatch.chdir(tmp_path)
    for text in (str(path), f"{name}.jsonl", path.as_uri()):
        assert list(read_rows(text)) == READ, text
        assert list(read_rows(f"{text}@[1:]")) == READ[1:], text
    path.unlink()
    with pytest.raises(UserError, match=r"(?s)There is no file /.*\.jsonl"):
        read_rows(f"{path}@[1:]")


def test_home_and_links_are_followed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_bytes(PLAIN)
    (tmp_path / "link.jsonl").symlink_to("p.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("nothing.jsonl")
    assert list(read_rows("~/link.jsonl")) == READ
    with pytest.raises(UserError, match=r"broken\.jsonl\. It is a link to nothing\.jsonl"):
        read_rows("~/broken.jsonl")
    folder = tmp_path / "set@1.jsonl"  # a folder, whatever its name
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(PLAIN)
    assert [row["prompt"] for row in read_rows("~/set@1.jsonl@train[1:]")] == ["b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/p.jsonl", "is an address of the network: download the file"),
        ("s3://bucket/p.jsonl@[:5]", "is an address of the network"),
        ("/nowhere/*.jsonl", "A pattern is not expanded"),
        ("p.jsonl[:1000]", "a data source is a file"),
        ("/nowhere/run:3/a@b.jsonl.gz", r"There is no file /nowhere/run:3/a@b\.jsonl\.gz"),
        ("~nobody-of-that-name/p.jsonl", "There is no file .*~nobody-of-that-name/p"),
        ("x" * 5000 + ".jsonl", "There is no file"),
        ("a\0.jsonl", "There is no file"),
        ("a\udcff.jsonl", r"a data source holds half a character .* at 1: 'a\\udcff\.jsonl'"),
        ("a.tar.gz", "neither a file"),
    ],
)
def test_source_that_is_not_there_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        read_rows(text)


def test_large_cell_of_a_csv_is_read(tmp_path: Path):
    (tmp_path / "a.csv").write_text('prompt,id\n"' + "x" * 200_000 + '",1\n')
    limit = csv.field_size_limit()
    (row,) = read_rows(str(tmp_path / "a.csv"))
    assert len(row["prompt"]) == 200_000
    assert csv.field_size_limit() == limit


def test_parquet_types_arrive_as_python_values(tmp_path: Path):
    columns = {
        "prompt": ["a", "b"],
        "map": pyarrow.array([[("x", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "category": pyarrow.array(["u", "v"]).dictionary_encode(),
        "chat": [[{"role": "user", "content": "c"}], []],
        "day": [datetime.date(2026, 1, 2), None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    rows = read_rows(str(tmp_path / "p.parquet"))
    expected = [
        {"prompt": "a", "map": {"x": 1}, "category": "u", "chat": columns["chat"][0], "day": columns["day"][0]},
        {"prompt": "b", "map": None, "category": "v", "chat": [], "day": None},
    ]
    assert list(rows) == [rows[0], rows[-1]] == expected
    assert list(pickle.loads(pickle.dumps(rows))) == list(copy.deepcopy(rows)) == expected


def _not_utf8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


STRANGE_COLUMNS = {
    "text that is no UTF-8": (_not_utf8([b"a", b"\xff"]), 1),
    "date out of Python's range": (pyarrow.array([5 * 10**18, 0], pyarrow.timestamp("us")), 0),
    "key twice": (
        pyarrow.array([[], [("x", 1), ("x", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        1,
    ),
}


@pytest.mark.parametrize("kind", STRANGE_COLUMNS)
def test_value_of_a_parquet_file_is_named_by_row_and_column(tmp_path: Path, kind):
    column, row = STRANGE_COLUMNS[kind]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "odd": column}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"p\.parquet, row {row} \(from 0\), column 'odd' cannot be read"):
        list(read_rows(str(tmp_path / "p.parquet")))


def test_damaged_column_of_a_parquet_file_is_named(tmp_path: Path):
    path = tmp_path / "p.parquet"
    columns = {name: [f"{name}{i}" * 9 for i in range(1000)] for name in ("good", "bad")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, use_dictionary=False, compression="none")
    content = bytearray(path.read_bytes())
    at = content.index(b"bad500bad500")
    content[at - 3000 : at] = b"\xff" * 3000
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.parquet, column 'bad' cannot be read"):
        read_rows(str(path))


BROKEN_FOLDERS = {
    "other columns": ({"a.jsonl": b'{"id": 1}\n', "b.jsonl": b'{"x": 1}\n'}, r"b\.jsonl has the columns \['x'\]"),
    "no JSON": ({"train.jsonl": b'{"id": 1}\n{"id": \n'}, r"train\.jsonl, line 2 is not JSON"),
    "no CSV": ({"train.csv": b'a\n"x'}, r"train\.csv is not CSV, in the row that begins in line 2"),
    "cut short": ({"train.jsonl.gz": PACKED["gz"][:-12]}, r"train\.jsonl\.gz cannot be unpacked"),
    "nothing": ({"train.weird": b"x"}, "No .*data files found"),
    "empty": ({"train.jsonl": b""}, "neither a file"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folder_names_the_file(tmp_path: Path, case):
    files, message = BROKEN_FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path))


def test_map_in_a_folder_names_file_and_column(tmp_path: Path):
    table = pyarrow.table({"m": pyarrow.array([[("x", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet, column 'm': name the file, not its folder"):
        read_rows(str(tmp_path))


def test_what_is_no_regular_file_is_refused(tmp_path: Path, monkeypatch):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=r"p\.jsonl is no regular file"):
        read_rows(str(tmp_path / "p.jsonl"))
    (tmp_path / "q.jsonl").write_bytes(PLAIN)
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: os.open("/nowhere", os.O_RDONLY))
    with pytest.raises(UserError, match=r"q\.jsonl cannot be read: No such file"):
        read_rows(str(tmp_path / "q.jsonl"))
