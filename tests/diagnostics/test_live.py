"""Cross-fitted fidelity in worlds whose gradient is known.

Rewards are `R = mu + sd z` with z standard normal, and the score of a rollout is `z` along the first coordinate (what
moves the location), `z^2 - 1` along the second (what moves the spread), and noise along the others. Then the expected
gradients along the two are, in units of sd,

    best-of-N  (1, c_N)      mean reward  (1, 0)      squared deviation from the mean  (0, 2 sd (1 - 2/m))
"""

import math

import pytest
import torch

from tealightning.diagnostics import policy_fidelity as live
from tealightning.diagnostics.measurements import parse_estimators
from tealightning.diagnostics.policy_fidelity import FidelityStudy
from tealightning.diagnostics.policy_fidelity_groups import (
    Cut,
    Half,
    group_gradients,
    group_weights,
    half_size,
    split_halves,
)
from tealightning.diagnostics.policy_fidelity_report import ceiling_lines, fidelity_table, plot_fidelity, write_csv_rows
from tealightning.diagnostics.policy_fidelity_statistics import Estimate, Gradients, estimates, oracle_estimates
from tealightning.estimators import AdvantageEstimator, build_estimator
from tealightning.functional.max_at_k import max_at_k_loo_weights

N, C_N = 16, 1.765991393054788


def world(seed: int, *, prompts: int = 6, pool: int = 512, features: int = 10, noise: float = 1.0, sd: float = 2.0):
    """Rewards [Q, M] and scores [Q, M, D]; prompts differ in their mean reward."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(prompts, pool, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    scores = noise * torch.randn(prompts, pool, features, generator=generator, dtype=torch.float64)
    scores[..., 0], scores[..., 1] = z, z**2 - 1
    return means + sd * z, scores


def study(seed: int, m: int, **kwargs) -> FidelityStudy:
    return FidelityStudy(*world(seed, **kwargs), target_n=N, group_sizes=[m], seed=seed)


def measured(estimator: AdvantageEstimator, m: int, *, worlds: int = 20, **kwargs) -> dict[str, torch.Tensor]:
    """Each figure of independent worlds: [worlds]."""
    found = []
    for seed in range(worlds):
        _, (figures,) = study(seed, m, **kwargs).measure([(estimator, m)])
        found.append({name: value.value for name, value in figures.items()})
    return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}


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
    found = Half(rewards=rewards, scores=scores).oracle(N)
    standard_error = found.std(dim=0) / 20
    expected = torch.tensor([2.0, 2 * C_N] + [0.0] * 8, dtype=torch.float64)
    assert ((found.mean(dim=0) - expected).abs() < 4 * standard_error).all()
    assert (standard_error < 0.15).all()


def test_mean_reward_has_the_exact_cosine_and_bias():
    found = measured(build_estimator("mean_reward", baseline="loo"), 8)
    assert_mean(found["cosine"], 1 / math.sqrt(1 + C_N**2), at_most=0.02)
    assert_mean(found["bias2"], C_N**2 / (1 + C_N**2), at_most=0.05)
    assert_mean(found["bias2_scaled"], C_N**2 / (1 + C_N**2), at_most=0.02)


def test_an_estimator_on_another_scale_is_judged_by_its_direction():
    found = measured(SquaredDeviation(), 8)
    assert_mean(found["cosine"], C_N / math.sqrt(1 + C_N**2), at_most=0.02)
    assert_mean(found["bias2_scaled"], 1 / (1 + C_N**2), at_most=0.03)
    assert_mean(found["bias2"], (1 + (3 - C_N) ** 2) / (1 + C_N**2), at_most=0.1)  # 2 sd (1 - 2/m) = 3


def test_the_oracles_own_weights_are_faithful():
    """max@k at k = N <= m is unbiased: cosine 1 and bias 0, which without the correction nothing shows."""
    found = measured(build_estimator("max_at_k", k=N), 2 * N, noise=3.0, worlds=40)
    assert_mean(found["cosine"], 1.0, at_most=0.02)
    assert_mean(found["bias2"], 0.0, at_most=0.02)
    assert found["cosine_raw"].mean() < 0.97


def test_random_weights_point_nowhere():
    found = measured(Random(), 8, worlds=40)
    assert_mean(found["cosine_raw"], 0.0, at_most=0.06)
    assert_mean(found["bias2"], 1.0, at_most=0.02)
    assert_mean(found["simulated_cosine_1"], 0.0, at_most=0.02)
    assert_mean(found["sign_agreement_1"], 0.5, at_most=0.02)


def test_step_errors_are_those_of_fresh_steps():
    """RMSE and SNR against steps of new groups and the exact gradient."""
    estimator, m, sd = build_estimator("mean_reward", baseline="loo"), 8, 2.0
    found = measured(estimator, m, pool=2048)
    exact = torch.tensor([sd, sd * C_N] + [0.0] * 8, dtype=torch.float64)
    rewards, scores = world(99, prompts=3200, pool=m)
    groups = torch.arange(m).expand(3200, 1, m)
    fresh = Half(rewards=rewards, scores=scores)
    steps = group_gradients(fresh, groups, group_weights(fresh, groups, estimator))[:, 0]
    errors = {
        prompts: (steps.unflatten(0, (-1, prompts)).mean(dim=1) - exact).square().sum(dim=1) for prompts in (1, 32)
    }
    for prompts, each in errors.items():
        expected = float(each.mean().sqrt() / exact.norm())
        assert float(found[f"rmse_raw_{prompts}"].mean()) == pytest.approx(expected, rel=0.1)
        assert float(found[f"rmse_{prompts}"].mean()) == pytest.approx(expected, rel=0.1)  # its best scale is 1
    signal, noise = sd / math.sqrt(1 + C_N**2), float(steps.var(dim=0).sum().sqrt())
    assert float(found["snr"].mean()) == pytest.approx(signal / noise, rel=0.1)


def test_step_cosine_is_what_simulated_steps_show_of_a_large_pool():
    """The simulated ones see a noisy oracle: the square root of the ceiling below."""
    each = study(3, 8, pool=4096, prompts=4)
    ceiling, (found,) = each.measure([(build_estimator("grpo"), 8)])
    for prompts in (1, 32):
        shown = found[f"simulated_cosine_{prompts}"].value / math.sqrt(ceiling["ceiling"].value)
        assert shown == pytest.approx(found[f"step_cosine_{prompts}"].value, abs=0.04)
    assert found["step_cosine_1"].value < found["step_cosine_32"].value < found["step_cosine_256"].value


def test_spread_between_prompts_turns_single_steps_away():
    """Prompts with gradients along different coordinates and no noise: cosine 1/sqrt(4) of one prompt's step."""
    oracle = torch.eye(4, dtype=torch.float64)
    gradients = Gradients.of((oracle, oracle), (oracle, oracle), noise=torch.zeros(4, dtype=torch.float64))
    found = estimates(gradients, seed=0)
    assert found["cosine"].value == pytest.approx(1)
    assert found["step_cosine_1"].value == pytest.approx(0.5)


