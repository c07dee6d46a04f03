"""Keeps what vLLM does to the process that it runs in inside of it."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def contained(device: torch.device) -> Iterator[None]:
    """Undo what vLLM does to its host: it seeds and draws from the global generators, replaces
    `torch.set_num_threads`, sets environment variables that processes started later would inherit, and warns."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = dict(os.environ)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"
    with isolate_rng(include_cuda=device.type == "cuda"), warnings.catch_warnings():
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
