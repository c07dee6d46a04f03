"""Corpus, tokenizer and prompts of the prose world."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tealightning.worlds.prose import (
    OPENING_WORDS,
    ProseConfig,
    _distinct_openings,
    _prose,
    _source_texts,
    collect_paragraphs,
    cut_many_openings,
    cut_openings,
    from_each_sentence,
    split_paragraphs,
)


def test_prose_keeps_sentences_on_one_line_and_drops_code() -> None:
    text = """Short one.

    Return the name of the module in which the
    *object* was defined, or "None" [1].

    >>> Return the name of the module in which the object was defined.

    x = [1, 2, 3]; y = {4: 5, 6: 7}; z = x[0] + y[4] * 8 / 9 - 10 ** 11 % 12"""
    expected = 'Return the name of the module in which the object was defined, or "None".'
    assert list(_prose([text])) == [expected]


def test_distinct_openings_keeps_the_first_of_equal_openings() -> None:
    paragraphs = [
        "If the file does not exist, stop.",
        "if the file does not exist, go on.",
        "If the file exists, stop.",
    ]
    assert _distinct_openings(paragraphs) == [paragraphs[0], paragraphs[2]]


def test_source_texts_are_parsed_not_imported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""The module."""\nraise SystemExit\ndef f():\n    "The function."\n    # One\n    # two.\n'
    )
    (tmp_path / "broken.py").write_text("# A comment\ndef (:")
    (tmp_path / "latin.py").write_bytes(b"'\xff'")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text('"""A test."""')
    assert [text for text in _source_texts(tmp_path) if text] == ["The module.", "The function.", "One\ntwo."]


@pytest.mark.slow
def test_corpus_imports_no_module_with_side_effects() -> None:
    code = (
        "import sys; from tealightning.worlds.prose import collect_paragraphs; collect_paragraphs();"
        "assert not {'this', 'antigravity', 'turtle', 'idlelib', 'tkinter'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_corpus_without_source_files_is_the_smaller_part() -> None:
    topics = collect_paragraphs(source_files=False)
    assert len(topics) > 300
    assert len(set(topics)) == len(topics)
    assert all(len(paragraph) >= 60 and "\n" not in paragraph for paragraph in topics)


def test_split_is_a_partition_that_depends_on_the_seed() -> None:
    paragraphs = [f"paragraph {i}" for i in range(100)]
    config = ProseConfig(reward_paragraphs=10, heldout_paragraphs=5, train_prompts=20, val_prompts=5, test_prompts=5)
    splits = split_paragraphs(paragraphs, config, seed=0)
    assert list(splits) == ["corpus", "reward", "heldout", "train", "val", "test"]
    parts = list(splits.values())
    assert [len(part) for part in parts] == [55, 10, 5, 20, 5, 5]
    assert sorted(paragraph for part in parts for paragraph in part) == sorted(paragraphs)
    assert split_paragraphs(paragraphs, config, seed=0) == splits
    assert split_paragraphs(paragraphs, config, seed=1) != splits


def test_split_refuses_to_starve_the_corpus() -> None:
    config = ProseConfig(heldout_paragraphs=10, train_prompts=40, val_prompts=5, test_prompts=5)
    with pytest.raises(ValueError, match="at most 50"):
        split_paragraphs([f"paragraph {i}" for i in range(100)], config, seed=0)


def test_from_each_sentence_keeps_what_is_long_enough() -> None:
    first, second = (
        "The first sentence of a paragraph.",
        "The second one, which is long enough to stand on its own feet.",
    )
    assert from_each_sentence([f"{first} {second}"]) == [f"{first} {second}", second]
    assert from_each_sentence([f"{second} {first}"]) == [f"{second} {first}"]


def test_cut_many_openings_cuts_a_paragraph_in_several_places(playground: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    paragraph = "The name of the module in which the object was defined, or None if there is no such module at all."
    config = ProseConfig(prompt_tokens=(8, 16))
    openings = cut_many_openings([paragraph], tokenizer, config, count=20, rng=random.Random(0))
    assert len(openings) == 20
    assert len({opening.prompt for opening in openings}) > 1
    assert all(paragraph.startswith(opening.prompt) for opening in openings)


def test_tokenizer_round_trips_any_text_and_adds_nothing(playground: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    for text in ("The name of the module.", "Ünïcödé, tabs\tand\n\nlines", "naïve  double  spaces ", "🫖"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_openings_join_to_the_paragraph(playground: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    config = ProseConfig(prompt_tokens=(8, 16), completion_tokens=16)
    paragraphs = collect_paragraphs(source_files=False)[:50]
    starts = {" ".join(paragraph.split()[:OPENING_WORDS]): paragraph for paragraph in paragraphs}
    openings = cut_openings(paragraphs, tokenizer, config, rng=random.Random(0))
    assert len(openings) > 30
    for opening in openings:
        whole = starts[" ".join(opening.prompt.split()[:OPENING_WORDS])]
        assert tokenizer(opening.prompt)["input_ids"] == opening.prompt_ids
        assert 8 <= len(opening.prompt_ids) <= 16
        assert 8 <= len(opening.continuation_ids) <= 16
        assert whole.startswith(tokenizer.decode(opening.prompt_ids + opening.continuation_ids))
        assert whole[len(opening.prompt)] == " "
