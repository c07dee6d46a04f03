import re
from dataclasses import replace

import pytest
import torch

from tealightning import HealthChecks
from tealightning.callbacks.health_checks import GOOD_STEPS_THAT_END_AN_EPISODE, HEALTH_CHECKS, StepSummary
from tealightning.types import SkippedStep

GOOD = {
    "train/trained_tokens": 100.0,
    "train/grad_norm": 1.0,
    "train/kl": 0.1,
    "train/entropy": 1.0,
    "rollout/log_prob_abs_diff_mean": 0.01,
    "rollout/reward_ties": 0.0,
    "unknown_tokens": 0,
    "rollout/zero_variance_groups": 0.25,
}


def seen(metrics=(), **fields):
    usual = {"skipped": None, "global_step": 5, "weights_version": 5, "steps_ahead": 0, "tie_cause": None}
    return StepSummary(metrics=GOOD | dict(metrics), **usual | fields)


def check_of(name, limit, patience=2):
    """A fresh check as `HealthChecks` makes them: with the limit that a setting of it has."""
    check = HEALTH_CHECKS[name]
    steps = patience if check.patience_from == "patience" else limit if check.patience_from else check.patience
    return replace(check, limit=limit, patience=steps)


def skipped():
    return SkippedStep(
        inner_epoch=0,
        loss=float("nan"),
        kl=0.0,
        grad_norm=float("nan"),
        advantages=torch.zeros(1, 2),
        policy_log_probs=torch.zeros(2, 3),
        parameters=["a", "b", "c", "d"],
    )


MISMATCH, ENTROPY = "rollout/log_prob_abs_diff_mean", "train/entropy"
CASES = [
    ("nonfinite", 3, seen(), seen(skipped=skipped()), 3, "NaN or infinite.*a, b, c and 1 more"),
    ("weights_version", 0, seen(), seen(weights_version=4), 1, "step 4 and trained on after step 5"),
    ("weights_version", 0, seen(weights_version=4, steps_ahead=1), seen(weights_version=3, steps_ahead=1), 1, "step 3"),
    ("mismatch", 0.2, seen(), seen({MISMATCH: 0.3}), 1, "differ by 0.3 nats"),
    ("drift", 0.2, seen(weights_version=4), seen({MISMATCH: 0.3}, weights_version=4), 1, "moves that far in 1 steps"),
    ("stale_weights", 5, seen(), seen({MISMATCH: 0.06}), 3, "6 times what they did at the first step"),
    ("stale_ahead", 5, seen(weights_version=4), seen({MISMATCH: 0.06}, weights_version=4), 3, "6 times what they did"),
    ("unknown_tokens", 0, seen(), seen({"unknown_tokens": 2}), 1, "2 sampled tokens"),
    ("reward_ties", 0.2, seen(), seen({"rollout/reward_ties": 0.3}, tie_cause="bfloat16"), 2, "30%.*bfloat16"),
    ("degenerate", 4, seen(), seen({"rollout/zero_variance_groups": 1.0}), 4, "for every prompt"),
    ("kl", 5, seen(), seen({"train/kl": 6.0}), 2, "KL to the reference is 6 nats"),
    ("kl", 5, seen(), seen({"train/kl": 0.0}), 2, "exactly 0 although the policy is trained"),
    ("entropy", 0.05, seen(), seen({ENTROPY: 0.04}), 2, "4.0% of the 1"),
]


@pytest.mark.parametrize(("name", "limit", "good", "bad", "steps", "message"), CASES)
def test_check_tells_after_its_steps_in_a_row_and_once_an_episode(name, limit, good, bad, steps, message):
    check = check_of(name, limit)
    assert check.look(good) is None
    for _ in range(steps - 1):
        assert check.look(bad) is None
    assert check.look(good) is None and check.total == steps - 1
    told = [check.look(bad) for _ in range(steps + 3)]
    assert [problem is not None for problem in told] == [i == steps - 1 for i in range(steps + 3)]
    assert re.search(message, told[steps - 1])
    assert check.total == 2 * steps + 2


