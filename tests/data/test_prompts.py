import pytest

from tealightning.data.prompts import build_prompt_set
from tealightning.text.chat import ChatFormatter

CHAT = [{"role": "user", "content": "hi", "name": None}]


def test_batch_has_prompts_tokens_and_the_other_columns(prompt_set, policy_tokenizer):
    rows = [{"prompt": "one", "answer": 1, "id": "a"}, {"prompt": "and two", "answer": None, "id": 7}]
    batch = prompt_set(rows).batch([1, 0])
    assert batch.ids == ["7", "a"]
    assert batch.prompts == ["and two", "one"]
    assert batch.token_ids == [policy_tokenizer("and two")["input_ids"], policy_tokenizer("one")["input_ids"]]
    assert batch.metadata == [{"answer": None, "id": 7}, {"answer": 1, "id": "a"}]
    assert len(batch) == 2


def test_chat_prompts_stay_chats_of_role_and_content(policy_tokenizer):
    policy_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    formatter = ChatFormatter(policy_tokenizer)
    rows = [{"prompt": CHAT}, {"prompt": "text"}]
    batch = build_prompt_set(rows, source="data", formatter=formatter, system_prompt="short").batch([0, 1])
    assert batch.prompts == [[{"role": "user", "content": "hi"}], "text"]  # without the system prompt
    assert [policy_tokenizer.decode(ids) for ids in batch.token_ids] == ["short;hi;", "short;text;"]


def test_identifiers_are_row_numbers_by_default_and_any_column_by_choice(prompt_set):
    rows = [{"prompt": "a", "key": "x"}, {"prompt": "b", "key": "y"}]
    assert prompt_set(rows).ids.to_pylist() == ["0", "1"]
    assert prompt_set(rows, id_column="key").ids.to_pylist() == ["x", "y"]


def test_long_prompts_are_dropped_and_counted(prompt_set, policy_tokenizer):
    rows = [{"prompt": "x " * n} for n in (1, 30, 2, 40, 3)]
    longest = len(policy_tokenizer("x " * 3)["input_ids"])
    with pytest.warns(UserWarning, match=f"data: dropped 2 of 5 prompts longer than {longest} tokens"):
        prompts = prompt_set(rows, max_prompt_tokens=longest)
    batch = prompts.batch(range(len(prompts)))
    assert batch.ids == ["0", "2", "4"]
    assert batch.prompts == ["x ", "x x ", "x x x "]
    assert [policy_tokenizer.decode(ids) for ids in batch.token_ids] == batch.prompts


def test_all_prompts_too_long_is_an_error(prompt_set):
    with pytest.raises(ValueError, match=r"all 3 prompts are longer than max_prompt_tokens=1 \(the shortest has \d+"):
        prompt_set(3, max_prompt_tokens=1)


@pytest.mark.parametrize("setting", ["prompt_column", "id_column"])
def test_missing_column_suggests_the_nearest(prompt_set, setting):
    with pytest.raises(ValueError, match=r"no column 'qestion'. Did you mean 'question'\? Valid: prompt, question"):
        prompt_set([{"question": "a", "prompt": "b"}], **{setting: "qestion"})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "it is empty"),
        ([], "it is empty"),
        (None, "it is missing"),
        (3, "it is int"),
        (["hi"], "its messages are not all"),
        ([{"role": "user", "content": None}], "its messages are not all"),
        ([{"role": "user"}], "its messages are not all"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "its last message is the assistant's",
        ),
    ],
)
def test_bad_prompt_is_named_with_its_row(prompt_set, value, reason):
    with pytest.raises(ValueError, match=rf"row 1 \(from 0\): {reason}"):
        prompt_set([{"prompt": "good"}, {"prompt": value}])


def test_many_bad_prompts_are_counted(prompt_set):
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): it is empty; .*row 4 \(from 0\): it is empty; and 3 more"):
        prompt_set([{"prompt": ""}] * 8)


def test_duplicate_identifiers_are_an_error(prompt_set):
    with pytest.raises(ValueError, match=r"'1' is that of row 0 \(from 0\) and of row 2"):
        prompt_set([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}, {"prompt": "c", "id": "1"}])


def test_missing_identifier_is_an_error(prompt_set):
    with pytest.raises(ValueError, match=r"row 1 .* no identifier"):
        prompt_set([{"prompt": "a", "id": 1}, {"prompt": "b"}])


def test_error_of_the_template_names_the_source(prompt_set):
    with pytest.raises(ValueError, match=r"data: row 0 \(from 0\): a prompt is a chat"):
        prompt_set([{"prompt": CHAT}])


def test_prompt_without_tokens_is_an_error(policy_tokenizer):
    policy_tokenizer.chat_template = "{% if messages[0]['content'] == 'b' %}{% else %}x{% endif %}"
    with pytest.raises(ValueError, match=r"row 1 .* has no tokens"):
        build_prompt_set([{"prompt": "a"}, {"prompt": "b"}], source="data", formatter=ChatFormatter(policy_tokenizer))
