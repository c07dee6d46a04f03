"""Runs of the command line that cost no imports: forked from a process that has done them.

`Zygote` is what tests use; this file run as a script is the process itself. A run ends as any Python program does (exit
handlers, threads, exit code), has a session of its own, and writes stdout and stderr to one file.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Zygote:
    """Starts runs. Use it as a context manager: everything that it started is dead afterwards."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._runs: list[Run] = []

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        for run in self._runs:
            kill_session(run.pid)
        self._process.kill()
        self._process.wait(10)

    def start(self, args: list[str], output: Path, **environment: str) -> "Run":
        """`tealightning ARGS`."""
        run = Run(zygote=self, output=output, pid=self._ask(args=args, output=str(output), environment=environment))
        self._runs.append(run)
        return run

    def exit_code(self, pid: int) -> int | None:
        """None while it runs; negative for a signal."""
        return self._ask(wait=pid)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass(kw_only=True)
class Run:
    """A run that has been started."""

    zygote: Zygote
    output: Path
    pid: int
    exit_code: int | None = None
    ended_at: float = 0.0

    def text(self) -> str:
        """What it has written."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def poll(self) -> int | None:
        if self.exit_code is None:
            self.exit_code = self.zygote.exit_code(self.pid)
            self.ended_at = time.time()
        return self.exit_code

    def wait(self, seconds: float = 400.0) -> int:
        """Its exit code; an assertion that it ends in time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"it still runs:\n{self.text()[-6000:]}"
            time.sleep(0.1)
        assert self.exit_code is not None
        return self.exit_code


def session_members(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, member_of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(member_of) == session and state != "Z":
            found.append(int(folder.name))
    return found


def children_of(supervisor: int) -> list[int]:
    """The processes of the sessions that a process has started, but for Python's resource trackers: they remove what
    the others leave in shared memory when they are killed."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    members = [pid for child in children for pid in session_members(int(child))]
    return [pid for pid in members if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def kill_session(session: int) -> None:
    for pid in session_members(session):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def _serve() -> None:
    """Answers requests; returns in the process of a run."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
                return
        print(json.dumps(answer), flush=True)
    sys.exit(0)


def _become(request: dict[str, Any]) -> None:
    os.setsid()
    os.environ.update(request["environment"])
    with open(request["output"], "ab", buffering=0) as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [str(ROOT / "tealightning" / "__main__.py"), *request["args"]]  # what Lightning starts other ranks with


if __name__ == "__main__":
    import faulty  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import torch.distributed  # noqa: F401

    import tealightning.cli.training  # noqa: F401
    from tealightning.cli import main

    _serve()
    main()
