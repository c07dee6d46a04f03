"""Runs of `tealightning fit` on the tiny playground that are killed, stopped and resumed, in processes of their own.

The processes are forked from a server that has imported everything once, as the ablation runner's are: a start then
costs a second or two instead of ten, and a SIGKILL is one.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from ranks import free_port

HELPERS = Path(__file__).parent
PROSE = HELPERS.parents[1] / "configs" / "experiments" / "prose.yaml"
_CONTEXT = multiprocessing.get_context("forkserver")
# Only what an interpreter finds by itself: a module that it does not find is passed over without a word.
_CONTEXT.set_forkserver_preload(
    ["datasets", "lightning.pytorch", "transformers.models.auto.modeling_auto", "tealightning.cli.training"]
)


@dataclass(kw_only=True, slots=True)
class Ended:
    codes: list[int]  # of each rank: -9 after SIGKILL
    text: str  # stdout and stderr of all

    @property
    def status(self) -> int:
        """Of the first rank that did not end well, 0 if all did."""
        return next((code for code in self.codes if code), 0)


class Run:
    """One configuration, whose runs are started again and again.

    Args:
        folder: For its config, its logs and `steps.<rank>.jsonl` (what each step trained on).
        ranks: Processes (gloo).
        settings: Laid over the configuration.
    """

    def __init__(self, playground: Path, folder: Path, *, ranks: int = 1, **settings: Any) -> None:
        self.folder = folder
        self.ranks = ranks
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(_merged(_config(playground, folder, ranks), settings)), encoding="utf-8")

    @property
    def args(self) -> list[str]:
        return ["fit", "-c", str(PROSE), "-c", str(self.config), "--import", str(HELPERS / "fault_plan.py")]

    def start(self, *more: str, fault: dict[str, Any] | None = None) -> "Started":
        """Start the processes; `fault` is what goes wrong (see `fault_plan`)."""
        self.starts += 1
        log = self.folder / f"log_{self.starts:03d}"
        environment = {"FAULT": json.dumps(fault or {}), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if self.ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
            environment |= {"WORLD_SIZE": str(self.ranks)}
        processes = []
        for rank in range(self.ranks):
            own = environment | ({"LOCAL_RANK": str(rank)} if self.ranks > 1 else {})
            process = _CONTEXT.Process(target=_main, args=([*self.args, *more], own, f"{log}.{rank}"))
            process.start()
            processes.append(process)
        return Started(processes, log)

    def fit(self, *more: str, fault: dict[str, Any] | None = None, timeout: float = 240.0) -> Ended:
        """Start, and wait for the end."""
        return self.start(*more, fault=fault).wait(timeout)

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """What each step trained on, in the order of steps; of one that was repeated, the last time."""
        lines = (self.folder / f"steps.{rank}.jsonl").read_text(encoding="utf-8").splitlines()
        last = {record["step"]: record for record in map(json.loads, lines)}
        return [last[step] for step in sorted(last)]

    def validations(self) -> dict[int, float]:
        """Optimizer step -> what was measured; of one that was repeated, the last time."""
        lines = (self.folder / "validations.jsonl").read_text(encoding="utf-8").splitlines()
        return {record["global_step"]: record["best_of_4"] for record in map(json.loads, lines)}

    def policy(self) -> str:
        """Hash of the weights that the newest finished run has exported."""
        file = max(self.folder.glob("*/policy/model.safetensors"), key=lambda path: path.stat().st_mtime)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def checkpoints(self) -> list[Path]:
        """Of all starts, the newest first."""
        return sorted(self.folder.glob("version_*/checkpoints/*.ckpt"), key=_number, reverse=True)


class Started:
    """Processes of one start; of more than one rank."""

    def __init__(self, processes: list[Any], log: Path) -> None:
        self.processes = processes
        self.log = log

    def text(self) -> str:
        files = [Path(f"{self.log}.{rank}") for rank in range(len(self.processes))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    def wait(self, timeout: float = 240.0) -> Ended:
        """Until all have ended; the others of a rank that was killed are given time to notice, then killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} processes did not end in {timeout:g} s:\n{self.text()[-4000:]}"
        return Ended(codes=[process.exitcode for process in self.processes], text=self.text())

    def kill(self) -> Ended:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        return self.wait()

    def signal(self, signum: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, signum)

    def wait_for(self, file: Path, timeout: float = 200.0) -> None:
        """Until the file is there."""
        self._wait_until(file.exists, str(file), timeout)

    def wait_for_text(self, text: str, timeout: float = 200.0) -> None:
        """Until a rank has said this."""
        self._wait_until(lambda: text in self.text(), repr(text), timeout)

    def _wait_until(self, is_there: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not is_there():
            assert time.monotonic() < deadline, f"no {what} after {timeout:g} s:\n{self.text()[-4000:]}"
            assert any(process.is_alive() for process in self.processes), self.text()[-4000:]
            time.sleep(0.02)


def finished(run: Run, **kwargs: Any) -> Run:
    """The run, gone on with until its end."""
    ended = run.fit("--ckpt_path", "last", **kwargs)
    assert ended.status == 0, ended.text[-4000:]
    return run


def assert_same(run: Run, unbroken: Run) -> None:
    """Same prompts, tokens, random numbers and counts at every step, same evaluations, and the same final bits."""
    for rank in range(run.ranks):
        assert run.steps(rank) == unbroken.steps(rank)
    assert run.validations() == unbroken.validations()
    assert run.policy() == unbroken.policy()
    one, other = (torch.load(r.checkpoints()[0], weights_only=True) for r in (run, unbroken))
    assert one["global_step"] == other["global_step"]
    for key in ("state_dict", "optimizer_states"):
        tensors = [tensors_of(checkpoint[key]) for checkpoint in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)), key


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors_of(item)]


def _main(args: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False, buffering=1), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["tealightning", *args]
    from tealightning.cli import main

    main(args)


def _number(path: Path) -> tuple[int, str]:
    return int(path.parts[-3].rpartition("_")[2]), path.name


def _config(playground: Path, folder: Path, ranks: int) -> dict[str, Any]:
    prompts = playground / "prompts"
    return {
        "model": {
            "init_args": {"policy": str(playground / "policy"), "ns": [1, 4], "estimator": {"class_path": "grpo"}}
        },
        "data": {
            "init_args": {
                "train": f"{prompts / 'train.jsonl'}@[:{20 * ranks}]",  # 5 steps an epoch, in random order
                "val": f"{prompts / 'val.jsonl'}@[:{6 * ranks}]",
                "test": None,
                "batch_size": 4,
            }
        },
        "rollout": {
            "engine": {"class_path": "copying_engine"},
            "reward": {"init_args": {"model": str(playground / "reward_model")}},
            "group_size": 4,
            "sampling": {"max_new_tokens": 8},
        },
        "checkpoint": {"every_n_steps": 2},
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            "max_steps": 12,
            "num_sanity_val_steps": 1,
            "val_check_interval": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": ""},
            },
            "callbacks": [
                {"class_path": "tealightning.Budget"},
                {"class_path": "tealightning.ExportPolicy"},
                {"class_path": "fault_plan.FaultPlan", "init_args": {"folder": str(folder)}},
            ],
        },
    }


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}
