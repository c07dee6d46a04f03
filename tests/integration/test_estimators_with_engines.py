"""`tealightning fit` with every registered estimator and engine: a new one is tested without a change here.

The reward is the playground's reward model; estimators that refuse its negative scores count words instead.
"""

import csv
import gc
import math

import pytest
import reward_functions
import torch
from command_line import overlay
from run_records import flat_weights, quickstart_args
from transformers import AutoModelForCausalLM

from tealightning.cli import main
from tealightning.estimators import ESTIMATORS, estimator_names
from tealightning.rollouts import engine_names
from tealightning.rollouts.base import ENGINES

STEPS = 2
EXPORT = [{"class_path": "tealightning.ExportPolicy"}]


@pytest.mark.parametrize("engine", [name for name in engine_names() if name != "vllm_server_engine"])  # slow to start
@pytest.mark.parametrize("estimator", estimator_names())
def test_fit_takes_two_steps(estimator, engine, playground, tmp_path):
    args = quickstart_args("fit", playground, tmp_path, max_steps=STEPS, callbacks=EXPORT)
    args += ["--rollout.group_size=12"]  # a tail of 3 at alpha = 0.25, which some estimators need
    if ESTIMATORS.get(estimator).lowest_reward == 0:
        words = {"class_path": "function_reward", "init_args": {"function": f"{reward_functions.__file__}:count_words"}}
        args += ["-c", str(overlay(tmp_path, {"rollout": {"reward": words}}, "words.yaml"))]
    main([*args, f"--model.estimator={estimator}", f"--rollout.engine={ENGINES.get(engine).__name__}"])
    gc.collect()  # frees this run's engine for the next one

    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/policy_loss"]]
    assert len(rows) == STEPS
    for row in rows:
        assert math.isfinite(float(row["train/policy_loss"]))
        assert 0 < float(row["train/grad_norm"]) < 1e3
        assert float(row["rollout/zero_variance_groups"]) == 0.0
        assert float(row["rollout/log_prob_abs_diff_max"]) < 1e-3
    before, after = (
        flat_weights(AutoModelForCausalLM.from_pretrained(folder))
        for folder in (playground / "policy", tmp_path / "policy")
    )
    assert torch.isfinite(after).all()
    assert 1e-5 < (after - before).abs().max() < 1e-2
