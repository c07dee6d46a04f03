import copy

import pytest

from tealightning.ablation.plan import (
    arguments,
    config_hash,
    expand,
    make_plan,
    run_config,
    start_config,
    with_folder,
    with_seed,
)
from tealightning.ablation.spec import parse_spec
from tealightning.errors import UserError

CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "tealightning.PostTrainingModule",
        "init_args": {"policy": "hub/policy", "estimator": {"class_path": "x.GRPO"}, "ns": [1], "inner_epochs": 2},
    },
    "data": {"class_path": "tealightning.PromptDataModule", "init_args": {"train": "t", "batch_size": 8, "seed": 0}},
    "rollout": {"engine": {"class_path": "x.VLLMEngine"}, "group_size": 16},
    "trainer": {
        "logger": {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {}},
        "callbacks": [{"class_path": "tealightning.BestOfNReport"}, {"class_path": "tealightning.ExportPolicy"}],
        "max_steps": 60,
    },
}


def spec_of(**changes):
    return parse_spec(
        {
            "name": "trial",
            "out": "runs/none",
            "base": ["base.yaml"],
            "variants": {"grpo": {"model.estimator": "grpo"}, "tea": {"model.estimator": "tea"}},
            "reference": "grpo",
            "seeds": [3, 5],
            "equal": {"optimizer_steps": 10},
            "evaluation": {"ns": [1, 4], "prompts": 16, "every": 5},
        }
        | changes
    )


def grid_spec(**changes):
    return spec_of(
        settings={"rollout.group_size": "{m}"},
        grid={"m": [16, 32], "n": [64, 128]},
        variants={"grpo": {"model.estimator": "grpo"}, "tea": {"model.estimator.target_n": "{n}"}},
        **changes,
    )


def resolve(args):
    """Stands for the parser: overrides that the plan itself does not read are kept where a hash sees them."""
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"]["estimator"] = {"class_path": "x.GRPO", "init_args": {"given": list(args)}}
    for arg in args:
        if arg.startswith("--rollout.group_size="):
            config["rollout"]["group_size"] = int(arg.partition("=")[2])
    return config


def test_grid_multiplies_a_variant_only_along_the_axes_that_it_names():
    variants = expand(grid_spec())
    assert [v.name for v in variants] == [
        "grpo[m=16]", "grpo[m=32]", "tea[m=16,n=64]", "tea[m=16,n=128]", "tea[m=32,n=64]", "tea[m=32,n=128]",
    ]  # fmt: skip
    assert [v.reference for v in variants] == [None, None, "grpo[m=16]", "grpo[m=16]", "grpo[m=32]", "grpo[m=32]"]
    assert variants[-1].settings == {"rollout.group_size": 32, "model.estimator.target_n": 128}


def test_reference_must_be_a_variant_that_all_can_be_compared_with():
    with pytest.raises(ValueError, match="reference must be one of the variants grpo, tea, got 'rloo'"):
        expand(spec_of(reference="rloo"))
    spec = spec_of(grid={"n": [64]}, variants={"a": {"x": "{n}"}, "b": {}}, reference="a")
    with pytest.raises(ValueError, match=r"the reference a differs along \{n\} and b does not"):
        expand(spec)


def test_arguments_are_those_of_the_command_line():
    spec = spec_of(settings={"model.loss.kl_coef": 0.0, "trainer.callbacks": None})
    assert arguments(spec, expand(spec)[1]) == [
        "-c", "base.yaml", "--model.loss.kl_coef=0.0", "--trainer.callbacks=null", "--model.estimator=tea",
    ]  # fmt: skip


def test_run_config_sets_budget_and_evaluation_and_keeps_the_rest():
    config = run_config(spec_of(), CONFIG)
    trainer = config["trainer"]
    assert (trainer["max_steps"], trainer["val_check_interval"], trainer["limit_val_batches"]) == (10, 5, 2)
    assert [c["class_path"].rpartition(".")[2] for c in trainer["callbacks"]] == [
        "ExportPolicy", "Budget", "EvaluationRecord",
    ]  # fmt: skip
    assert config["model"]["init_args"]["ns"] == [1, 4]
    assert config["model"]["init_args"]["inner_epochs"] == 2
    assert CONFIG["trainer"]["max_steps"] == 60  # not changed in place


def test_run_config_of_a_token_budget_has_no_step_limit():
    config = run_config(spec_of(equal={"generated_tokens": 5000}), CONFIG)
    assert config["trainer"]["max_steps"] == -1
    assert config["trainer"]["callbacks"][-2]["init_args"] == {"generated_tokens": 5000}


