"""Cross-fitted fidelity in worlds whose gradient is known.

Rewards are `R = mu + sd z` with z standard normal, and the score of a rollout is `z` along the first coordinate (what
moves the location), `z^2 - 1` along the second (what moves the spread), and noise along the others. Then the expected
gradients along the two are, in units of sd,

    best-of-N  (1, c_N)      mean reward  (1, 0)      squared deviation from the mean  (0, 2 sd (1 - 2/m))
"""

import math
from dataclasses import dataclass

import pytest
import torch

from tealightning.diagnostics import policy_fidelity
from tealightning.diagnostics.fidelity_report import ceiling_text, policy_table, write_policy_fidelity
from tealightning.diagnostics.measurements import parse_estimators
from tealightning.diagnostics.policy_fidelity import (
    cross_products,
    estimator_figures,
    measure_on_policy,
    oracle_figures,
    with_intervals,
)
from tealightning.diagnostics.pool import Groups, Half
from tealightning.estimators import AdvantageEstimator, build_estimator

N, C_N = 16, 1.765991393054788


def world(seed: int, *, prompts: int = 6, pool: int = 512, features: int = 10, noise: float = 1.0, sd: float = 2.0):
    """Rewards [Q, M] and scores [Q, M, D]; prompts differ in their mean reward."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(prompts, pool, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    scores = noise * torch.randn(prompts, pool, features, generator=generator, dtype=torch.float64)
    scores[..., 0], scores[..., 1] = z, z**2 - 1
    return means + sd * z, scores


@dataclass
class Built:
    """An estimator as it is, in the place of a specification of one."""

    estimator: AdvantageEstimator
    label: str = "built"

    def build(self, **settings) -> AdvantageEstimator:
        return self.estimator


def study(seed: int, m: int, specs: list, **kwargs) -> tuple[dict, list[dict]]:
    return measure_on_policy(*world(seed, **kwargs), specs, target_n=N, group_sizes=[m], seed=seed)


def measured(estimator: AdvantageEstimator, m: int, *, worlds: int = 20, **kwargs) -> dict[str, torch.Tensor]:
    """Each figure of independent worlds, without its interval: [worlds]."""
    samples = [study(seed, m, [Built(estimator)], **kwargs)[1][0] for seed in range(worlds)]
    names = [key for key, value in samples[0].items() if type(value) is float and not key.endswith(("_low", "_high"))]
    return {name: torch.tensor([each[name] for each in samples], dtype=torch.float64) for name in names}


def assert_mean(values: torch.Tensor, expected: float, *, at_most: float = 0.05) -> None:
    """Within 4 standard errors, which are small enough to tell."""
    standard_error = float(values.std() / math.sqrt(len(values)))
    assert standard_error < at_most
    assert abs(float(values.mean()) - expected) < 4 * standard_error


class Random(AdvantageEstimator):
    """Weights that know nothing of the rewards."""

    def compute(self, rewards):
        return torch.randn(rewards.shape, dtype=rewards.dtype, generator=torch.Generator().manual_seed(len(rewards)))


class SquaredDeviation(AdvantageEstimator):
    """Follows the spread and not the mean."""

    def compute(self, rewards):
        m = rewards.shape[1]
        deviation = (rewards - rewards.mean(dim=1, keepdim=True)) ** 2
        return (deviation - deviation.mean(dim=1, keepdim=True)) * m / (m - 1)


def test_oracle_is_the_best_of_n_gradient():
    rewards, scores = world(0, prompts=400, pool=64)
    oracle = Half(rewards=rewards, scores=scores).oracle(N)
    standard_error = oracle.std(dim=0) / 20
    expected = torch.tensor([2.0, 2 * C_N] + [0.0] * 8, dtype=torch.float64)
    assert ((oracle.mean(dim=0) - expected).abs() < 4 * standard_error).all()
    assert (standard_error < 0.15).all()


def test_mean_reward_has_the_exact_cosine_and_bias():
    figures = measured(build_estimator("mean_reward", baseline="loo"), 8)
    assert_mean(figures["cosine"], 1 / math.sqrt(1 + C_N**2), at_most=0.02)
    assert_mean(figures["bias2"], C_N**2 / (1 + C_N**2), at_most=0.05)
    assert_mean(figures["bias2_scaled"], C_N**2 / (1 + C_N**2), at_most=0.02)


def test_an_estimator_on_another_scale_is_judged_by_its_direction():
    figures = measured(SquaredDeviation(), 8)
    assert_mean(figures["cosine"], C_N / math.sqrt(1 + C_N**2), at_most=0.02)
    assert_mean(figures["bias2_scaled"], 1 / (1 + C_N**2), at_most=0.03)
    assert_mean(figures["bias2"], (1 + (3 - C_N) ** 2) / (1 + C_N**2), at_most=0.1)  # 2 sd (1 - 2/m) = 3


def test_the_oracles_own_weights_are_faithful():
    """max@k at k = N <= m is unbiased: cosine 1 and bias 0, which without the correction nothing shows."""
    figures = measured(build_estimator("max_at_k", k=N), 2 * N, noise=3.0, worlds=40)
    assert_mean(figures["cosine"], 1.0, at_most=0.02)
    assert_mean(figures["bias2"], 0.0, at_most=0.02)
    assert figures["cosine_raw"].mean() < 0.97


def test_random_weights_point_nowhere():
    figures = measured(Random(), 8, worlds=40)
    assert_mean(figures["cosine_raw"], 0.0, at_most=0.06)
    assert_mean(figures["bias2"], 1.0, at_most=0.02)
    assert_mean(figures["simulated_cosine_1"], 0.0, at_most=0.02)
    assert_mean(figures["sign_agreement_1"], 0.5, at_most=0.02)


def test_step_errors_are_those_of_fresh_steps():
    """RMSE and SNR against steps of new groups and the exact gradient."""
    estimator, m, sd = build_estimator("mean_reward", baseline="loo"), 8, 2.0
    figures = measured(estimator, m, pool=2048)
    exact = torch.tensor([sd, sd * C_N] + [0.0] * 8, dtype=torch.float64)
    rewards, scores = world(99, prompts=3200, pool=m)
    fresh = Groups(Half(rewards=rewards, scores=scores), m)
    steps = fresh.gradients(fresh.weights(estimator))[:, 0]
    errors = {
        prompts: (steps.unflatten(0, (-1, prompts)).mean(dim=1) - exact).square().sum(dim=1) for prompts in (1, 32)
    }
    for prompts, each in errors.items():
        expected = float(each.mean().sqrt() / exact.norm())
        assert float(figures[f"rmse_raw_{prompts}"].mean()) == pytest.approx(expected, rel=0.1)
        assert float(figures[f"rmse_{prompts}"].mean()) == pytest.approx(expected, rel=0.1)  # its best scale is 1
    signal, noise = sd / math.sqrt(1 + C_N**2), float(steps.var(dim=0).sum().sqrt())
    assert float(figures["snr"].mean()) == pytest.approx(signal / noise, rel=0.1)


def test_step_cosine_is_what_simulated_steps_show_of_a_large_pool():
    """The simulated ones see a noisy oracle: the square root of the ceiling below."""
    ceiling, (figures,) = study(3, 8, [Built(build_estimator("grpo"))], pool=4096, prompts=4)
    for prompts in (1, 32):
        shown = figures[f"simulated_cosine_{prompts}"] / math.sqrt(ceiling["ceiling"])
        assert shown == pytest.approx(figures[f"step_cosine_{prompts}"], abs=0.04)
    assert figures["step_cosine_1"] < figures["step_cosine_32"] < figures["step_cosine_256"]


def test_spread_between_prompts_turns_single_steps_away():
    """Prompts with gradients along different coordinates and no noise: cosine 1/sqrt(4) of one prompt's step."""
    oracle = torch.eye(4, dtype=torch.float64)
    products = cross_products((oracle, oracle), (oracle, oracle), torch.zeros(4, dtype=torch.float64))
    figures = with_intervals(estimator_figures, [products], seed=0)
    assert figures["cosine"] == pytest.approx(1)
    assert figures["step_cosine_1"] == pytest.approx(0.5)


