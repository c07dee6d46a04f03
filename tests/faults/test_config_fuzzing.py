"""Wrong configs, by the hundred: each is refused before anything is loaded, in one message that names the setting."""

import copy
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import CONFIGS, run
from config_mutations import (
    Change,
    Mutation,
    applied,
    broken_yaml,
    changed,
    missing_section,
    misspelt_key,
    of_changes,
    repeated_key,
    unknown_key,
    written,
    wrong_structure,
    wrong_type,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

NAN, INF, HUGE = float("nan"), float("inf"), 10**30
WHOLE = ["quickstart.yaml", *(f"experiments/{name}.yaml" for name in ("own_model_gpu", "prose", "styles"))]
OVERLAYS = sorted(CONFIGS.glob("estimators/*.yaml"))
ABLATIONS = sorted(CONFIGS.glob("ablations/*.yaml"))
SECONDS = 10

M, D, T = "model.init_args", "data.init_args", "trainer"
ESTIMATOR = f"{M}.estimator"


def estimator_is(*names: str) -> Any:
    return lambda base: base["model"]["init_args"]["estimator"]["class_path"].rpartition(".")[2].lower() in names


def values(key: str, *wrong: Any, kind: str = "out of range", wants: Any = lambda base: True) -> list[Change]:
    return [Change(kind=kind, set={key: value}, wants=wants) for value in wrong]


TAILS = estimator_is("tea", "direct", "optimaltea", "calibratedtea", "prefixtea")
OUT_OF_RANGE = [
    *values("seed_everything", -1, 2**32, HUGE),
    *values(f"{ESTIMATOR}.init_args.alpha", 0, 1.5, -0.25, NAN, INF, wants=TAILS),
    *values(
        f"{ESTIMATOR}.init_args.target_n",
        *(0, -1),
        wants=estimator_is("tea", "optimaltea", "prefixtea", "calibratedtea", "passatn", "catbon"),
    ),
    *values(f"{ESTIMATOR}.init_args.scale", "std", 3, wants=estimator_is("tea", "optimaltea")),
    *values(f"{ESTIMATOR}.init_args.tail", "cauchy", wants=estimator_is("tea", "prefixtea", "calibratedtea")),
    *values(f"{ESTIMATOR}.init_args.lam", -1, NAN, INF, wants=estimator_is("optimaltea")),
    *values(f"{ESTIMATOR}.init_args.rotations", 0, wants=estimator_is("prefixtea")),
    *values(f"{ESTIMATOR}.init_args.k", 0, -3, wants=estimator_is("maxatk")),
    *values(f"{ESTIMATOR}.init_args.tilt", 0, -1, INF, NAN, wants=estimator_is("infalign")),
    *values(f"{ESTIMATOR}.init_args.kl_target", 0, NAN, INF, wants=estimator_is("entropic")),
    *values(f"{ESTIMATOR}.init_args.eps", 0, -1, NAN, wants=estimator_is("grpo", "grpolead")),
    *values(f"{ESTIMATOR}.init_args.prior_successes", 0, NAN, wants=estimator_is("passatn")),
    *values(f"{M}.loss.kl_coef", -0.1, NAN, INF),
    *values(f"{M}.loss.clip_lower", 0, 1.5, NAN),
    *values(f"{M}.loss.clip_upper", 0, -1, NAN),
    *values(f"{M}.loss.importance_cap", 0, -2, NAN),
    *values(f"{M}.loss.importance_mode", "sequence", "mask"),
    *values(f"{M}.loss.importance_min", -1, NAN, INF),
    *values(f"{M}.loss.reduction", "sum", 1),
    *values(f"{M}.loss.kl_estimator", "k4"),
    *values(f"{M}.advantage_scale", "std"),
    *values(f"{M}.inner_epochs", 0, -1),
    *values(f"{M}.inner_epoch_correction", "none"),
    *values(f"{M}.micro_batch_tokens", 0, -5),
    *values(f"{M}.micro_batch_size", 0),
    *values(f"{M}.gradient_clip_norm", 0, -1, NAN),
    *values(f"{M}.dtype", "float8", "float16"),
    *values(f"{M}.ns", [], [0, 4], [-1], [4, 4], [1.5]),
    *values(f"{M}.extrapolate_ns", [0], [2], [512, 512], [1]),
    *values(f"{M}.lora", {"rank": 0}, {"alpha": 0}, {"alpha": NAN}, {"target_modules": []}),
    *values(f"{M}.optimizer.init_args.lr", -1, NAN, INF),
    *values(f"{D}.batch_size", 0, -8),
    *values(f"{D}.val_batch_size", 0, -1),
    *values(f"{D}.max_prompt_tokens", 0, -1),
    *values(f"{D}.seed", -1),
    *values("rollout.group_size", 0, -16),
    *values("rollout.max_model_len", 0, -1),
    *values("rollout.steps_ahead", 2, -1),
    *values("rollout.sampling.max_new_tokens", 0, -1),
    *values("rollout.sampling.temperature", 0, -1, NAN, INF),
    *values("rollout.sampling.top_p", 0, 1.5, -0.1, NAN),
    *values("rollout.sampling.top_k", -1),
    *values("rollout.sampling.stop", [""], ["a", ""]),
    *values("trainer.max_steps", -2),
    *values("trainer.max_epochs", -2),
    *values("trainer.devices", 0, -2, "many", [0, 0], []),
    *values("trainer.accelerator", "abacus"),
    *values("trainer.strategy", "telepathy"),
    *values("trainer.precision", "fp8", 17, "16-mixed", 16),
    *values("trainer.limit_train_batches", -1, 1.5, NAN),
    *values("trainer.limit_val_batches", -1, 1.5),
    *values("trainer.val_check_interval", -1, 1.5, 0, "sometimes"),
    *values("trainer.log_every_n_steps", -1),
    *values("trainer.num_nodes", 0, -1),
    *values("trainer.num_sanity_val_steps", -3),
    *values("trainer.max_time", "soon"),
    *values("trainer.gradient_clip_val", 1.0),
    *values("trainer.accumulate_grad_batches", 4),
    *values("trainer.overfit_batches", -1),
]

NO = "no/such/place"
MISSING = [
    *values(f"{M}.policy", NO, "/no/such/policy", "./nothing here", "", kind="missing file"),
    *values(f"{D}.train", "/no/such.jsonl", "prompts.txt", "a@b@c", "", kind="missing file"),
    *values(f"{D}.val", "/no/such.jsonl", kind="missing file"),
    *values(f"{D}.train", None, kind="missing file"),
    *values(f"{D}.tokenizer", "/no/tokenizer", kind="missing file"),
    *values(f"{D}.chat_template", "no.jinja", kind="missing file"),
    *values("ckpt_path", "/no/such.ckpt", "runs/none/last.ckpt", kind="missing file"),
    Change(kind="missing file", set={f"{M}.reference": "/no/such/reference", f"{M}.loss.kl_coef": 0.1}),
    *(
        Change(
            kind="missing file",
            set={"rollout.reward": {"class_path": "SequenceClassifierReward", "init_args": {"model": path}}},
        )
        for path in (NO, "/no/such/reward", "")
    ),
    *(
        Change(
            kind="missing file",
            set={"rollout.reward": {"class_path": "FunctionReward", "init_args": {"function": path}}},
        )
        for path in ("/no/rewards.py:f", "no_such_module:f", "math:no_such", "math", "")
    ),
    *values("rollout.engine", "NoEngine", kind="no such class"),
    *values(ESTIMATOR, "TAE", {"class_path": "torch.nn.Linear"}, {"class_path": "os.path"}, kind="no such class"),
    *values(f"{M}.optimizer.class_path", "torch.optim.Addam", "no.such.Adam", kind="no such class"),
    *values("trainer.logger", {"class_path": "NoLogger"}, kind="no such class"),
    *values("trainer.callbacks", [{"class_path": "NoCallback"}], kind="no such class"),
]

GROUP = ("rollout.group_size",)
TOGETHER = [
    Change(kind="contradiction", set={"rollout.group_size": 4, f"{ESTIMATOR}": {"class_path": "TEA"}}, names=GROUP),
    Change(kind="contradiction", set={"rollout.group_size": 1, f"{ESTIMATOR}": {"class_path": "GRPO"}}, names=GROUP),
    Change(
        kind="contradiction",
        set={f"{ESTIMATOR}": {"class_path": "TEA", "init_args": {"alpha": 0.01}}},
        names=GROUP,
    ),
    Change(
        kind="contradiction",
        set={f"{ESTIMATOR}": {"class_path": "max_at_k", "init_args": {"k": 17}}, "rollout.group_size": 16},
        names=GROUP,
    ),
    Change(
        kind="contradiction",
        set={f"{ESTIMATOR}": {"class_path": "prefix_tea", "init_args": {"order": 5, "num_prefixes": 4}}},
        names=("model.estimator.order",),
    ),
    Change(
        kind="contradiction",
        set={f"{ESTIMATOR}": {"class_path": "entropic", "init_args": {"kl_target": 5.0}}},
        names=GROUP,
    ),
    Change(
        kind="contradiction",
        set={f"{ESTIMATOR}": {"class_path": "grpo_lead", "init_args": {"low": 2.0, "high": 1.0}}},
        names=("model.estimator.high",),
    ),
    Change(kind="contradiction", set={f"{M}.inner_epoch_correction": "exact", ESTIMATOR: "tea"}),
    Change(kind="contradiction", set={"rollout.steps_ahead": 1}),
    Change(
        kind="contradiction",
        set={
            "rollout.steps_ahead": 1,
            "rollout.engine": {"class_path": "VLLMServerEngine"},
            f"{M}.loss.importance_cap": None,
        },
        names=("importance_cap",),
    ),
    Change(kind="contradiction", set={"rollout.sampling.max_new_tokens": 64, "rollout.max_model_len": 64}),
    Change(kind="contradiction", set={"rollout.sampling.max_new_tokens": 10**6}),
    Change(kind="contradiction", set={"rollout.max_model_len": 10**7}),
    Change(kind="contradiction", set={f"{D}.batch_size": 10**6}),
    Change(
        kind="more samples than there are",
        set={
            f"{M}.ns": [1, 4],
            f"{M}.extrapolate_ns": [],
            "trainer.callbacks": [{"class_path": "tealightning.EvaluationRecord", "init_args": {"kl_samples": 8}}],
        },
        names=("trainer.callbacks.kl_samples",),
    ),
    Change(
        kind="more samples than there are",
        set={
            f"{M}.ns": [1, 4],
            f"{M}.extrapolate_ns": [],
            "trainer.callbacks": [
                {"class_path": "tealightning.EvaluationRecord", "init_args": {"kl_samples": 4, "diversity_samples": 5}}
            ],
        },
        names=("trainer.callbacks.diversity_samples",),
    ),
    Change(kind="contradiction", set={"trainer.val_check_interval": 10**6, "trainer.check_val_every_n_epoch": 1}),
    Change(
        kind="contradiction",
        set={
            "rollout.reward": {
                "class_path": "WeightedReward",
                "init_args": {
                    "rewards": {"a": {"class_path": "FunctionReward", "init_args": {"function": "math:sqrt"}}},
                    "weights": {"b": 1.0},
                },
            }
        },
        names=("rollout.reward.weights", "rollout.reward: weights"),
    ),
    Change(kind="contradiction", set={f"{D}.chat_template": True}),
    Change(kind="contradiction", set={f"{D}.system_prompt": "be short", f"{D}.chat_template": False}),
]
NEEDED = [("model",), ("data",), ("rollout", "engine"), ("rollout", "reward"), ("model", "init_args", "policy")]


class Loads:
    """Counts what would load weights, and refuses to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from tealightning.rollouts.vllm import VLLMEngine
        from tealightning.rollouts.vllm_server import VLLMServerEngine

        self.seen: list[str] = []
        for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            monkeypatch.setattr(cls, "from_pretrained", self._refuse(cls.__name__))
        for engine in (VLLMEngine, VLLMServerEngine):
            monkeypatch.setattr(engine, "start", self._refuse(engine.__name__))

    def _refuse(self, name: str) -> Any:
        def load(*args: Any, **kwargs: Any) -> None:
            self.seen.append(name)
            raise ValueError("a model would be loaded now")

        return load


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture(scope="module")
def bases(playground: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every experiment and estimator of configs/, on the tiny prose world: each is right before it is mutated."""
    folder = tmp_path_factory.mktemp("bases")
    loaded = {name: yaml.safe_load((CONFIGS / name).read_text()) for name in WHOLE}
    for overlay in OVERLAYS:
        base = copy.deepcopy(loaded["experiments/prose.yaml"])
        base["model"]["init_args"]["estimator"] = yaml.safe_load(overlay.read_text())["model"]["init_args"]["estimator"]
        loaded[f"estimators/{overlay.name}"] = base
    return {name: on_playground(base, playground, folder) for name, base in loaded.items()}


def on_playground(base: dict[str, Any], playground: Path, out: Path) -> dict[str, Any]:
    base["model"]["init_args"]["policy"] = str(playground / "policy")
    base["data"]["init_args"] |= {
        **{phase: str(playground / "prompts" / f"{phase}.jsonl") for phase in ("train", "val", "test")},
        "batch_size": 4,
    }
    if "model" in base["rollout"]["reward"].get("init_args", {}):
        base["rollout"]["reward"]["init_args"]["model"] = str(playground / "reward_model")
    base["rollout"]["sampling"]["max_new_tokens"] = 12
    base["data"]["init_args"].pop("max_prompt_tokens", None)
    base["trainer"] |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "logger": False}
    base["trainer"] |= {"max_steps": 2, "max_epochs": 1, "callbacks": [], "default_root_dir": str(out)}
    return base


