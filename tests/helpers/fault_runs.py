"""What fault tests of whole runs share: how a run is started, and what its end has to be like."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ranks import free_port
from run_records import quickstart_args
from zygote import Run, Zygote, session_members

HELPERS = Path(__file__).parent
MINUTE = 60.0
SLACK = 5.0  # of a busy machine; a hang that nothing ends takes longer

Fit = Callable[..., list[Run]]


def fits(zygote: Zygote, playground: Path, out: Path) -> Fit:
    """Starts `tealightning fit` on so many ranks; with `launcher` rank 0 starts the others, as Lightning does it."""

    def start(*args: str, world_size: int = 1, launcher: bool = False, **trainer: Any) -> list[Run]:
        if world_size > 1:
            trainer |= {"devices": world_size, "strategy": "ddp"}
        settings = quickstart_args("fit", playground, out, **trainer | {"max_steps": 6, "enable_checkpointing": True})
        # Without probes of the weights, which are uses of an engine too: the faults are to come in a given step.
        command = [*settings, "--rollout.max_probe_diff=.inf", *args, "--import", str(HELPERS / "faulty.py")]
        folder = Path(tempfile.mkdtemp(dir=out, prefix="output-"))
        port = str(free_port())
        if launcher or world_size == 1:
            return [zygote.start(command, folder / "rank0.txt", MASTER_PORT=port)]
        place = {"WORLD_SIZE": str(world_size), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            zygote.start(command, folder / f"rank{rank}.txt", LOCAL_RANK=str(rank), **place)
            for rank in range(world_size)
        ]

    return start


def faulty_engine(fault: str, where: str, rank: int = 0) -> list[str]:
    settings = {"fault": fault, "where": where, "rank": rank}
    return ["--rollout.engine=FaultyEngine", *(f"--rollout.engine.{name}={value}" for name, value in settings.items())]


def faulty_backward(fault: str, rank: int = 0) -> dict[str, Any]:
    arguments = {"fault": fault, "rank": rank}
    return {"callbacks": [{"class_path": "faulty.FaultyBackward", "init_args": arguments}]}


def injected_at(*runs: Run) -> float:
    """The time of the one fault in these runs."""
    times = [float(at) for run in runs for at in re.findall(r"^FAULT (\S+)", run.text(), re.MULTILINE)]
    assert len(times) == 1, "\n".join(run.text()[-4000:] for run in runs)
    return times[0]


def ends_within_a_minute(runs: list[Run], limit: float = 0.0) -> None:
    """All of them end with an error a minute after the fault, `limit` seconds of which a deadline takes, and leave no
    process."""
    for run in runs:
        assert run.wait() != 0, run.text()[-4000:]
    at = injected_at(*runs)
    for run in runs:
        assert run.ended_at - at < (MINUTE + limit) * SLACK
    soon(lambda: not any(session_members(run.pid) for run in runs))


def goes_on(fit: Fit, run: Run, *, step: int = 2, world_size: int = 1, engine: list[str] | None = None) -> None:
    """The last completed step was saved, and the run can be taken to its end from there."""
    assert re.search(rf"Step {step} is saved in \S+step=00000{step}\.ckpt", run.text()), run.text()[-4000:]
    resumed = fit(*(engine or faulty_engine("raise", "never")), "--ckpt_path=last", world_size=world_size)
    for one in resumed:
        assert one.wait() == 0, one.text()[-4000:]
    assert "`Trainer.fit` stopped: `max_steps=6` reached." in resumed[0].text()


def soon(happens: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def left_in_shared_memory() -> set[str]:
    """What no living process uses: other runs on this machine may have theirs there."""
    used = "\n".join(_mapped_and_open(Path("/proc")))
    left = set()
    for entry in Path("/dev/shm").iterdir():
        owner = re.match(r"tealightning-weights-(\d+)-", entry.name)
        if entry.name.startswith("sem."):  # of a killed process; its session's resource tracker removes them at the end
            continue
        is_used = Path(f"/proc/{owner[1]}").exists() if owner else entry.is_dir() or str(entry) in used
        if not is_used:
            left.add(entry.name)
    return left


def _mapped_and_open(processes: Path) -> Iterator[str]:
    for process in processes.glob("[0-9]*"):
        try:
            yield (process / "maps").read_text()
            yield from (os.readlink(file) for file in (process / "fd").iterdir())
        except OSError:  # it has ended, or the file was closed
            continue