def test_ceiling_is_the_cosine_of_the_two_oracles_and_admits_defeat():
    def found(first, second):
        oracles = [torch.tensor([row] * 2, dtype=torch.float64) for row in (first, second)]
        return oracle_estimates(Gradients.of(oracles, oracles, torch.zeros(2, dtype=torch.float64)), seed=0)

    agreeing = found([3.0, 4.0], [5.0, 0.0])
    assert agreeing["ceiling"].value == pytest.approx(0.6)
    assert agreeing["norm"].value == pytest.approx(math.sqrt(15))
    opposed = found([3.0, 4.0], [-3.0, -4.0])
    assert math.isnan(opposed["norm"].value)
    assert "too small to see the gradient" in ceiling_lines(opposed | {"sign_agreement": Estimate(0.0)})


def test_intervals_cover_the_truth():
    """Of 40 worlds with 12 prompts, at least 33 (a bootstrap of few prompts is a little narrow)."""
    truth = 1 / math.sqrt(1 + C_N**2)
    hits = 0
    for seed in range(40):
        _, (found,) = study(seed, 8, prompts=12, pool=256).measure([(build_estimator("mean_reward"), 8)])
        cosine = found["cosine"]
        hits += cosine.low <= truth <= cosine.high
    assert hits >= 33


def test_intervals_lie_around_their_figures():
    """Also those of raw cosines, where noise is most of the length: a prompt drawn twice must not bring it twice."""
    inside = []
    for seed in range(10):
        ceiling, (found,) = study(seed, 16, prompts=24, pool=64, noise=5.0).measure([(build_estimator("grpo"), 16)])
        for each in (ceiling["ceiling"], found["cosine_raw"]):
            inside.append((each.value - each.low) / (each.high - each.low))
    assert 0.4 < sum(inside) / len(inside) < 0.6
    assert all(0.2 < each < 0.8 for each in inside)


