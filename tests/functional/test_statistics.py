import pytest
import torch

from tealightning.functional.statistics import mean_over_prompts, paired_difference

NAN = float("nan")


def test_mean_over_prompts_ignores_nan_prompts():
    estimate = mean_over_prompts(torch.tensor([[1.0, NAN], [2.0, 5.0], [6.0, NAN]]))
    assert estimate.mean.tolist() == [3.0, 5.0]
    assert estimate.num_prompts.tolist() == [3, 1]
    assert estimate.standard_error[0].item() == pytest.approx((7 / 3) ** 0.5)  # variance 7
    assert estimate.standard_error[1].isnan()


def test_mean_over_no_prompts_is_nan():
    estimate = mean_over_prompts(torch.zeros(0, 2))
    assert estimate.mean.isnan().all()
    assert estimate.num_prompts.tolist() == [0, 0]


def test_paired_difference_matches_prompts_by_key():
    before = (torch.tensor([7, 3, 5]), torch.tensor([[10.0], [1.0], [100.0]]))
    after = (torch.tensor([3, 9, 7]), torch.tensor([[2.0], [50.0], [13.0]]))
    difference, standard_error, num_prompts = paired_difference(before, after)
    assert difference.tolist() == [2.0]  # 3 on prompt 7 and 1 on prompt 3
    assert standard_error.item() == pytest.approx(1.0)
    assert num_prompts.tolist() == [2]


def test_paired_difference_leaves_out_prompts_that_either_run_could_not_measure():
    keys = torch.tensor([1, 2, 3])
    estimate = paired_difference((keys, torch.tensor([1.0, NAN, 3.0])), (keys, torch.tensor([2.0, 2.0, NAN])))
    assert estimate.mean.item() == 1.0
    assert estimate.num_prompts.item() == 1


def test_paired_difference_has_a_smaller_error_than_unpaired_means():
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.randn(200, generator=generator)
    keys = torch.arange(200)
    before = difficulty + 0.1 * torch.randn(200, generator=generator)
    after = difficulty + 0.1 * torch.randn(200, generator=generator)
    paired = paired_difference((keys, before), (keys, after)).standard_error
    assert paired < 0.2 * mean_over_prompts(before).standard_error


def test_paired_difference_refuses_repeated_keys_and_other_columns():
    keys = torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"before .* no key twice"):
        paired_difference((keys, torch.zeros(2)), (torch.tensor([1, 2]), torch.zeros(2)))
    with pytest.raises(ValueError, match="same columns"):
        paired_difference((torch.tensor([1]), torch.zeros(1, 2)), (torch.tensor([1]), torch.zeros(1, 3)))
