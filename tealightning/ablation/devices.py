"""Decide how many runs go at a time, on which devices, and what their processes import beforehand."""

import os
from collections.abc import Sequence

import torch

from tealightning.ablation.plan import Job

_COMMON = ("tealightning.cli.training", "tealightning.ablation.worker", "datasets", "transformers.models.llama")


def environments_of(workers: int | None) -> list[dict[str, str]]:
    """Environment variables of each worker: a GPU of its own where there are some, else a share of the CPU's cores.

    Args:
        workers: Runs at a time; None = one a GPU, or one a core with one thread each.
    """
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == gpus else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % gpus]} for i in range(workers or gpus)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    return [{"OMP_NUM_THREADS": threads} for _ in range(workers)]


def preloaded(jobs: Sequence[Job]) -> list[str]:
    """Modules that the runs import anyway: seconds each, once for all of them."""
    engines = {job.config["rollout"]["engine"]["class_path"].rpartition(".")[2] for job in jobs}
    return [*_COMMON, *(["vllm"] if "VLLMEngine" in engines else [])]
