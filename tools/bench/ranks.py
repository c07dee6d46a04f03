"""Starts the ranks of a data-parallel run on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("rank.py")


def step_seconds(processes: int, options: dict[str, Any]) -> list[float]:
    """Wall-clock seconds of the recorded steps of `processes` ranks, each with a share of the prompts.

    Raises:
        RuntimeError: if a rank fails.
    """
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), json.dumps(options)],
            env=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [rank.communicate() for rank in ranks]
    for rank, (process, (_, errors)) in enumerate(zip(ranks, outputs, strict=True)):
        if process.returncode != 0:
            raise RuntimeError(f"rank {rank} of {processes} failed:\n{errors[-4000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