def test_ceiling_is_the_cosine_of_the_two_oracles_and_admits_defeat():
    def oracle(first, second):
        oracles = [torch.tensor([row] * 2, dtype=torch.float64) for row in (first, second)]
        products = cross_products(oracles, oracles, torch.zeros(2, dtype=torch.float64))
        return with_intervals(oracle_figures, [products], seed=0)

    agreeing = oracle([3.0, 4.0], [5.0, 0.0])
    assert agreeing["ceiling"] == pytest.approx(0.6)
    assert agreeing["norm"] == pytest.approx(math.sqrt(15))
    opposed = oracle([3.0, 4.0], [-3.0, -4.0])
    assert math.isnan(opposed["norm"])
    assert "too small to see the gradient" in ceiling_text(opposed | {"sign_agreement": 0.0})


def test_intervals_cover_the_truth():
    """Of 40 worlds with 12 prompts, at least 33 (a bootstrap of few prompts is a little narrow)."""
    truth = 1 / math.sqrt(1 + C_N**2)
    hits = 0
    for seed in range(40):
        _, (figures,) = study(seed, 8, [Built(build_estimator("mean_reward"))], prompts=12, pool=256)
        hits += figures["cosine_low"] <= truth <= figures["cosine_high"]
    assert hits >= 33


