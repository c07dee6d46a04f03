import json

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer

from tealightning.errors import UserError
from tealightning.text.chat import ChatFormatter
from tealightning.text.template import names_in

WITHOUT_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}{% endif %}{% endfor %}<|end|>"
)


def formatter(template, **settings):
    tokenizer = chat_tokenizer("byte-level")
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return ChatFormatter(tokenizer, **settings)


@pytest.mark.parametrize("template", TEMPLATES)
def test_usual_templates_prompt_for_an_answer_and_keep_the_system_prompt(template, recwarn):
    formatter(template).warn_of_template("be short")
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("template", [WITHOUT_PROMPT, "{% for m in messages %}{{ m.content }};{% endfor %}"])
def test_template_without_a_generation_prompt_is_warned_about_once(template):
    told = formatter(template)
    with pytest.warns(UserWarning, match="emits no generation prompt") as warned:
        told.warn_of_template()
        told.warn_of_template()
    assert len(warned) == 1


def test_template_that_drops_the_system_prompt_is_warned_about():
    with pytest.warns(UserWarning, match="leaves the message of the role 'system' out"):
        formatter(WITHOUT_SYSTEM + "{% if add_generation_prompt %}:{% endif %}").warn_of_template("be short")
    with pytest.warns(UserWarning, match="leaves the message of the role 'system' out"):
        formatter(WITHOUT_SYSTEM).encode_prompts(
            [[{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]]
        )


def test_template_that_refuses_a_system_prompt_is_an_error_at_the_start():
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + WITHOUT_PROMPT
    )
    with pytest.raises(UserError, match=r"roles \['system', 'user'\]: no system role"):
        formatter(refusing + "{% if add_generation_prompt %}:{% endif %}").warn_of_template("be short")


def test_template_that_drops_answers_is_refused_for_answers():
    dropping = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        formatter(dropping).encode_answers(["hi"], ["yes"])


def test_names_are_found_in_every_tag():
    source = (
        "{% generation %}{{ a }}{%- endgeneration -%}{% for m in messages %}{% if b is defined %}{% break %}{% endif %}"
    )
    assert {"a", "b", "messages"} <= names_in(source + "{% endfor %}{% set tools = custom if custom else none %}")
    with pytest.raises(UserError, match="no Jinja, in line 1"):
        names_in("{% if %}")


def test_arguments_reach_the_template():
    thinking = formatter("splits off reasoning, as Qwen's")
    not_thinking = formatter("splits off reasoning, as Qwen's", chat_template_kwargs={"enable_thinking": False})
    think = [
        f.tokenizer.decode(f.encode_prompts(["hi"], metadata=[row])[0]).count("<think>")
        for f in (thinking, not_thinking)
        for row in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": None})
    ]
    assert think == [0, 1, 0, 1, 1, 1]
    (ids,) = not_thinking.encode_prompts(["hi"], metadata=[{"chat_template_kwargs": '{"enable_thinking": true}'}])
    assert "<think>" not in not_thinking.tokenizer.decode(ids)


def test_arguments_of_a_reward_model_reach_its_template():
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{{ style }}"
    answers = formatter(template, chat_template_kwargs={"style": "stern"})
    assert answers.tokenizer.decode(answers.encode_answers(["hi"], ["yes"])[0]) == "<|user|>hi<|user|>yesstern"


def test_argument_that_the_template_never_mentions_is_warned_about():
    with pytest.warns(UserWarning, match="never mentions 'enable_thinkin'"):
        formatter("chatml", chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize("name", ["tools", "messages", "add_generation_prompt", "tokenize"])
def test_argument_that_is_set_otherwise_is_refused(name):
    with pytest.raises(UserError, match=f"must not have {name}"):
        formatter("chatml", chat_template_kwargs={name: 1})


def test_arguments_need_a_template():
    with pytest.raises(UserError, match="needs a chat template"):
        ChatFormatter(chat_tokenizer("byte-level"), chat_template_kwargs={"enable_thinking": False})


def test_tools_reach_the_template_from_their_column_also_as_json_text():
    template = "{{ tools | tojson if tools else 'none' }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    told, other = formatter(template), formatter(template, tools_column="functions")
    for row in ({"tools": tools}, {"tools": '[{"type": "function", "function": {"name": "look", "parameters": {}}}]'}):
        (ids,), (none,) = (f.encode_prompts(["hi"], metadata=[row]) for f in (told, other))
        assert told.tokenizer.decode(ids).startswith('[{"type": "function", "function": {"name": "look"')
        assert told.tokenizer.decode(none) == "none<|user|>hi"
        (ids,) = told.encode_answers(["hi"], ["yes"], metadata=[row])
        assert told.tokenizer.decode(ids).endswith("}]<|user|>hi<|user|>yes")
    for empty in (None, [], ""):
        assert told.encode_prompts(["hi"], metadata=[{"tools": empty}]) == [none]
    with pytest.raises(UserError, match="column 'tools' must hold a list of objects"):
        told.encode_prompts(["hi"], metadata=[{"tools": "hammer"}])


def test_tools_that_the_template_never_reads_are_warned_about():
    with pytest.warns(UserWarning, match="never reads `tools`"):
        formatter("chatml").encode_prompts(["hi"], metadata=[{"tools": [{"name": "look"}]}])


def test_every_key_of_a_message_reaches_the_template():
    template = "{% for m in messages %}<|user|>{{ m | tojson }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    chat = [
        {"role": "user", "content": "weather?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": {"at": None}}}]},
        {"role": "tool", "content": "sun", "tool_call_id": "1", "reasoning_content": "r", "thinking": "t"},
    ]
    told = formatter(template)
    shown = told.tokenizer.decode(told.encode_prompts([chat])[0]).removesuffix(":").split("<|user|>")[1:]
    assert [json.loads(message) for message in shown] == chat


def test_parts_that_a_template_writes_as_python_shows_them_are_refused():
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with pytest.raises(UserError, match="writes a content of parts as Python shows it"):
        formatter("chatml").encode_prompts([chat])