def test_rollouts_per_step_decide_the_prompts_of_a_step():
    plan = make_plan(grid_spec(equal={"rollouts": 640, "rollouts_per_step": 128}), resolve)
    sizes = {name: job.config["data"]["init_args"]["batch_size"] for (name, _), job in plan.jobs.items()}
    assert (sizes["grpo[m=16]"], sizes["tea[m=32,n=64]"]) == (8, 4)
    with pytest.raises(
        ValueError, match=r"variant grpo.*rollouts_per_step=100 is no multiple of rollout.group_size=16"
    ):
        make_plan(grid_spec(equal={"rollouts": 640, "rollouts_per_step": 100}), resolve)


def test_seeds_share_everything_but_the_seed():
    first, second = with_seed(CONFIG, 3), with_seed(CONFIG, 5)
    assert (first["seed_everything"], first["data"]["init_args"]["seed"]) == (3, 3)
    second["seed_everything"] = second["data"]["init_args"]["seed"] = 3
    assert first == second


def test_starting_policy_is_evaluated_once_a_seed_whatever_the_variant_trains():
    plan = make_plan(grid_spec(), resolve)
    assert len(plan.jobs) == 6 * 2
    assert len({job.folder for job in plan.starts.values()}) == 2
    assert len(plan.all_jobs) == 14
    assert [job.kind for job in plan.all_jobs[:3]] == ["start", "start", "fit"]
    config = start_config(run_config(spec_of(), CONFIG) | {"seed_everything": 3})
    assert "inner_epochs" not in config["model"]["init_args"]


def test_hash_changes_with_the_configuration_and_with_the_inputs(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}\n")

    def resolved(args):
        config = resolve(args)
        config["data"]["init_args"]["train"] = str(prompts)
        return config

    def folders(spec):
        return {key: job.folder for key, job in make_plan(spec, resolved).jobs.items()}

    before = folders(spec_of())
    assert folders(spec_of()) == before
    assert folders(spec_of(bootstrap_samples=500)) == before  # how results are computed is no part of a run
    assert all(folders(spec_of(equal={"optimizer_steps": 11}))[key] != folder for key, folder in before.items())
    prompts.write_text("{} \n")
    assert all(folders(spec_of())[key] != folder for key, folder in before.items())


def test_hash_reads_the_contents_of_large_files(tmp_path):
    """A retrained policy has files of the same size."""
    policy = tmp_path / "policy"
    policy.mkdir()
    with (policy / "model.safetensors").open("wb") as weights:
        weights.truncate(65 * 2**20)
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"]["policy"] = str(policy)
    before = config_hash(config, {})
    assert config_hash(config, {}) == before
    with (policy / "model.safetensors").open("r+b") as weights:
        weights.seek(33 * 2**20)
        weights.write(b"1")
    assert config_hash(config, {}) != before


def test_hash_leaves_out_when_a_run_is_given_up():
    watched = CONFIG | {"health": {"max_kl": 3.0}, "deadlines": {"syncing_seconds": 5}, "checkpoint": {"keep": 3}}
    assert config_hash(watched, {}) == config_hash(CONFIG, {})
    assert config_hash(CONFIG | {"seed_everything": 1}, {}) != config_hash(CONFIG, {})


def test_hash_does_not_change_with_a_setting_that_came_later_and_changes_nothing():
    """Finished runs of an older version are not made again."""
    loss = {"kl_coef": 0.1, "importance_cap": 2.0}
    old, same, other = (copy.deepcopy(CONFIG) for _ in range(3))
    old["model"]["init_args"]["loss"] = loss
    same["model"]["init_args"]["loss"] = loss | {"importance_mode": "token_truncate", "importance_min": 0.0}
    other["model"]["init_args"]["loss"] = loss | {"importance_mode": "token_mask", "importance_min": 0.0}
    assert config_hash(same, {}) == config_hash(old, {}) != config_hash(other, {})


def test_folder_is_that_of_the_first_logger_and_others_are_kept(tmp_path):
    loggers = with_folder(CONFIG, tmp_path)["trainer"]["logger"]
    assert [logger["class_path"].rpartition(".")[2] for logger in loggers] == ["CSVLogger", "WandbLogger"]
    assert loggers[0]["init_args"]["save_dir"] == str(tmp_path)


def test_a_variant_that_cannot_run_is_named():
    def refuse(args):
        raise UserError("no such estimator")

    with pytest.raises(UserError, match="variant grpo: no such estimator"):
        make_plan(spec_of(), refuse)


def test_a_defect_is_no_message_about_a_variant():
    def fail(args):
        return {}["missing"]

    with pytest.raises(KeyError) as raised:
        make_plan(spec_of(), fail)
    assert raised.value.__notes__ == ["(in variant grpo)"]
