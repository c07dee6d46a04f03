"""Isolate vLLM in the trainer's process: undo what it does to its host, keep it to its device."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng

from tealightning.errors import UserError


@contextmanager
def contained(device: torch.device) -> Iterator[None]:
    """Undo what vLLM does to its host: it seeds and draws from the global generators, replaces
    `torch.set_num_threads`, sets environment variables that processes started later would inherit, and warns.

    Lightning evaluates in inference mode, and tensors made in it could not be updated by a sync in training: there is
    none inside."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = dict(os.environ)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"
    rng = isolate_rng(include_cuda=device.type == "cuda")
    with torch.inference_mode(False), torch.no_grad(), rng, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            for name in set(os.environ) - set(environment):
                if not name.startswith("VLLM_"):  # its own, which it may read again
                    del os.environ[name]
            os.environ.update(environment)


def placement(device: torch.device) -> dict[str, Any]:
    """Arguments with which each rank's engine runs alone on that rank's GPU."""
    if device.type != "cuda":
        return {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        # vLLM's way to live in processes that something else launched; it finds its place in these variables.
        os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(device.index or 0))
        return {"distributed_executor_backend": "external_launcher"}
    if device.index:
        raise UserError(f"vLLM uses the first visible GPU and the policy is on {device}: set CUDA_VISIBLE_DEVICES.")
    return {}
