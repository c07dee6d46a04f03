"""Run what is missing of an ablation: a process per run, several at a time, each on its own device."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich import progress
from rich.console import Console

from tealightning.ablation.plan import Job
from tealightning.ablation.worker import Send, describe, read_record

Target = Callable[[Job, Send], Any]
"""Does a job, in a process of its own; a function of a module, so that it can be sent there."""

STOP_SECONDS = 10.0
_CPU_TIMES = Path("/proc/stat")


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How a job ended."""

    status: str  # "finished", "failed" or "missing"
    error: str | None = None
    record: dict[str, Any] = field(default_factory=dict)  # run.json


@dataclass(slots=True)
class _Running:
    job: Job
    attempt: int
    environment: dict[str, str]
    process: Any
    connection: Connection
    task: progress.TaskID  # its bar
    phase: dict[str, Any] = field(default_factory=dict)  # the last message with one
    activity: str = ""
    error: str | None = None

    @property
    def note(self) -> str:
        """What it is at, behind its bar: `training, reward 0.512: generating`."""
        reward = f", reward {self.phase['reward']:.3f}" if "reward" in self.phase else ""
        phase = self.phase.get("phase", "")
        return ": ".join(filter(None, [phase + reward, self.activity.removeprefix(phase)])) or "starting"


def outcome_of(job: Job) -> Outcome:
    """The outcome that the job's folder records; a record of another configuration counts as none."""
    record = read_record(job.folder)
    if record is None or record.get("hash") != job.hash:
        return Outcome(status="missing")
    return Outcome(status=record["status"], error=record.get("error"), record=record)


def unfinished_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are still to be run: also those that failed before."""
    return [job for job in jobs if outcome_of(job).status != "finished"]


def environments_of(workers: int | None) -> list[dict[str, str]]:
    """Environment variables of each worker: a GPU of its own where there are some, else a share of the CPU's cores;
    without a number of workers one a GPU, or one a core that is free, with one thread each."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == gpus else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % gpus]} for i in range(workers or gpus)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Sums and with them samples depend on the number of threads: it does not depend on what else is running.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (workers or cores)))
    return [{"OMP_NUM_THREADS": threads}] * (workers or max(1, round(cores * _idle_share())))


def _idle_share(seconds: float = 1.0) -> float:
    """Of the CPU's time, now; 1 where the system does not tell. A run that shares its core takes twice as long, and
    its deadlines are those of one that does not."""
    if not _CPU_TIMES.exists():
        return 1.0

    def times() -> tuple[int, int]:
        user, nice, system, idle, waiting, *others = map(int, _CPU_TIMES.read_text().split("\n", 1)[0].split()[1:9])
        return idle + waiting, sum((user, nice, system, idle, waiting, *others))

    before, start = times()
    time.sleep(seconds)
    after, end = times()
    return (after - before) / max(1, end - start)


def modules_to_preload(jobs: Sequence[Job]) -> list[str]:
    """Modules that the runs import anyway: seconds each, once for all of them."""
    modules = ["tealightning.cli.training", "tealightning.ablation.worker", "datasets", "transformers.models.llama"]
    engines = {job.config["rollout"]["engine"]["class_path"].rpartition(".")[2] for job in jobs}
    return [*modules, *(["vllm"] if "VLLMEngine" in engines else [])]


def run_jobs(
    jobs: Sequence[Job],
    target: Target,
    *,
    environments: Sequence[dict[str, str]],
    retries: int = 0,
    preload: Sequence[str] = (),
) -> dict[Path, Outcome]:
    """Run the jobs in order; one that fails is tried again `retries` times and never stops the others.

    Processes are forked from one that has imported `preload` already, which saves the imports of every run. They end
    when this process does, however it ends. A KeyboardInterrupt ends them; runs that had finished count.

    As many run at a time as there are `environments`: variables such as the device that a run may use. The outcomes
    are by folder.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    queue, free = deque((job, 1) for job in jobs), deque(environments)
    running: list[_Running] = []
    outcomes: dict[Path, Outcome] = {}
    try:
        with _bars() as bars:
            all_runs = bars.add_task("all runs", total=len(jobs), note="loading libraries")
            while queue or running:
                while queue and free:
                    job, attempt = queue.popleft()
                    environment = free.popleft()
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_child, args=(job, target, theirs, environment), daemon=False)
                    process.start()
                    theirs.close()
                    bars.update(all_runs, note="")
                    task = bars.add_task(f"  {job.title}", total=None, note="starting")
                    running.append(_Running(job, attempt, environment, process, ours, task))
                for done in _watch(running, bars):
                    running.remove(done)
                    free.append(done.environment)
                    bars.remove_task(done.task)
                    outcome = _outcome(done)
                    result = f"{outcome.record.get('wall_seconds', 0.0):.0f} s"
                    if outcome.status != "finished":
                        result = f"FAILED: {outcome.error}"
                        if done.attempt <= retries:
                            queue.appendleft((done.job, done.attempt + 1))
                            bars.console.print(f"{done.job.title}: tried again, {result}", soft_wrap=True)
                            continue
                    outcomes[done.job.folder] = outcome
                    bars.update(all_runs, completed=len(outcomes))
                    bars.console.print(f"[{len(outcomes)}/{len(jobs)}] {done.job.title}: {result}", soft_wrap=True)
    finally:
        _stop(running)
    return outcomes


def _bars() -> progress.Progress:
    """A bar for all runs and one for each that is running, on a terminal."""
    console = Console(file=sys.stdout, markup=False, highlight=False)
    title, note = (progress.TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (title, progress.BarColumn(bar_width=30), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    remaining = progress.TimeRemainingColumn()
    return progress.Progress(*columns, remaining, note, console=console, disable=not console.is_terminal)


def _watch(running: Sequence[_Running], bars: progress.Progress) -> list[_Running]:
    """Pass on the messages of the processes; returns those that have ended."""
    wait([r.process.sentinel for r in running] + [r.connection for r in running if not r.connection.closed], 1.0)
    for one in running:
        try:
            while not one.connection.closed and one.connection.poll():
                message = one.connection.recv()
                one.error = message.get("error", one.error)
                one.activity = message.get("activity", one.activity)
                if "phase" in message:
                    one.phase = message
                    bars.update(one.task, completed=message["done"], total=message["total"])
                bars.update(one.task, note=one.note)
        except (EOFError, OSError):
            one.connection.close()
    return [one for one in running if one.process.exitcode is not None]


def _outcome(done: _Running) -> Outcome:
    done.process.join()
    done.connection.close()
    outcome, code = outcome_of(done.job), done.process.exitcode
    if code == 0 and outcome.status == "finished":
        return outcome
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    error = done.error or (outcome.error if outcome.status == "failed" else None)
    return Outcome(status="failed", error=error or f"The process was {ended}; see {done.job.folder / 'log.txt'}.")


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for one in running:
        one.process.join(max(0.1, deadline - time.monotonic()))
        if one.process.is_alive():
            one.process.kill()
            one.process.join()


def _child(job: Job, target: Target, connection: Connection, environment: dict[str, str]) -> None:
    """The process of a run; what it prints goes to the run's `log.txt`."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its runs itself
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()

    one_at_a_time = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), one_at_a_time:
            connection.send(message)

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(job.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        target(job, send)
    except BaseException as error:  # whatever it was, the parent hears of it, and goes on with the others
        send({"error": describe(error)})
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines may have left threads that are not worth waiting for


def _end_with_parent(connection: Connection) -> None:
    """The parent never writes, so reading ends when it is gone."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
