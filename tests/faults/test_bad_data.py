"""Prompt files that are broken, odd or huge: each works exactly, or is one error that says where."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tealightning.data import PromptDataModule, PromptLoader
from tealightning.data.prompts import build_prompt_set
from tealightning.data.sources import read_rows
from tealightning.text.chat import ChatFormatter

GOOD = ['{"prompt": "one", "id": "a"}', '{"prompt": "two", "id": "b"}', '{"prompt": "three", "id": "c"}']
LONE = '{"prompt": "half of \\ud83d", "id": "x"}'  # JSON may, and UTF-8 cannot


@pytest.fixture(scope="module")
def tokenizer(playground: Path):
    return AutoTokenizer.from_pretrained(playground / "policy")


@pytest.fixture
def prompts_in(tokenizer, tmp_path):
    """The prompt set of a file with this content."""

    def read(content: bytes | str, name: str = "prompts.jsonl", **settings):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        formatter = ChatFormatter(tokenizer, settings.pop("chat_template", "auto"))
        return build_prompt_set(read_rows(str(file)), source=str(file), formatter=formatter, **settings)

    return read


def with_line(line: str, number: int) -> str:
    """The good rows with one more, as line `number` (from 1)."""
    return "\n".join([*GOOD[: number - 1], line, *GOOD[number - 1 :]]) + "\n"


BAD_LINES = [
    ("{", "is not JSON"),
    ('{"prompt": "x"', "is not JSON"),
    ('{"prompt": "x"} {"prompt": "y"}', "is not JSON"),
    ("{'prompt': 'x'}", "is not JSON"),
    ("prompt", "is not JSON"),
    ('{"prompt": "a\tb"}', "is not JSON"),
    ('["x"]', "expected an object, {...}, got list"),
    ("null", "expected an object, {...}, got NoneType"),
    ('"x"', "expected an object, {...}, got str"),
    ("[" * 100_000, "cannot be read: maximum recursion depth"),
    ('{"n": ' + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
    ('{"prompt": "", "id": "x"}', "it is empty"),
    ('{"prompt": [], "id": "x"}', "it is empty"),
    ('{"prompt": null, "id": "x"}', "it is missing"),
    ('{"promt": "x", "id": "x"}', "it is missing"),
    ('{"prompt": 3, "id": "x"}', "it is int"),
    ('{"prompt": {"text": "x"}, "id": "x"}', "it is dict"),
    ('{"prompt": [{"role": "user"}], "id": "x"}', "its messages are not all"),
    ('{"prompt": ["x"], "id": "x"}', "its messages are not all"),
    (LONE, "it holds half a character (a lone surrogate)"),
    ('{"prompt": "x"}', "has no identifier in column 'id'"),
    ('{"prompt": "x", "id": null}', "has no identifier in column 'id'"),
    ('{"prompt": [{"role": "user", "content": "x"}], "id": "x"}', "a prompt is a chat, but the tokenizer"),
]


@pytest.mark.fault("a broken line in a JSON-lines file", how="23 kinds of broken lines, at the start, middle and end")
def test_a_broken_line_is_named_by_its_number(prompts_in, injected):
    for line, reason in BAD_LINES:
        for number in (1, 2, 4):
            with pytest.raises(ValueError) as raised:
                prompts_in(with_line(line, number))
            told = str(raised.value)
            assert f"line {number}" in told and reason in told, told
            assert "prompts.jsonl" in told and len(told) < 1000
    injected(times=3 * len(BAD_LINES))


def test_empty_lines_count_in_the_numbers(prompts_in):
    with pytest.raises(ValueError, match=r"line 6 is not JSON"):
        prompts_in("\n\n" + GOOD[0] + "\n\n   \n{\n" + GOOD[1])


@pytest.mark.fault("bytes that are no UTF-8 in a prompt file", how="Latin-1, UTF-16, half characters")
def test_bytes_that_are_no_utf8_are_named_by_their_line(prompts_in, injected):
    cases = {
        "prompts.jsonl": [
            b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\n',
            b'{"prompt": "one"}\r\n{"prompt": "\xf0\x9f"}',
        ],
        "prompts.json": [b'[{"prompt": "one"},\n {"prompt": "caf\xe9"}]'],
        "prompts.csv": [b"prompt\ncaf\xe9\n"],
    }
    for name, contents in cases.items():
        for content in contents:
            with pytest.raises(ValueError, match=rf"{name}, line 2 is not UTF-8 text"):
                prompts_in(content, name)
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        prompts_in("\n".join(GOOD).encode("utf-16"))
    injected(times=5)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n", "\ufeff\n"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n  \r\n"])
def test_a_mark_at_the_start_and_any_line_ends_change_nothing(prompts_in, newline, start, end):
    prompts = prompts_in(start + newline.join(GOOD) + end)
    batch = prompts.batch(range(3))
    assert batch.prompts == ["one", "two", "three"]
    assert prompts.ids.to_pylist() == batch.ids == ["a", "b", "c"]
    assert [m["id"] for m in batch.metadata] == ["a", "b", "c"]


def test_csv_with_a_mark_and_crlf(prompts_in):
    batch = prompts_in("\ufeffprompt,id\r\none,a\r\ntwo,b\r\n", "prompts.csv").batch(range(2))
    assert (batch.prompts, batch.ids) == (["one", "two"], ["a", "b"])


@pytest.mark.fault("identifiers that come twice", how="two of 2,000 rows share an id, as a number and as a text")
def test_repeated_identifiers_are_refused_with_both_lines(prompts_in, injected):
    rows = [json.dumps({"prompt": f"p{i}", "id": i}) for i in range(2000)]
    rows[1500] = json.dumps({"prompt": "again", "id": "77"})
    with pytest.raises(ValueError, match=r"identifiers must be unique, and '77' is that of line 78 and of line 1501"):
        prompts_in("\n".join(rows))
    injected(times=1)


def test_over_long_prompts_are_dropped_and_counted_and_none_is_cut(prompts_in, tokenizer):
    rows = [json.dumps({"prompt": "x " * n, "id": n}) for n in (1, 5000, 2, 6000)]
    limit = len(tokenizer("x x ")["input_ids"])
    with pytest.warns(UserWarning, match=f"dropped 2 of 4 prompts longer than {limit} tokens"):
        prompts = prompts_in("\n".join(rows), max_prompt_tokens=limit)
    batch = prompts.batch(range(2))
    assert batch.ids == ["1", "2"]
    assert [tokenizer.decode(ids) for ids in batch.token_ids] == ["x ", "x x "]


TEMPLATES = {
    "raises": "{{ raise_exception('no cats') if 'cat' in messages[0]['content'] }}{{ messages[0]['content'] }}",
    "type error": "{{ 1 + messages[0]['content'] if 'cat' in messages[0]['content'] else 'x' }}",
    "division": "{% if 'cat' in messages[0]['content'] %}{{ 1 // 0 }}{% endif %}x",
    "undefined": "{% if 'cat' in messages[0]['content'] %}{{ nothing.here }}{% endif %}x",
    "no tokens": "{% if 'cat' not in messages[0]['content'] %}x{% endif %}",
}


@pytest.mark.fault("a chat template that fails on one prompt", how="5 templates that raise or write nothing for row 3")
def test_a_prompt_that_the_template_refuses_is_named(prompts_in, tmp_path, injected):
    rows = [json.dumps({"prompt": prompt}) for prompt in ("dog", "cow", "cat", "hen")]
    for name, template in TEMPLATES.items():
        file = tmp_path / "chat.jinja"
        file.write_text(template)
        with pytest.raises(ValueError) as raised:
            prompts_in("\n".join(rows), chat_template=str(file))
        assert "prompts.jsonl" in str(raised.value) and "line 3" in str(raised.value), (name, raised.value)
    injected(times=len(TEMPLATES))


@pytest.mark.fault("random bytes in a prompt file", how="hypothesis damages 300 files: bytes cut out and put in")
def test_a_damaged_file_is_read_exactly_or_refused_with_a_line(tokenizer, tmp_path, injected):
    good = ("\n".join(GOOD) + "\n").encode()
    outcomes = {"read": 0, "refused": 0}

    @seed(20261126)
    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(good)), st.integers(0, 3), st.binary(max_size=4))
    def damage(at: int, cut: int, put: bytes) -> None:
        content = good[:at] + put + good[at + cut :]
        file = tmp_path / "damaged.jsonl"
        file.write_bytes(content)
        formatter = ChatFormatter(tokenizer)
        try:
            prompts = build_prompt_set(read_rows(str(file)), source=str(file), formatter=formatter)
        except ValueError as error:
            assert str(file) in str(error)
            outcomes["refused"] += 1
            return
        batch = prompts.batch(range(len(prompts)))
        lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert batch.prompts == [json.loads(line)["prompt"] for line in lines]
        outcomes["read"] += 1

    damage()
    assert outcomes["refused"] > 100 and outcomes["read"] > 20, outcomes
    injected(times=outcomes["refused"] + outcomes["read"])


@pytest.mark.fault("the prompt file is changed while it is in use", how="a line edited in place, the file replaced")
def test_a_file_that_changes_under_the_run_is_noticed(tmp_path, injected):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(GOOD))
    rows = read_rows(str(file))
    with file.open("a") as end:  # what is there already stays
        end.write('\n{"prompt": "four"}')
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    with file.open("r+b") as inside:
        inside.seek(len(GOOD[0]) + 1)
        inside.write(GOOD[1].replace("two", "TWO").encode())
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2 was changed while the file was in use"):
        rows[1]
    rows = read_rows(str(file))
    file.unlink()
    file.write_text("{}")  # another file
    assert rows[1]["prompt"] == "TWO"
    injected(times=3)


MILLION = 10**6
READ = """
import json, re, sys, time
from transformers import AutoTokenizer
from tealightning.data import PromptDataModule
source, policy = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy)
tokenizer("warm up")
def memory(field):  # not of getrusage: its peak begins at that of the process which started this one
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
started = time.perf_counter()
data = PromptDataModule(train=source, batch_size=64)
data.tokenizer = tokenizer
data.setup("fit")
seconds = time.perf_counter() - started
batch = next(iter(data.train_dataloader()))
peak = memory("VmHWM")
print(json.dumps({"prompts": len(data.prompt_sets["train"]), "before": before, "after": memory("VmRSS"), "peak": peak,
                  "seconds": seconds, "ids": batch.ids[:3], "state": data.state_dict()["train"]["stream"]}))
