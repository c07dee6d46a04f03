import pytest
import yaml
from command_line import CONFIGS

from tealightning.ablation.spec import filled, load_spec, parse_spec, placeholders

SPEC = {
    "name": "trial",
    "base": ["configs/experiments/prose.yaml"],
    "variants": {"grpo": {"model.estimator": "grpo"}, "tea": {"model.estimator": "tea"}},
    "reference": "grpo",
    "seeds": [0, 1],
    "equal": {"optimizer_steps": 10},
}


def test_spec_fills_in_defaults():
    spec = parse_spec(SPEC | {"evaluation": {"ns": [16, 1]}})
    assert (spec.evaluation.ns, spec.evaluation.headline_n) == ([1, 16], 16)
    assert str(spec.folder) == "runs/ablations/trial"
    assert spec.equal_what == "optimizer_steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "unknown setting 'seed' of an ablation. Did you mean 'seeds'?"),
        ({"seeds": [0, 0]}, r"seeds must be different integers of at least 0, got \[0, 0\]"),
        ({"seeds": []}, "seeds must be different"),
        ({"seeds": 3}, r"seeds must be list\[int\], got 3"),
        ({"variants": {}}, "at least one variant"),
        ({"variants": {"a b": {}}}, "a variant's name must be made of letters.*'a b'"),
        ({"variants": {"tea": "tea"}}, r"variants.tea must be dict\[str, .*Any\], got 'tea'"),
        ({"equal": {}}, "exactly one of optimizer_steps, rollouts, generated_tokens, trained_tokens"),
        ({"equal": {"optimizer_steps": 1, "rollouts": 1}}, "exactly one of"),
        ({"equal": {"rollouts": 0}}, "equal.rollouts must be an integer of at least 1, got 0"),
        ({"grid": {"m": [16]}}, r"grid.m has no effect: no setting contains \{m\}"),
        ({"settings": {"rollout.group_size": "{m}"}}, r"\{m\} is used in settings, and grid has no 'm'"),
        ({"grid": {"m": 16}}, r"grid.m must be list\[.*Any\], got 16"),
        ({"evaluation": {"ns": [0]}}, r"evaluation.ns must hold different integers of at least 1, got \[0\]"),
        ({"evaluation": {"headline_n": 7}}, "evaluation.headline_n must be one of ns"),
        ({"evaluation": {"prompts": 9}}, r"evaluation.prompts must be null \(all\) or a multiple .* \(8\), got 9"),
        ({"evaluation": {"sample": 9}}, "unknown setting 'sample' of evaluation"),
        ({"confidence": 95}, "confidence must be between 0.5 and 1, got 95"),
        ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"name": "a/b"}, "name must be made of letters, digits and _ . [+] -, got 'a/b'"),
        ({"base": None}, "an ablation needs base"),
    ],
)
def test_spec_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(SPEC | change)


def test_spec_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="an ablation must be a mapping of settings, got"):
        parse_spec(["grpo"])


def test_load_spec_names_file_and_line(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("name: a\nbase: [b\nseeds: 1\n")
    with pytest.raises(ValueError, match=r"broken.yaml, line 3: this is not YAML"):
        load_spec(file)
    with pytest.raises(ValueError, match="there is no ablation at"):
        load_spec(tmp_path / "missing.yaml")


def test_placeholders_are_found_and_filled_at_any_depth():
    value = {"a": "{m}", "b": {"c": ["x{n}", 3]}}
    assert placeholders(value) == {"m", "n"}
    assert filled(value, {"m": 16, "n": 64}) == {"a": 16, "b": {"c": ["x64", 3]}}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("ablations/*.yaml")), ids=lambda f: f.stem)
def test_every_ablation_in_configs_is_a_spec(file):
    spec = load_spec(file)
    assert spec.name == file.stem
    assert spec.reference in spec.variants
    assert yaml.safe_load(file.read_text())["name"] == file.stem
