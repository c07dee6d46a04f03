"""Faults on purpose, in a run of the command line: `--import faulty.py --rollout.engine=FaultyEngine ...`."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from zygote import children_of

from tealightning import register
from tealightning.rollouts import VLLMEngine, VLLMServerEngine
from tealightning.rollouts.transformers import TransformersEngine


def _hang_in_python() -> None:
    while True:
        time.sleep(0.1)


def _hang_in_c(library: Any) -> None:
    """Locks a mutex twice: unlike a sleep, a signal does not end it."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def _raise(error: Exception) -> None:
    raise error


def _fail_with_a_thread_that_hangs() -> None:
    ThreadPoolExecutor(1).submit(_hang_in_python)  # which the interpreter waits for when it exits
    raise KeyError("something that nobody expected")


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": lambda: _raise(KeyError("something that nobody expected")),
    "memory": lambda: _raise(MemoryError("no memory left")),
    "hang": _hang_in_python,
    "raise_and_hang": _fail_with_a_thread_that_hangs,
    "hang_in_c": lambda: _hang_in_c(ctypes.CDLL(None)),  # releases the interpreter's lock, as a collective does
    "hang_with_lock": lambda: _hang_in_c(ctypes.PyDLL(None)),  # keeps it
}


class Fault:
    """Happens once, at the `after`-th call on one rank."""

    def __init__(self, fault: str, rank: int, after: int) -> None:
        self.fault, self.rank, self.left = FAULTS[fault], rank, after

    def __call__(self) -> None:
        mine = dist.get_rank() if dist.is_initialized() else 0
        self.left -= 1
        if mine == self.rank and self.left == 0:
            print(f"FAULT {time.time()}", flush=True)
            self.fault()


@register
class FaultyEngine(TransformersEngine):
    """Samples with the policy, and fails at its third use.

    Args:
        fault: One of `FAULTS`.
        where: "generate" or "sync": a sync is a collective of all ranks.
        rank: Which rank fails.
        after: At which use.
    """

    shares_weights = False

    def __init__(self, fault: str = "raise", where: str = "generate", rank: int = 0, after: int = 3) -> None:
        super().__init__()
        self.where, self._fault = where, Fault(fault, rank, after)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.where == "generate":
            self._fault()
        return super().generate(*args, **kwargs)

    def sync_weights(self, weights: Any) -> None:
        if self.where == "sync":
            self._fault()
        if dist.is_initialized():
            dist.barrier()


@register
class FaultyVLLMEngine(VLLMEngine):
    """vLLM whose model runner is out of memory from its third use on."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._uses = getattr(self, "_uses", 0) + 1
        if self._uses == 3:
            print(f"FAULT {time.time()}", flush=True)
            self._llm.collective_rpc(_break_model_runner)
        return super().generate(*args, **kwargs)


def _break_model_runner(worker: Any) -> None:
    def execute_model(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    worker.model_runner.execute_model = execute_model


@register
class FaultyServerEngine(VLLMServerEngine):
    """Sends a signal to all processes of its server just before its third use.

    Args:
        number: Of the signal.
        where: "generate" or "sync".
        pids: Of the server's processes, comma-separated; empty = those of the server that this engine has started.
    """

    def __init__(self, number: int = 9, where: str = "generate", pids: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.number, self.where, self.pids = number, where, pids
        self._uses = {"generate": 0, "sync": 0}

    def generate_each(self, *args: Any, **kwargs: Any) -> Any:
        self._use("generate")
        return super().generate_each(*args, **kwargs)

    def sync_weights(self, weights: Any) -> None:
        self._use("sync")
        super().sync_weights(weights)

    def _use(self, where: str) -> None:
        self._uses[where] += 1
        if where == self.where and self._uses[where] == 3:
            pids = [int(pid) for pid in self.pids.split(",")] if self.pids else children_of(self._server._process.pid)
            print(f"FAULT {time.time()} {' '.join(map(str, pids))}", flush=True)
            for pid in pids:
                os.kill(pid, self.number)


class FaultyBackward(Callback):
    """Fails in the third backward pass."""

    def __init__(self, fault: str, rank: int = 1, after: int = 3) -> None:
        self._fault = Fault(fault, rank, after)

    def on_before_backward(self, *args: Any) -> None:
        self._fault()