def test_intervals_lie_around_their_figures():
    """Also those of raw cosines, where noise is most of the length: a prompt drawn twice must not bring it twice."""
    inside = []
    for seed in range(10):
        ceiling, (figures,) = study(seed, 16, [Built(build_estimator("grpo"))], prompts=24, pool=64, noise=5.0)
        for each, name in ((ceiling, "ceiling"), (figures, "cosine_raw")):
            low, high = each[f"{name}_low"], each[f"{name}_high"]
            inside.append((each[name] - low) / (high - low))
    assert 0.4 < sum(inside) / len(inside) < 0.6
    assert all(0.2 < each < 0.8 for each in inside)


def test_averaging_splits_lowers_the_noise(monkeypatch):
    """Each split alone is as good as any; four of them leave less to chance."""
    estimator = build_estimator("max_at_k", k=N)
    four = measured(estimator, 2 * N, noise=3.0)
    monkeypatch.setattr(policy_fidelity, "SPLITS", 1)
    one = measured(estimator, 2 * N, noise=3.0)
    assert four["bias2"].std() < 0.9 * one["bias2"].std()


def test_study_shows_refusals_and_pairs_its_groups():
    specs = parse_estimators(["calibrated_tea", "max_at_k:k=9", "direct", "tea:scale=none"])
    refused, too_large, direct, tea = study(0, 8, specs)[1]
    assert "needs at least 9 rollouts" in refused["note"] and "lower k (now 9)" in too_large["note"]
    assert set(refused) == set(too_large) == {"estimator", "m", "units", "note"}
    assert direct["units"] == "reward"
    names = ("cosine", "cosine_low", "cosine_high")
    assert [direct[name] for name in names] == [tea[name] for name in names]  # the same estimator on the same groups
    assert direct["cosine_low"] < direct["cosine"] < direct["cosine_high"]


def test_study_is_reproducible():
    specs = parse_estimators(["grpo"])
    assert study(0, 8, specs) == study(0, 8, specs)


def test_report_has_every_estimator_and_reasons(tmp_path):
    ceiling, rows = study(0, 8, parse_estimators(["grpo", "mean_reward", "calibrated_tea"]))
    lines = policy_table(rows).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["grpo", "mean_reward", "calibrated_tea"]
    assert "refused: calibrated_tea needs at least 9" in lines[4]
    grpo, mean_reward = (line.split(" | ") for line in lines[2:4])
    bias = lines[0].split(" | ").index("bias²")
    assert grpo[bias] == "-" and 0.5 < float(mean_reward[bias]) < 1.0
    source = {"command": "tealightning", "commit": "abc", "seed": "0"}
    files = write_policy_fidelity(tmp_path, ceiling, rows, source, ["a fact"], target_n=N)
    assert [file.name for file in files] == ["policy_fidelity.md", "policy_fidelity.csv", "policy_fidelity.png"]
    assert "- seed: 0\n- a fact\n\nNoise ceiling" in files[0].read_text()
    header, first, *_ = files[1].read_text().splitlines()
    assert {"cosine", "cosine_low", "cosine_high", "rmse_raw_256", "simulated_cosine_32"} <= set(header.split(","))
    assert header.startswith("estimator,m,in_reward_units,cosine,") and header.endswith(",note")
    assert float(first.split(",")[header.split(",").index("cosine")]) == rows[0]["cosine"]
    assert files[2].stat().st_size > 10_000
