"""A real HTTP reward server on the loopback interface that misbehaves as often as it is told to."""

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Entries = list[dict[str, Any]]
HANG_SECONDS = 1.5  # beyond the timeout of the tests that inject it


def score_of(item: dict[str, Any]) -> float:
    """A number that only this prompt and completion have."""
    text = json.dumps([item["prompt"], item["completion"]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 1e9


class MisbehavingServer:
    """Scores by `score_of`; `None` (cannot be scored) where a completion holds `<null>`.

    Args:
        faults: Probability of each fault, of the names of `ANSWERS` and `BREAKS`; at most one happens to a request.
        seed: Of the faults.
        poison: A completion with this text makes the server answer 500, always.
        score: Another score than `score_of`.
    """

    def __init__(
        self,
        faults: dict[str, float] | None = None,
        *,
        seed: int = 0,
        poison: str | None = None,
        score: Callable[[dict[str, Any]], float | None] = score_of,
    ) -> None:
        self.faults = faults or {}
        self.poison = poison
        self.score = score
        self.location = ""  # of redirects
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self.headers: list[dict[str, str]] = []
        self.bodies: dict[str, set[bytes]] = {}  # by idempotency key
        self.at_a_time = self.most_at_a_time = 0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/score?version=1"

    def start(self) -> None:
        """Listen, on the port of the last time."""
        self._server = _Server(("127.0.0.1", self._port), _handler_of(self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close the port and reset every connection, as a killed process does."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            reset(connection)

    def restart(self, *, gone_seconds: float) -> None:
        self.stop()
        time.sleep(gone_seconds)
        self.start()

    def pick_fault(self) -> str | None:
        """What happens to the next request."""
        with self._lock:
            self.requests += 1
            left = self._rng.random()
            for name, probability in self.faults.items():
                left -= probability
                if left < 0:
                    self.injected[name] += 1
                    return name
            return None

    @contextlib.contextmanager
    def one_request(self) -> Iterator[None]:
        with self._lock:
            self.at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        try:
            yield
        finally:
            with self._lock:
                self.at_a_time -= 1

    def entries(self, items: list[dict[str, Any]]) -> Entries:
        return [
            {"id": item["id"], "score": None if "<null>" in item["completion"] else self.score(item)} for item in items
        ]


@contextlib.contextmanager
def reward_server(*args: Any, **kwargs: Any) -> Iterator[MisbehavingServer]:
    server = MisbehavingServer(*args, **kwargs)
    server.start()
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):  # a test may have stopped it
            server.stop()


def reset(connection: socket.socket) -> None:
    """Close with a RST in place of a FIN, although files made from the socket are still open."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())


# ---------------------------------------------------------------- answers that are wrong


def wrong_ids(entries: Entries) -> Any:
    return [entry | {"id": "of-another-request"} for entry in entries]


def one_wrong_id(entries: Entries) -> Any:
    return [*entries[:-1], entries[-1] | {"id": entries[-1]["id"] + "0"}]


def duplicated_ids(entries: Entries) -> Any:
    return [*entries, entries[0] | {"score": -1.0}]


def missing_ids(entries: Entries) -> Any:
    return entries[: len(entries) // 2]


def no_numbers(entries: Entries) -> Any:
    odd = ["high", True, [1.0], {"value": 1.0}]
    return [entry | {"score": odd[i % len(odd)]} for i, entry in enumerate(entries)]


def shuffled(entries: Entries) -> Any:
    return entries[::-1]


def by_position(entries: Entries) -> Any:
    return [entry["score"] for entry in entries]


ANSWERS: dict[str, Callable[[Entries], Any]] = {
    "wrong_ids": wrong_ids,
    "one_wrong_id": one_wrong_id,
    "duplicated_ids": duplicated_ids,
    "missing_ids": missing_ids,
    "no_numbers": no_numbers,
    "shuffled": shuffled,
    "by_position": by_position,
}
GARBAGE = [b"<html>busy</html>", b"", b'{"scores": [', b"\xff\xfe", b"[" * 100_000, b'{"scores": 3}', b"null", b'"x"']
BREAKS = ("500", "503", "429", "reset", "reset_in_body", "truncated", "garbage", "slow", "hang", "drip")


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # broken connections are what this is for


def _handler_of(owner: MisbehavingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # it would wait 40 ms between head and body

        def setup(self) -> None:
            super().setup()
            owner._connections.add(self.connection)

        def finish(self) -> None:
            owner._connections.discard(self.connection)
            super().finish()

        def do_POST(self) -> None:
            with owner.one_request():
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.headers.append(dict(self.headers))
                owner.bodies.setdefault(self.headers["Idempotency-Key"], set()).add(body)
                items = json.loads(body)["items"]
                fault = owner.pick_fault()
                if owner.poison is not None and any(owner.poison in item["completion"] for item in items):
                    return self.send(500, b"poisoned")
                entries = owner.entries(items)
                if fault in ANSWERS:
                    return self.send(200, json.dumps({"scores": ANSWERS[fault](entries)}).encode())
                content = json.dumps({"scores": entries}).encode()
                return self.misbehave(fault, content) if fault is not None else self.send(200, content)

        def misbehave(self, fault: str, content: bytes) -> None:
            if fault in ("500", "503"):
                self.send(int(fault), b"out of order")
            elif fault == "redirect":
                self.send(302, b"", {"Location": owner.location})
            elif fault == "429":
                self.send(429, b"too many", {"Retry-After": "0"})
            elif fault == "garbage":
                self.send(200, GARBAGE[owner.requests % len(GARBAGE)])
            elif fault in ("slow", "hang"):
                time.sleep(0.2 if fault == "slow" else HANG_SECONDS)
                self.send(200, content)
            elif fault == "drip":
                self.send_head(200, len(content))
                for i in range(len(content)):
                    self.wfile.write(content[i : i + 1])
                    time.sleep(0.05)
            elif fault == "truncated":
                self.send_head(200, len(content))
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                if fault == "reset_in_body":
                    self.send_head(200, len(content))
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                self.close_connection = True
                reset(self.connection)

        def send_head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_head(status, len(content), headers)
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
