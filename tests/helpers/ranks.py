"""Runs a script once per rank, as a launcher would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: Path, *args: str, world_size: int = 2, timeout: float = 240.0) -> None:
    """Run `python script *args` on every rank of a group on this machine; any rank that fails, fails the test."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *args],
            env=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {script.name}:\n{output[-4000:]}"