def test_halves_are_disjoint_and_leave_out_what_could_not_be_scored():
    rewards = torch.tensor([[0.0, float("nan"), 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    scores = torch.arange(6.0).expand(2, 6)[..., None]
    assert half_size(rewards, smallest=2) == 2
    orders = set()
    for seed in range(20):
        halves = split_halves(rewards, scores, 2, torch.Generator().manual_seed(seed))
        members = torch.cat([half.rewards for half in halves], dim=1)
        assert all(len(set(row.tolist())) == 4 for row in members) and members.isfinite().all()
        assert all(torch.equal(half.scores[..., 0].double(), half.rewards) for half in halves)
        orders.add(tuple(members.flatten().tolist()))
    assert len(orders) > 10
    with pytest.raises(ValueError, match=r"halves of 3 scored rollouts .* got 2: raise --pool to 6"):
        half_size(rewards, smallest=3)


def test_averaging_splits_lowers_the_noise(monkeypatch):
    """Each split alone is as good as any; four of them leave less to chance."""
    estimator = build_estimator("max_at_k", k=N)
    four = measured(estimator, 2 * N, noise=3.0)
    monkeypatch.setattr(live, "SPLITS", 1)
    one = measured(estimator, 2 * N, noise=3.0)
    assert four["bias2"].std() < 0.9 * one["bias2"].std()


def test_group_gradients_are_weighted_means_of_scores():
    rewards, scores = world(5, prompts=2, pool=12)
    half = Half(rewards=rewards, scores=scores)
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(1, 3, 4).expand(2, 3, 4)
    found = group_gradients(half, groups, group_weights(half, groups, build_estimator("max_at_k", k=2)))
    rows = groups[1, 2]
    weights = max_at_k_loo_weights(rewards[1, rows][None], 2)[0]
    assert torch.allclose(found[1, 2], (weights[:, None] * scores[1, rows]).mean(dim=0))


def test_mean_and_noise_are_those_of_the_groups_gradients():
    rewards, scores = world(6, prompts=3, pool=21)
    half = Half(rewards=rewards, scores=scores)
    cut = Cut.of(half, 5)
    assert cut.groups.shape == (3, 4, 5)
    weights = group_weights(half, cut.groups, build_estimator("grpo"))
    gradients = group_gradients(half, cut.groups, weights)
    mean, noise = cut.mean_and_noise(weights)
    assert torch.allclose(mean, gradients.mean(dim=1))
    assert torch.allclose(noise, gradients.var(dim=1).sum(dim=-1))
    alone = Cut.of(half, 20)
    assert alone.mean_and_noise(group_weights(half, alone.groups, build_estimator("grpo")))[1].isnan().all()


def test_study_shows_refusals_and_pairs_its_groups():
    each = study(0, 8)
    specs = parse_estimators(["calibrated_tea", "max_at_k:k=9", "direct", "tea:scale=none"])
    refused, too_large, direct, tea = each.run(specs).rows
    assert "needs at least 9 rollouts" in refused.note and "lower k (now 9)" in too_large.note
    assert refused.values == {} == too_large.values
    assert direct.in_reward_units
    assert direct.values["cosine"] == tea.values["cosine"]  # the same estimator on the same groups
    assert direct.values["cosine"].low < direct.values["cosine"].value < direct.values["cosine"].high


def test_study_is_reproducible_and_refuses_a_single_prompt():
    specs = parse_estimators(["grpo"])
    (one,), (same,) = study(0, 8).run(specs).rows, study(0, 8).run(specs).rows
    assert one == same
    with pytest.raises(ValueError, match="prompts must be at least 2"):
        study(0, 8, prompts=1)


def test_report_has_every_estimator_and_reasons(tmp_path):
    report = study(0, 8).run(parse_estimators(["grpo", "mean_reward", "calibrated_tea"]))
    rows = report.rows
    lines = fidelity_table(rows).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["grpo", "mean_reward", "calibrated_tea"]
    assert "refused: calibrated_tea needs at least 9" in lines[4]
    grpo, mean_reward = (line.split(" | ") for line in lines[2:4])
    bias = lines[0].split(" | ").index("bias²")
    assert grpo[bias] == "-" and 0.5 < float(mean_reward[bias]) < 1.0
    write_csv_rows(tmp_path / "x.csv", rows)
    header, first = (tmp_path / "x.csv").read_text().splitlines()[:2]
    assert {"cosine", "cosine_low", "cosine_high", "rmse_raw_256", "simulated_cosine_32"} <= set(header.split(","))
    assert float(first.split(",")[header.split(",").index("cosine")]) == rows[0].values["cosine"].value
    plot_fidelity(tmp_path / "x.png", report, target_n=N)
    assert (tmp_path / "x.png").stat().st_size > 10_000
