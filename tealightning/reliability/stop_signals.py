"""Handle SIGTERM and SIGINT: end a run after its step, at the second signal at once."""

import os
import signal
import threading
from types import FrameType


class StopRequestedError(SystemExit):
    """Ends a run whose state is saved; the exit code is the signal's (130, 143), and 0 on ranks other than the first:
    Lightning's launcher would kill the first one, which may still be writing, if another one failed."""

    def __init__(self, signum: int, rank: int) -> None:
        super().__init__(128 + signum if rank == 0 else 0)
        self.signum = signum


class StopSignals:
    """Notes the first SIGTERM or SIGINT, and lets the second one do what it does by default.

    Lightning's own handler of SIGTERM exchanges tensors with the other ranks in the middle of whatever they are
    exchanging, and a run that it ends exits with status 0.
    """

    def __init__(self) -> None:
        self.received = 0
        """The signal's number, 0 = none yet."""

    def install(self) -> None:
        """Take over from the handlers that are there. Lightning puts them back when its trainer ends. Signals that the
        process ignores stay ignored; without effect outside the main thread, which alone can have handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.received = signum
        name = signal.Signals(signum).name
        # Not print: it is not allowed to be entered a second time, and the signal may have come in the middle of one.
        os.write(2, f"tealightning: {name}: stopping after this step (again: at once)\n".encode())
