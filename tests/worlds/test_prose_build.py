"""The tiny playground: complete, deterministic, disjoint, reused and never overwritten by accident."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tealightning.worlds import ProseConfig, build_prose, load_playground, report
from tealightning.worlds.prose import prose_config


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, which names the build's duration."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "playground.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _prompts(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "prompts" / f"{split}.jsonl").read_text().splitlines()]


def _some_playground(folder: Path, config: ProseConfig, seed: int = 0) -> Path:
    """A folder with the manifest of a playground and nothing else: enough for what is decided before a build."""
    manifest = {"format_version": 1, "seed": seed, "config": asdict(config), "build_seconds": 1.0}
    folder.mkdir()
    (folder / "playground.json").write_text(json.dumps(manifest))
    return folder


def test_build_same_seed_gives_the_same_bits(playground: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # must not matter
    again = build_prose(tmp_path / "again", size="tiny", progress=False)
    assert not again.reused
    assert _digests(again.path) == _digests(playground)
    assert json.loads((playground / "playground.json").read_text())["figures"] == again.manifest["figures"]


def test_build_leaves_the_random_stream_and_thread_count_alone(tmp_path: Path) -> None:
    short = replace(prose_config("tiny"), policy_steps=1, reward_steps=1, reward_pairs=16)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(short.num_threads + 1)
    try:
        build_prose(tmp_path / "short", size=short, progress=False)
        assert torch.get_num_threads() == short.num_threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]  # no workspace left behind


def test_prompt_files_are_disjoint_and_have_unique_ids(playground: Path) -> None:
    splits = {split: _prompts(playground, split) for split in ("train", "val", "test")}
    assert len(splits["train"]) >= 48 and min(len(splits["val"]), len(splits["test"])) >= 12
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert len(set(ids)) == len(ids)
    assert not any(a != b and b.startswith(a) for a in prompts for b in prompts)


def test_prompt_lengths_are_what_the_configuration_says(playground: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(playground / "policy")
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in _prompts(playground, "train")]
    assert min(lengths) >= 8
    assert max(lengths) <= 16


def test_policy_loads_in_float32_without_sampling_defaults(playground: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(playground / "policy")
    assert policy.dtype == torch.float32
    assert 50_000 <= policy.num_parameters() <= 100_000
    assert set(json.loads((playground / "policy" / "generation_config.json").read_text())) == {
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
    }


def test_policy_has_learned_from_the_corpus(playground: Path) -> None:
    figures = json.loads((playground / "playground.json").read_text())["figures"]
    assert figures["heldout_perplexity"] < 100  # 512 before training


def test_reward_model_prefers_real_continuations(playground: Path) -> None:
    manifest = json.loads((playground / "playground.json").read_text())
    figures = manifest["figures"]
    assert figures["heldout_pairs"] == 300
    assert figures["reward_pairwise_accuracy"] > 0.58  # a coin gets there less than once in 300 builds
    curve = list(figures["best_of_n"].values())
    assert curve == sorted(curve)
    assert figures["reward_sd_within_prompt"] > 0.2


def test_reward_model_loads_and_does_not_see_padding(playground: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(playground / "reward_model").eval()
    tokenizer = AutoTokenizer.from_pretrained(playground / "reward_model")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = ["The name of the module.", "A list of the names that are defined in the module, if there are any."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    alone = tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[0], model(**alone).logits[0], atol=1e-5, rtol=0)


def test_build_reuses_a_playground_of_the_same_configuration(
    playground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (playground / "playground.json").stat().st_mtime_ns
    reused = build_prose(playground, size="tiny", progress=True)
    assert reused.reused
    assert "Reusing the playground" in capsys.readouterr().out
    assert (playground / "playground.json").stat().st_mtime_ns == before
    assert load_playground(playground).manifest == reused.manifest


def test_build_refuses_a_playground_of_another_seed(tmp_path: Path) -> None:
    folder = _some_playground(tmp_path / "world", prose_config("tiny"), seed=0)
    with pytest.raises(ValueError, match=r"another seed.*overwrite=True"):
        build_prose(folder, size="tiny", seed=1, progress=False)


def test_build_refuses_a_playground_of_another_size(tmp_path: Path) -> None:
    folder = _some_playground(tmp_path / "world", prose_config("tiny"))
    with pytest.raises(ValueError, match=r"another config\..*overwrite=True"):
        build_prose(folder, size="default", progress=False)


def test_build_refuses_a_folder_that_is_no_playground(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no playground"):
        build_prose(tmp_path, size="tiny", progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_build_overwrite_replaces_a_playground(tmp_path: Path) -> None:
    short = replace(prose_config("tiny"), policy_steps=1, reward_steps=1, reward_pairs=16)
    folder = _some_playground(tmp_path / "world", short)
    (folder / "stale.txt").write_text("old")
    built = build_prose(folder, size=short, progress=False, overwrite=True)
    assert not built.reused
    assert (folder / "policy" / "model.safetensors").is_file()
    assert not (folder / "stale.txt").exists()


def test_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    greedy = replace(prose_config("tiny"), train_prompts=1_000_000)
    with pytest.raises(ValueError, match="train_prompts"):
        build_prose(tmp_path / "world", size=greedy, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_load_playground_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tealightning playground --out"):
        load_playground(tmp_path)


def test_unknown_size_names_the_presets() -> None:
    with pytest.raises(ValueError, match=r"'tny'.*'tiny'"):
        prose_config("tny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, "at least 300"),
        ({"hidden_size": 100}, "multiple of head_size=32"),
        ({"reward_layers": 9}, "policy_layers"),
        ({"prompt_tokens": (9, 8)}, "shortest <= longest"),
        ({"max_positions": 40}, "max_positions must be at least"),
    ],
)
def test_config_refuses_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProseConfig(**change)


def test_report_shows_the_manifest(playground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(playground)])
    manifest = json.loads((playground / "playground.json").read_text())
    printed = capsys.readouterr().out
    assert f"| policy, parameters | {manifest['policy_parameters']:,} |" in printed
    assert "| n | 1 | 4 | 16 | 64 | 128 |" in printed
    assert f"{manifest['figures']['best_of_n']['128']:.2f} |" in printed