"""


def write_million(file: Path) -> int:
    """A file of a million rows as the tests need them; its size in bytes."""
    filler = "x" * 150
    with file.open("w") as lines:
        for start in range(0, MILLION, 10_000):
            lines.write(
                "".join(
                    f'{{"prompt": "p {i}", "id": "row-{i}", "note": "{filler}", "n": {i}}}\n'
                    for i in range(start, start + 10_000)
                )
            )
    return file.stat().st_size


@pytest.mark.timeout(600)
@pytest.mark.fault("a prompt file of a million lines", how="200 bytes a line; read, checked, encoded")
def test_a_million_lines_take_bounded_memory(playground, tmp_path, injected, record_property):
    file = tmp_path / "million.jsonl"
    size = write_million(file)
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(file), str(playground / "policy")],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(result.stdout)
    grown = figures["peak"] - figures["before"]
    record_property("figures", figures | {"file": size, "wall": time.perf_counter() - started})
    print(f"{size / 2**20:.0f} MiB file: {grown / 2**20:.0f} MiB more at the peak, {figures['seconds']:.0f} s")
    assert figures["prompts"] == figures["state"]["prompts"] == MILLION
    assert grown < size  # a list of its rows takes five times the file
    injected(times=MILLION, lost=f"nothing; {grown / 2**20:.0f} MiB of memory for a file of {size / 2**20:.0f} MiB")


def test_the_stream_is_what_it_was_with_rows_in_memory(prompts_in, tokenizer, tmp_path):
    """A checkpoint of a run that kept its rows in memory resumes: the digest of identifiers is the same."""
    in_file = prompts_in("\n".join(GOOD))
    rows = [json.loads(line) for line in GOOD]
    in_memory = build_prompt_set(rows, source="rows", formatter=ChatFormatter(tokenizer))
    state = PromptLoader(in_memory, batch_size=1).state_dict()
    assert state["stream"]["digest of ids"] == hashlib.sha256(b"a\nb\nc").hexdigest()[:16]
    PromptLoader(in_file, batch_size=1).load_state_dict(state)


def test_errors_of_the_data_module_name_the_setting(playground, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("{")
    data = PromptDataModule(train=str(file))
    data.tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    with pytest.raises(ValueError, match=r"^data\.train: .*prompts\.jsonl, line 1 is not JSON"):
        data.setup("fit")
