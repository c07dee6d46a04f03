"""Peak memory of this process or of a GPU, in MiB."""

import ctypes
import sys
from pathlib import Path

import torch


def check_peaks(device: str) -> None:
    """End the program where a CPU's peak cannot be read."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("A CPU's peak memory is measured through /proc/self, which only Linux has.")


def reset_peak(device: torch.device) -> float:
    """Memory in use now, from which the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed earlier and the allocator kept
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return peak_mib(device)


def peak_mib(device: torch.device) -> float:
    """The most that was in use since the last reset; waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
