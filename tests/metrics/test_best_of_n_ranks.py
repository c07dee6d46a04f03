"""BestOfN over two real processes."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tealightning.metrics import BestOfN
from tealightning.metrics.prompt_samples import PromptSamples

REWARDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEYS = torch.tensor([2**60 + 4, 3, 2**60 + 2, 1, 0])  # more digits than a float has
NS = (1, 4, 8)


class SampleCount(PromptSamples):
    """A metric of a user, who pools in `compute`."""

    def compute(self) -> torch.Tensor:
        return self.pooled()[1].isfinite().sum()


def evaluate(rank: int, port: int, folder: str) -> None:
    """Three cases on one rank: uneven shares, a rank without updates, prompts without keys."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for case in ("uneven", "empty", "no keys"):
        metric = BestOfN(ns=NS)
        shares = {
            "uneven": (range(0, 2), range(2, 5)),
            "empty": (range(5), range(0)),
            "no keys": (range(3), range(3, 5)),
        }
        for row in shares[case][rank]:
            width = 8 if row else 6  # ragged
            keys = None if case == "no keys" else KEYS[row : row + 1]
            metric.update(REWARDS[row : row + 1, :width], keys=keys)
        per_prompt = metric.per_prompt()
        local = sum(int(counts.numel()) for counts in metric.counts)  # unsynced again
        results[case] = (metric.compute(), per_prompt, local)
    count = SampleCount()
    count.update(REWARDS[rank : rank + 1])
    assert int(count.compute()) == 16  # of both ranks
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_best_of_n_metric_agrees_on_all_ranks_and_with_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(evaluate, args=(port, str(tmp_path)), nprocs=2)
    alone = BestOfN(ns=NS)
    alone.update(REWARDS[:1, :6], keys=KEYS[:1])
    alone.update(REWARDS[1:], keys=KEYS[1:])
    keys, values = alone.per_prompt()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, results in enumerate(ranks):
        for case, (result, (found_keys, found_values), local) in results.items():
            torch.testing.assert_close(result, alone.compute(), rtol=1e-12, atol=0)
            assert local == {"uneven": (2, 3), "empty": (5, 0), "no keys": (3, 2)}[case][rank]
            if case != "no keys":
                assert torch.equal(found_keys, keys)
                torch.testing.assert_close(found_values, values, rtol=0, atol=0, equal_nan=True)
            else:
                assert found_keys.tolist() == [0, 1, 2, 3, 4]