def test_an_episode_ends_after_good_steps_and_a_new_one_is_told():
    check = check_of("mismatch", 0.2)
    bad = seen({MISMATCH: 0.3})
    assert check.look(bad)
    for _ in range(GOOD_STEPS_THAT_END_AN_EPISODE - 1):
        check.look(seen())
    assert check.look(bad) is None  # it comes and goes: the same episode
    for _ in range(GOOD_STEPS_THAT_END_AN_EPISODE):
        check.look(seen())
    assert check.look(bad)


def test_a_step_without_log_probs_says_nothing_of_the_engine():
    nothing = {"train/trained_tokens": 0.0, MISMATCH: 0.0, ENTROPY: 0.0, "train/kl": 0.0}
    for name in ("mismatch", "stale_weights", "kl", "entropy"):
        check = check_of(name, 0.01, patience=1)
        for _ in range(4):
            assert check.look(seen(nothing)) is None
        assert check.total == 0


def test_stale_weights_leave_rounding_and_a_higher_entropy_alone():
    check = check_of("stale_weights", 5)
    for value in (1e-7, 4e-4, 4e-4, 4e-4):  # all float32's
        assert check.look(seen({MISMATCH: value})) is None
    check = check_of("stale_weights", 5)
    check.look(seen({MISMATCH: 0.01, ENTROPY: 0.5}))
    check.look(seen({MISMATCH: 0.09, ENTROPY: 1.0}))
    assert check.total == 0
    check.look(seen({MISMATCH: 0.11, ENTROPY: 1.0}))
    assert check.total == 1


def test_stale_ahead_goes_with_the_learning_rate_and_waits_for_a_difference_to_be_seen():
    def one_step_old(value, lr):
        return seen({MISMATCH: value, "train/lr": lr}, weights_version=4)

    check = check_of("stale_ahead", 5)
    for value, lr in [(0.0, 0.0), (1e-5, 1e-7), (2e-3, 1e-5), (1e-2, 5e-5), (5e-2, 1e-4), (2e-2, 1e-5)]:
        check.look(one_step_old(value, lr))
    assert check.first["first"] == 2e-3
    assert check.total == 1  # the last one: a warm-up explains the others


def test_what_a_check_compares_with_survives_a_checkpoint():
    for name, metric in (("stale_weights", MISMATCH), ("entropy", ENTROPY)):
        first, second = check_of(name, 0.5), check_of(name, 0.5)
        first.look(seen({metric: 0.3}))
        second.load_state_dict(first.state_dict())
        assert second.first == first.first and second.first["first"] == 0.3
        second.load_state_dict({"total": 2, "first": None})
        assert (second.total, second.first) == (2, {})


def test_ties_that_are_meant_are_left_alone():
    check = check_of("reward_ties", 0.2, patience=1)
    assert check.look(seen({"rollout/reward_ties": 1.0}, tie_cause=None)) is None


def test_null_switches_a_check_off():
    settings = {check.limit_from or check.patience_from for check in HEALTH_CHECKS.values()}
    assert HealthChecks(**dict.fromkeys(settings)).counts == {}
    assert HealthChecks().counts == dict.fromkeys(HEALTH_CHECKS, 0)


def test_settings_name_every_check():
    assert all(f"`{check}`" in HealthChecks.__doc__ for check in HEALTH_CHECKS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_on": ["mismach"]}, r"health.stop_on: there is no check 'mismach'. Did you mean 'mismatch'"),
        ({"max_nonfinite_steps": 0}, "health.max_nonfinite_steps must be at least 1"),
        ({"max_log_prob_diff": -1.0}, "health.max_log_prob_diff must be at least 0"),
        ({"patience": 0}, "health.patience must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HealthChecks(**settings)
