import pytest
import torch

from tealightning.estimators import (
    TEA,
    AdvantageEstimator,
    Direct,
    MaxAtK,
    MeanReward,
    PrefixTEA,
    build_estimator,
    estimator_names,
)
from tealightning.functional.tail import tail_size


@pytest.mark.parametrize(
    ("name", "kwargs", "argument"),
    [
        ("mean_reward", {"baseline": "median"}, "baseline"),
        ("grpo", {"eps": 0.0}, "eps"),
        ("grpo", {"eps": float("nan")}, "eps"),
        ("max_at_k", {"k": 0}, "k"),
        ("max_at_k", {"k": 2.5}, "k"),
        ("max_at_k", {"baseline": "loo"}, "baseline"),
        ("max_at_k", {"scale": "reward_std"}, "scale"),
        ("max_rl", {"eps": 0.0}, "eps"),
        ("rs_grpo", {"beta": 0.0}, "beta"),
        ("rs_grpo", {"eps": -1.0}, "eps"),
        ("direct", {"target_n": 0}, "target_n"),
        ("direct", {"target_n": "128"}, "target_n"),
        ("direct", {"alpha": 0.0}, "alpha"),
        ("direct", {"alpha": 1.5}, "alpha"),
        ("tea", {"alpha": float("nan")}, "alpha"),
        ("tea", {"scale": "std"}, "scale"),
        ("tea", {"baseline": "median"}, "baseline"),
        ("prefix_tea", {"num_prefixes": 0}, "num_prefixes"),
        ("prefix_tea", {"order": 5}, "order"),
        ("prefix_tea", {"rotations": 0}, "rotations"),
        ("direct", {"tail": "pareto"}, "tail"),
        ("calibrated_tea", {"alpha": 2.0}, "alpha"),
        ("optimal_tea", {"scale": "rms"}, "scale"),
        ("optimal_tea", {"lam": -1.0}, "lam"),
        ("optimal_tea", {"scale_weight": float("inf")}, "scale_weight"),
    ],
)
def test_constructor_names_the_argument_that_is_wrong(name, kwargs, argument):
    with pytest.raises(ValueError, match=rf"\b{argument} must be"):
        build_estimator(name, **kwargs)


@pytest.mark.parametrize(
    ("estimator", "group_size", "message"),
    [
        (Direct(alpha=0.25), 4, r"group_size=4.*alpha=0.25.*group_size to 5"),
        (TEA(alpha=0.1), 10, r"group_size=10.*alpha=0.1.*group_size to 11"),
        (PrefixTEA(num_prefixes=8, order=2), 7, r"group_size=7.*num_prefixes \(now 8\)"),
        (MaxAtK(k=8), 4, r"group_size=4.*lower k \(now 8\)"),
        (MeanReward(), 1, r"group_size=1.*group_size to 2"),
    ],
)
def test_too_small_group_size_says_what_to_change(estimator, group_size, message):
    with pytest.raises(ValueError, match=message):
        estimator(torch.zeros(2, group_size))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_tail_estimators_accept_exactly_the_groups_whose_tail_has_two(alpha):
    smallest = Direct(alpha=alpha).min_group_size
    assert tail_size(alpha, smallest) >= 2
    assert smallest == 1 or tail_size(alpha, smallest - 1) < 2


def test_build_estimator_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'prefix_tea'"):
        build_estimator("prefix_te")


def test_build_estimator_names_the_parameters_of_the_estimator():
    with pytest.raises(ValueError, match=r"no parameter 'beta'.*target_n, alpha, baseline, scale, tail"):
        build_estimator("tea", beta=1.0)


def test_estimator_names_are_the_snake_case_of_the_classes():
    expected = {"bon_max_mean", "direct", "grpo", "max_at_k", "mean_reward", "prefix_tea", "tea"}
    assert expected <= set(estimator_names())
    for name in estimator_names():
        estimator = build_estimator(name)
        assert isinstance(estimator, AdvantageEstimator)
        assert estimator.name == name


def test_repr_shows_the_arguments_only():
    assert repr(Direct(target_n=64, alpha=0.5)) == "Direct(target_n=64, alpha=0.5, tail='gaussian')"
