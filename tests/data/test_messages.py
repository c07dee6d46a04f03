import json

import pyarrow
import pyarrow.parquet
import pytest

from tealightning.data.messages import as_prompt
from tealightning.data.prompts import build_prompt_set
from tealightning.data.sources import read_rows
from tealightning.errors import UserError
from tealightning.text.chat import ChatFormatter

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "Bern"}}}
CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sun", "tool_call_id": "1", "name": "look"},
]
OTHER = [{"role": "user", "content": "hi", "thinking": "hm"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}]
TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


def test_messages_keep_all_that_they_hold():
    assert as_prompt(CHAT) == CHAT
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}]}]
    assert as_prompt(parts) == parts


@pytest.mark.parametrize("write", [json.dumps, repr, lambda chat: json.dumps(chat, indent=1) + "\n"])
def test_text_that_spells_a_chat_is_the_chat(write):
    assert as_prompt(write(CHAT)) == CHAT


@pytest.mark.parametrize("text", ["[1, 2]", "[", '["role"]', '[{"a": 1}]', "{x}", "[user] hi", '{"answer": 3}'])
def test_text_that_only_looks_like_json_stays_text(text):
    assert as_prompt(text) == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (" \n\t", "it is blank"),
        ("\u3000", "it is blank"),
        ([{"role": "system", "content": "be short"}, {"role": "user", "content": " \n"}], "user is blank"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "user is blank"),
        ([OTHER[0], "hi"], "message 1 is str"),
        ([{"content": "hi"}], "message 0 has no role"),
        ([{"role": 3, "content": "hi"}], "message 0 has no role"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": None, "name": "Ann"}], "message 0 has no content"),
        ([{"role": "user", "content": 3}], "message 0 has a content of type int"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "part of type 'image' that is no text"),
        ([{"role": "user", "content": [3]}], "part that is int"),
        ('{"role": "user", "content": "hi"}', "it is dict"),
        (
            '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]',
            "last message is the assistant",
        ),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_reason(value, reason):
    with pytest.raises(UserError, match=reason):
        as_prompt(value)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_chats_and_tools_of_every_format_are_the_same(policy_tokenizer, tmp_path, form):
    policy_tokenizer.chat_template = TEMPLATE
    path = tmp_path / f"chats.{form}"
    rows = [{"prompt": CHAT, "tools": TOOLS}, {"prompt": OTHER, "tools": None}]
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [[json.dumps(value).replace('"', '""') for value in row.values()] for row in rows]
        path.write_text("prompt,tools\n" + "".join(f'"{prompt}","{tools}"\n' for prompt, tools in cells))
    formatter = ChatFormatter(policy_tokenizer)
    batch = build_prompt_set(read_rows(str(path)), source=str(path), formatter=formatter).batch([0, 1])
    assert batch.prompts == [CHAT, OTHER]
    shown = [policy_tokenizer.decode(ids) for ids in batch.token_ids]
    assert shown[0] == json.dumps(TOOLS) + "".join(json.dumps(message) for message in CHAT) + ":"
    assert shown[1] == json.dumps(OTHER[0]) + ":"


def test_column_of_tools_that_holds_none_is_named_with_its_row(policy_tokenizer):
    policy_tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": "a", "tools": None}, {"prompt": "b", "tools": "hammer"}]
    with pytest.raises(UserError, match=r"data: row 1 \(from 0\): column 'tools' must hold a list"):
        build_prompt_set(rows, source="data", formatter=ChatFormatter(policy_tokenizer))
    batch = build_prompt_set(rows, source="data", formatter=ChatFormatter(policy_tokenizer, tools_column=None))
    assert batch.batch([1]).metadata == [{"tools": "hammer"}]
