"""Main program of `FunctionWorker`'s process: started as a script, with the standard library alone.

It is two processes. A fork calls the function, in a process group of its own; the first one ends that group once stdin
closes (the trainer has ended, however it did) or on SIGTERM (the trainer wants it to), also when the function holds the
interpreter and listens to nothing.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

_POLL_SECONDS = 0.05
_TRACEBACK_CHARACTERS = 4000


def main(channel: int) -> int:
    """Serve the requests of the file descriptor `channel`; the exit code, or 128 + the signal, of what serves them."""
    reasons_to_end: list[str] = []  # not an Event: a signal handler that sets one can wait for its own thread for ever
    child = os.fork()  # before there is a thread
    if child == 0:
        _serve_and_exit(channel)
    os.close(channel)  # or the trainer would not see the child end
    signal.signal(signal.SIGTERM, lambda *_: reasons_to_end.append("SIGTERM"))
    threading.Thread(target=_wait_for_stdin, args=(reasons_to_end,), daemon=True).start()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and not reasons_to_end:
        time.sleep(_POLL_SECONDS)
    for kill in (os.killpg, os.kill):  # the group, and the child in case it has not made its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _wait_for_stdin(reasons_to_end: list[str]) -> None:
    while os.read(0, 4096):
        pass
    reasons_to_end.append("stdin closed")


def _serve_and_exit(channel: int) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)  # what the function prints
        _serve(Connection(channel))
        code = 0
    except SystemExit as error:  # of the function
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # the last frame of this process
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(channel: Connection) -> None:
    setup = channel.recv()
    sys.path[:] = setup["sys_path"]
    try:
        function, helpers = _loaded(setup["function"])
    except Exception as error:  # whatever importing it raises is told to the trainer
        channel.send(("raised", type(error).__name__, str(error), _traceback()))
        return
    channel.send(("ready",))
    with contextlib.suppress(EOFError):  # no more requests
        while True:
            number, arguments = channel.recv()
            channel.send((number, *_answer(function, helpers, arguments)))


def _loaded(path: str) -> tuple[Any, ModuleType]:
    """The function, and `importing.py`; that by its file, because its package imports PyTorch."""
    file = Path(__file__).with_name("importing.py")
    spec = importlib.util.spec_from_file_location("tealightning_importing", file)
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    function = helpers.import_function(path)
    if not callable(function):
        raise ValueError(f"function must be a function, got {function!r}.")
    return function, helpers


def _answer(function: Any, helpers: ModuleType, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """("scores", list of float or None), ("invalid", what came) or ("raised", type, message, traceback)."""
    try:
        values = helpers.call_function(function, **arguments)
    except Exception as error:
        return "raised", type(error).__name__, str(error), _traceback()
    try:
        return "scores", [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        return "invalid", str(error)


def _traceback() -> str:
    return traceback.format_exc()[-_TRACEBACK_CHARACTERS:]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
