import pickle

import matplotlib.pyplot as plt
import pytest
import torch

from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts
from tealightning.functional.tail import extrapolated_best_of_n
from tealightning.metrics import BestOfN

ONE_IN_FOUR = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_best_of_n_metric_by_hand():
    metric = BestOfN(ns=(1, 4))
    metric.update(ONE_IN_FOUR)
    result = metric.compute()
    assert set(result) == {"best_of_1", "best_of_1_se", "best_of_4", "best_of_4_se"}
    assert result["best_of_1"].item() == pytest.approx((0.25 + 0 + 1) / 3)
    assert result["best_of_4"].item() == pytest.approx(2 / 3)  # 1 of 4 correct counts as 1
    assert result["best_of_4_se"].item() == pytest.approx((1 / 3 / 3) ** 0.5)
    assert result["best_of_4"].dtype == torch.float64


def test_best_of_n_metric_adds_up_updates_of_different_width():
    generator = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(5, 20, generator=generator), torch.randn(3, 6, generator=generator)
    metric = BestOfN(ns=(1, 4, 16))
    metric.update(wide)
    metric.update(narrow)
    result = metric.compute()
    both = torch.cat([best_of_n(wide, [4]), best_of_n(narrow, [4])])
    torch.testing.assert_close(result["best_of_4"], mean_over_prompts(both).mean[0])
    torch.testing.assert_close(result["best_of_16"], best_of_n(wide, [16]).mean())
    assert result["best_of_16_prompts"] == 5
    assert "best_of_4_prompts" not in result


def test_best_of_n_metric_leaves_unscorable_samples_out():
    metric = BestOfN(ns=(1, 2))
    rewards = torch.tensor([[1.0, float("nan"), 3.0], [float("nan"), float("nan"), 8.0]])
    metric.update(rewards, valid=torch.tensor([[True, True, True], [True, True, True]]))
    metric.update(torch.tensor([[9.0, 9.0, 5.0]]), valid=torch.tensor([[False, False, False]]))
    result = metric.compute()
    assert result["best_of_1"] == (2.0 + 8.0) / 2
    assert result["best_of_1_prompts"] == 2
    assert result["best_of_2"] == 3.0
    assert result["best_of_2_prompts"] == 1


def test_best_of_n_metric_never_puts_an_extrapolation_under_a_measured_key():
    rewards = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    metric = BestOfN(ns=(1, 64), extrapolate_ns=(4, 1024), alpha=0.5)
    metric.update(rewards)
    result = metric.compute()
    assert "best_of_64" not in result
    expected = extrapolated_best_of_n(rewards, [4, 64, 1024], alpha=0.5)
    for column, n in enumerate((4, 64, 1024)):
        torch.testing.assert_close(result[f"best_of_{n}_extrapolated"], expected[:, column].mean())
        torch.testing.assert_close(
            result[f"best_of_{n}_extrapolated_se"], mean_over_prompts(expected).standard_error[column]
        )
    assert "best_of_4" not in result  # asked for as an extrapolation only


def test_best_of_n_metric_pools_samples_of_one_prompt_by_key():
    metric = BestOfN(ns=(1, 4))
    metric.update(torch.tensor([[1.0, 2.0], [7.0, 7.0]]), keys=torch.tensor([30, 2**62]))
    metric.update(torch.tensor([[3.0, 4.0]]), keys=torch.tensor([30]))
    keys, values = metric.per_prompt()
    assert keys.tolist() == [30, 2**62]
    torch.testing.assert_close(
        values, torch.tensor([[2.5, 4.0], [7.0, float("nan")]], dtype=torch.float64), equal_nan=True
    )


def test_per_prompt_sorts_by_key():
    metric = BestOfN(ns=(1,))
    metric.update(torch.tensor([[5.0], [1.0], [3.0]]), keys=torch.tensor([50, -10, 30]))
    keys, values = metric.per_prompt()
    assert keys.tolist() == [-10, 30, 50]
    assert values[:, 0].tolist() == [1.0, 3.0, 5.0]


def test_best_of_n_metric_refuses_keys_for_some_updates_only():
    metric = BestOfN(ns=(1,))
    metric.update(torch.zeros(2, 1), keys=torch.tensor([1, 2]))
    metric.update(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="2 of 5 prompts; give them always or never"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_best_of_n_metric_before_any_update_is_nan_and_has_no_prompts():
    metric = BestOfN(ns=(1, 4))
    assert all(value.isnan() for value in metric.compute().values())
    keys, values = metric.per_prompt()
    assert keys.shape == (0,)
    assert values.shape == (0, 2)


def test_best_of_n_metric_resets_pickles_and_restores_its_state():
    metric = BestOfN(ns=(1, 4))
    metric.persistent(True)
    metric.update(ONE_IN_FOUR, keys=torch.tensor([1, 2, 3]))
    expected = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == expected

    restored = BestOfN(ns=(1, 4))
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    restored.update(torch.zeros(1, 4), keys=torch.tensor([4]))
    assert restored.compute()["best_of_4"].item() == pytest.approx(2 / 4)

    metric.reset()
    metric.update(torch.ones(2, 4))
    assert metric.compute()["best_of_1"] == 1.0


@pytest.mark.parametrize("ns", [(), (0, 1), (1, 1), (1.5,), ("4",), (True,)])
def test_best_of_n_metric_names_bad_budgets(ns):
    with pytest.raises(ValueError, match=r"^ns must hold different integers of at least 1"):
        BestOfN(ns=ns)


def test_best_of_n_metric_names_other_bad_arguments():
    with pytest.raises(ValueError, match=r"^extrapolate_ns must hold"):
        BestOfN(extrapolate_ns=(0,))
    with pytest.raises(ValueError, match=r"^alpha must be"):
        BestOfN(alpha=0.0)
    metric = BestOfN()
    with pytest.raises(ValueError, match=r"rewards must have shape \[P, M\]"):
        metric.update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"valid must have shape \(2, 3\)"):
        metric.update(torch.zeros(2, 3), valid=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keys must have shape \(2,\)"):
        metric.update(torch.zeros(2, 3), keys=torch.tensor([1]))


def test_plot_shows_measured_and_extrapolated_budgets_of_each_result():
    metric = BestOfN(ns=(1, 2), extrapolate_ns=(8,))
    metric.update(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
    result = metric.compute()
    figure, axis = metric.plot()
    measured, extrapolated = (line.lines[0] for line in axis.containers)
    assert measured.get_xdata().tolist() == [1, 2] and extrapolated.get_xdata().tolist() == [8]
    assert measured.get_ydata().tolist() == [result["best_of_1"].item(), result["best_of_2"].item()]
    assert extrapolated.get_ydata().tolist() == [result["best_of_8_extrapolated"].item()]
    again, same = metric.plot([result, {key: value + 1 for key, value in result.items()}], ax=axis)
    assert again is figure and same is axis and len(axis.containers) == 6
    plt.close(figure)
