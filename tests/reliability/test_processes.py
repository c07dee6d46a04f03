"""A process and what it starts end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tealightning.reliability import processes
from tealightning.reliability.processes import LocalServer

# Prints its process id and that of a child. The child ignores SIGTERM, as an engine does that is busy.
FAMILY = """
import os, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
PARENT = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("processes", {processes.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
server = module.LocalServer([sys.executable, "-c", {FAMILY!r}], dict(os.environ))
print(server.log_file, flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def family(log_file):
    """The two process ids, once they are printed."""
    assert wait_for(lambda: len(log_file.read_text().split()) == 2)
    return [int(pid) for pid in log_file.read_text().split()]


def test_local_server_ends_with_its_children_on_close(tmp_path):
    log_file = tmp_path / "server.log"
    server = LocalServer([sys.executable, "-c", FAMILY], dict(os.environ), log_file)
    pids = family(log_file)
    assert all(map(alive, pids)) and server.exit_code() is None
    server.close()
    server.close()
    assert wait_for(lambda: not any(map(alive, pids)))
    assert server.exit_code() is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_local_server_ends_with_a_parent_that_is_killed(number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = family(Path(parent.stdout.readline().strip()))
    parent.send_signal(number)
    parent.wait(20)
    parent.stdout.close()
    assert wait_for(lambda: not any(map(alive, pids)))


def test_local_server_tells_how_it_ended():
    server = LocalServer([sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"], dict(os.environ))
    assert wait_for(lambda: server.exit_code() is not None)
    assert server.exit_code() == 3
    assert server.log_tail() == "out of memory"
    server.close()
    assert not server.log_file.exists()


def test_local_server_closes_while_a_forked_child_holds_its_pipe(tmp_path):
    log_file = tmp_path / "server.log"
    server = LocalServer([sys.executable, "-c", FAMILY], dict(os.environ), log_file)
    pids = family(log_file)
    holder = os.dup(server._process.stdin.fileno())  # what a fork would leave in the child
    started = time.monotonic()
    server.close()
    os.close(holder)
    assert time.monotonic() - started < 15
    assert wait_for(lambda: not any(map(alive, pids)))