def refused(mutation: Mutation, command: str, folder: Path, loads: Loads, *options: str) -> None:
    file = folder / "mutated.yaml"
    file.write_text(mutation.text, encoding="utf-8")
    loads.seen.clear()
    started = time.process_time()
    result = run(command, "-c", file, *options)
    seconds = time.process_time() - started
    about = f"{mutation}\n-> {result}"
    assert result.status == 2, about
    assert not loads.seen, about
    assert "Traceback" not in result.err and "tealightning: error: " in result.err, about
    told = result.err.partition("tealightning: error: ")[2]
    assert any(name in told for name in mutation.names), about
    assert len(told) < 4000, about
    assert seconds < SECONDS, about


def fuzz(strategy: st.SearchStrategy, count: int, check: Any) -> Counter:
    """`check` of `count` different mutations; how many of each kind."""
    seen: dict[str, str] = {}

    @seed(20261126)
    @settings(max_examples=4 * count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def example(mutation: Mutation) -> None:
        if len(seen) < count and mutation.text not in seen:
            seen[mutation.text] = mutation.kind
            check(mutation)

    example()
    assert len(seen) == count
    return Counter(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_configs_that_are_mutated_are_right(bases, loads, tmp_path, command):
    for name, base in bases.items():
        file = tmp_path / "right.yaml"
        file.write_text(yaml.safe_dump(base))
        loads.seen.clear()
        result = run(command, "-c", file)
        assert loads.seen, (name, result.err)
        assert "a model would be loaded now" in result.err


@pytest.mark.timeout(900)
@pytest.mark.fault(
    "a config of `fit` is wrong: types, unknown, misspelt and repeated names, missing sections, broken YAML",
    how="hypothesis mutates every shipped config; each has to be refused before a model loads, naming the setting",
)
def test_wrong_training_configs_are_refused(bases, loads, tmp_path, injected):
    def mutations(name: str) -> st.SearchStrategy:
        base = bases[name]
        shapes = [
            kind(base) for kind in (wrong_type, unknown_key, misspelt_key, wrong_structure, repeated_key, broken_yaml)
        ]
        return st.one_of(*shapes, missing_section(base, NEEDED))

    strategy = st.sampled_from(sorted(bases)).flatmap(mutations)
    kinds = fuzz(strategy, 300, lambda mutation: refused(mutation, "fit", tmp_path, loads))
    assert len(kinds) == 7
    injected(times=kinds.total())


@pytest.mark.timeout(900)
@pytest.mark.fault(
    "settings of `fit` out of range, missing files, and settings that contradict each other (m too small for ...)",
    how="every entry of a table of wrong values, in a shipped config; each has to be refused before a model loads",
)
def test_wrong_values_are_refused(bases, loads, tmp_path, injected):
    changes = [*OUT_OF_RANGE, *MISSING, *TOGETHER]
    for index, change in enumerate(changes):
        fitting = [name for name, base in bases.items() if change.wants(base)]
        assert fitting, change
        refused(applied(change, bases[fitting[index % len(fitting)]]), "fit", tmp_path, loads)
    injected(times=len(changes))


# ---------------------------------------------------------------- ablations

ABLATION = [
    *values("name", 3, "", "a b", "../up", None, ["a"]),
    *values("base", [], "quickstart.yaml", [3], None),
    Change(kind="missing file", set={"base": ["no/such.yaml"]}, names=("there is no file",)),
    *values("variants", {}, [], None, {"one": 3}, {3: {}}),
    Change(kind="out of range", set={"variants": {"a b": {}}}, names=("a variant's name",)),
    *values("reference", "nobody", 3, None),
    *values("seeds", [], [-1], [0, 0], ["a"], 3, [1.5], [True]),
    *values(
        "equal", {}, {"steps": 3}, {"rollouts": 0}, {"rollouts": "many"}, {"rollouts": 8, "optimizer_steps": 8}, []
    ),
    *values("grid", {"m": []}, {"m": 3}, {"unused": [1, 2]}, [1]),
    *values("settings", [1], {"rollout.group_size": "{nowhere}"}, 3),
    *values("labels", ["a"], {"tea": 3}),
    *values("playgrounds", {"out": "x"}, ["x"], 3),
    *values("out", 3, ["a"]),
    *values("title", ["a"], 3),
    *values("retries", -1, 1.5, "twice", True),
    *values("confidence", 0.5, 1, 2, "high", NAN),
    *values("bootstrap_samples", 0, 99, 1.5),
    *values("evaluation", 3, [1]),
    *values("evaluation.ns", [], [0], [4, 4], ["a"], 4),
    *values("evaluation.headline_n", 3, "all"),
    *values("evaluation.prompts", 0, -8, 3, "all"),
    *values("evaluation.batch_size", 0, -1, "x"),
    *values("evaluation.every", 0, "often"),
    *values("evaluation.kl_samples", -1, 10**6, "x"),
    *values("evaluation.diversity_samples", 1, 10**6),
    *values("evaluation.gold", "NoReward", 3, {"class_path": "FunctionReward", "init_args": {"function": "math:no"}}),
    *values("evaluation.equal_kls", [0], ["a"], 1.0),
    *(
        Change(kind="variant", set={f"settings/{key}": value}, names=(name,))
        for key, value, name in [
            ("rollout.group_size", 1, "rollout.group_size"),
            ("rollout.group_sise", 8, "rollout.group_sise"),
            ("model.loss.kl_coef", -1, "model.loss.kl_coef"),
            ("model.policy", "/no/such", "model.policy"),
            ("rollout.reward", "FunctionReward", "rollout.reward.function"),
            ("data.train", "/no/such.jsonl", "data.train"),
            ("model.optimizer.lr", -1, "model.optimizer.lr"),
        ]
    ),
    Change(
        kind="variant",
        set={"variants": {"one": {"model.estimator": "TAE"}}, "reference": "one", "settings": {}, "grid": {}},
        names=("model.estimator",),
    ),
    Change(kind="variant", set={"equal": {"rollouts": 64, "rollouts_per_step": 17}}, names=("rollouts_per_step",)),
]


@pytest.fixture(scope="module")
def specs(bases, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Every shipped ablation with its reference and one more variant, on the tiny playground."""
    folder = tmp_path_factory.mktemp("specs")
    found = {}
    for file in ABLATIONS:
        spec = yaml.safe_load(file.read_text())
        names = [spec["reference"], next(name for name in spec["variants"] if name != spec["reference"])]
        spec["variants"] = {name: spec["variants"][name] for name in names}
        used = str([spec.get("settings"), spec["variants"]])
        if gold := spec["evaluation"].get("gold"):
            gold["init_args"]["model"] = bases["experiments/prose.yaml"]["rollout"]["reward"]["init_args"]["model"]
        spec["settings"] = {k: v for k, v in spec["settings"].items() if not k.startswith(("data.", "model.policy"))}
        spec["grid"] = {axis: v[:1] for axis, v in spec.get("grid", {}).items() if f"{{{axis}}}" in used}
        for path in spec["base"]:
            name = str(Path(path).relative_to("configs"))
            (folder / Path(name).name).write_text(yaml.safe_dump(bases[name]))
        spec["base"] = [str(folder / Path(path).name) for path in spec["base"]]
        found[file.name] = spec | {"playgrounds": [], "out": str(folder / "out")}
    return found


@pytest.mark.slow
def test_the_ablations_that_are_mutated_are_right(specs, loads, tmp_path):
    for name, spec in specs.items():
        file = tmp_path / "right.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False))
        result = run("compare", "-c", file, "--dry-run", "--no-pilot")
        assert result.status == 0, (name, result.err)
        assert not loads.seen


@pytest.mark.timeout(900)
@pytest.mark.fault(
    "the file of `compare` is wrong: types, names, ranges, variants that cannot be built, broken YAML",
    how="hypothesis mutates every shipped ablation; each has to be refused before a model loads, naming the setting",
)
def test_wrong_ablations_are_refused(specs, loads, tmp_path, injected):
    def mutations(name: str) -> st.SearchStrategy:
        spec = specs[name]
        return st.one_of(
            of_changes(ABLATION, spec),
            unknown_key(spec, ("variants", "settings", "grid", "labels", "equal")),
            repeated_key(spec),
            broken_yaml(spec),
        )

    strategy = st.sampled_from(sorted(specs)).flatmap(mutations)
    options = ("--dry-run", "--no-pilot")
    kinds = fuzz(strategy, 120, lambda mutation: refused(mutation, "compare", tmp_path, loads, *options))
    injected(times=kinds.total())


# ---------------------------------------------------------------- the command itself


def cpu_seconds(*args: str) -> tuple[float, subprocess.CompletedProcess]:
    """Seconds of CPU time that `python ARGS` took: waiting for other processes of the machine is not in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=280, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_needs_hardly_more_time_than_importing_its_libraries(bases, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(written(changed(bases["experiments/prose.yaml"], ("rollout", "group_size"), 2)))
    imports, _ = cpu_seconds("-c", "import lightning.pytorch, transformers, datasets")
    command, result = cpu_seconds("-m", "tealightning", "fit", "-c", str(file))
    assert result.returncode == 2
    assert "rollout.group_size: optimal_tea needs at least 3 rollouts a prompt, got group_size=2" in result.stderr
    assert "Traceback" not in result.stderr
    assert command - imports < SECONDS


def test_debug_shows_the_traceback_of_the_check(bases, loads, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(
        written(changed(bases["experiments/prose.yaml"], ("model", "init_args", "optimizer", "init_args", "lr"), -1))
    )
    with pytest.raises(ValueError, match=r"model\.optimizer\.lr: Invalid learning rate") as raised:
        run("fit", "-c", file, "--debug")
    assert any("torch/optim" in str(entry.path) for entry in raised.traceback)
