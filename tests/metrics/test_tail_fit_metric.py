import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port

from tealightning.functional.tail_checks import check_tail, summarise
from tealightning.metrics import TailFit
from tealightning.metrics.tail_fit import KEYS

REWARDS = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEY = torch.arange(24) * 2**57


def metric_of(*parts, **kwargs):
    metric = TailFit(**kwargs)
    for rewards, keys in parts:
        metric.update(rewards, keys=keys)
    return metric


def test_tail_fit_is_the_functions_summary():
    found = metric_of((REWARDS, KEY), m=8, alpha=0.5).compute()
    expected = summarise(check_tail(REWARDS, m=8, alpha=0.5))
    assert tuple(found) == KEYS == tuple(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(value.dtype == torch.float64 and value.shape == () for value in found.values())


def test_tail_fit_pools_samples_of_one_prompt_whatever_their_order():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    first = (REWARDS[:, :20].flip(1), KEY)
    rest = (REWARDS[order, 20:], KEY[order])
    torch.testing.assert_close(metric_of(rest, first).compute(), metric_of((REWARDS, KEY)).compute(), rtol=0, atol=0)


def test_tail_fit_leaves_unscorable_samples_out():
    rewards = torch.cat([REWARDS, torch.full((24, 3), float("nan"), dtype=torch.float64)], dim=1)
    torch.testing.assert_close(metric_of((rewards, KEY)).compute(), metric_of((REWARDS, KEY)).compute())


@pytest.mark.parametrize(("width", "missing"), [(32, ()), (31, ("prediction", "coverage"))])
def test_tail_fit_has_no_key_for_what_m_is_too_small_for(width, missing):
    found = metric_of((REWARDS[:, :width], KEY)).compute()
    assert list(found) == [key for key in KEYS if not any(word in key for word in missing)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_tail_fit_before_any_update_is_nan():
    found = TailFit().compute()
    assert tuple(found) == KEYS and all(value.isnan() for value in found.values())


def test_tail_fit_of_unscorable_samples_only_is_nan():
    found = metric_of((torch.full((3, 32), float("nan")), None)).compute()
    assert tuple(found) == KEYS and all(value.isnan() for value in found.values())


def test_tail_fit_resets_and_pickles():
    metric = metric_of((REWARDS, KEY))
    expected = metric.compute()
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), expected, rtol=0, atol=0)
    metric.reset()
    metric.update(REWARDS[:, :16])
    assert "tail_coverage" not in metric.compute()


@pytest.mark.parametrize("m", [4, 16.0, True])
def test_tail_fit_names_a_bad_m(m):
    with pytest.raises(ValueError, match=r"^m must be an integer of at least 5, got"):
        TailFit(m=m)


def test_tail_fit_tests_the_share_that_it_is_told():
    found = metric_of((REWARDS, KEY), tested_share=0.25).compute()
    torch.testing.assert_close(found, summarise(check_tail(REWARDS, tested_share=0.25)), rtol=0, atol=0)
    assert found["tail_shape"] != metric_of((REWARDS, KEY)).compute()["tail_shape"]
    with pytest.raises(ValueError, match=r"^tested_share must be a number in \(0, 1\], got 0"):
        TailFit(tested_share=0)


def test_tail_fit_names_a_bad_alpha():
    with pytest.raises(ValueError, match=r"^alpha must be a number in \(0, 1\].* got 1.5"):
        TailFit(alpha=1.5)


def evaluate(rank: int, port: int, folder: str) -> None:
    """Prompts are split unevenly, and the samples of one of them over both ranks; then a rank without updates."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shared = metric_of(
        *(((REWARDS[:5, :40], KEY[:5]),) if rank else ((REWARDS[5:], KEY[5:]), (REWARDS[:5, 40:], KEY[:5])))
    )
    alone = metric_of(*(((REWARDS, KEY),) if rank else ()))
    torch.save((shared.compute(), alone.compute()), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_tail_fit_agrees_on_all_ranks_and_with_one_process(tmp_path):
    mp.spawn(evaluate, args=(free_port(), str(tmp_path)), nprocs=2)
    expected = metric_of((REWARDS, KEY)).compute()
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
