"""Training with a real server: on-policy, and one step ahead with scoring as completions come."""

import pytest
from playground_fits import fit, module_of

from tealightning import PolicyGradientLoss
from tealightning.rollouts import VLLMServerEngine

STEPS = 4


@pytest.fixture(scope="module")
def runs(playground):
    """Both runs, with one engine: a second fit finds its server running."""
    engine = VLLMServerEngine()
    settings = {"steps": STEPS, "engine": engine, "limit_val_batches": 1}
    on_policy = fit(playground, module=module_of(playground), val_check_interval=2, **settings)[1]
    ahead = fit(
        playground,
        module=module_of(playground, loss=PolicyGradientLoss(importance_cap=2.0)),
        rollout={"steps_ahead": 1, "score_as_finished": True},
        val_check_interval=2,
        **settings,
    )[1]
    engine.close()
    return on_policy, ahead


@pytest.mark.slow
def test_the_server_has_the_trainers_weights_at_every_step(runs):
    on_policy, _ = runs
    assert len(on_policy.steps) == STEPS and on_policy.largest_move > 1e-4
    assert max(on_policy.series("rollout/log_prob_abs_diff_max")) < 1e-3


@pytest.mark.slow
def test_one_step_ahead_it_had_those_of_the_step_before(runs):
    on_policy, ahead = runs
    assert [step["ids"] for step in ahead.steps] == [step["ids"] for step in on_policy.steps]
    assert ahead.steps[0]["tokens"] == on_policy.steps[0]["tokens"]
    assert ahead.series("rollout/staleness") == [0.0] + [1.0] * (STEPS - 1)
    fresh, *stale = ahead.series("rollout/log_prob_abs_diff_max")
    assert fresh < 1e-3 < min(stale)
    assert len(ahead.validations) == len(on_policy.validations) > 0
