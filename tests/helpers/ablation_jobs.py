"""Jobs that do what their configuration says, in processes of their own: a module, so that they can be sent there."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tealightning.ablation.plan import Job
from tealightning.ablation.worker import RECORD, write_json


def job_of(folder: Path, name: str, **config: Any) -> Job:
    """A job whose `act` does `config["does"]`: finish, raise, exit, kill, once (raise at the first attempt), sleep."""
    return Job(kind="fit", variant=name, seed=0, config=config, hash=f"hash-{name}", folder=folder / name)


def act(job: Job, send: Any) -> None:
    """Do what the job's configuration says."""
    does = job.config.get("does", "finish")
    with (job.folder / "attempts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    send({"phase": "training", "done": 1, "total": 2, "reward": 0.5})
    print(f"{job.variant} says hello")
    if does == "sleep":
        time.sleep(job.config["seconds"])
    if does == "raise" or (does == "once" and len((job.folder / "attempts").read_text().split()) == 1):
        raise ValueError("this one is meant to fail")
    if does == "exit":
        os._exit(7)
    if does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(job.folder / RECORD, {"status": "finished", "hash": job.hash, "wall_seconds": 1.0})


def main() -> None:
    """Run one job that sleeps: for a test that kills this process. Arguments: folder, seconds."""
    from tealightning.ablation.runner import run_jobs

    run_jobs([job_of(Path(sys.argv[1]), "sleeper", does="sleep", seconds=float(sys.argv[2]))], act, environments=[{}])


if __name__ == "__main__":
    import ablation_jobs  # under its own name, by which the run's process finds `act`

    ablation_jobs.main()
