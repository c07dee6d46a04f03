"""An HTTP server with the answers that a test gives it, for what a real vLLM server does not do on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[Any, ...]]
"""From the body of a request to a status, a body and, if there are any, headers."""


def choice(token_ids: list[int], log_probs: list[float], *, version: str = "", index: int = 0) -> dict[str, Any]:
    """A completion as `/inference/v1/generate` returns it."""
    content = [
        {"token_id": token, "logprob": value, "top_logprobs": [{"token_id": token, "logprob": value}]}
        for token, value in zip(token_ids, log_probs, strict=True)
    ]
    spans = [{"version": version, "start": 0, "end": len(token_ids)}]
    finish = {"finish_reason": "length", "weight_versions": spans}
    return {"index": index, "token_ids": token_ids, "logprobs": {"content": content}, **finish}


@contextmanager
def stub_server(answers: dict[str, Answer]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any], dict[str, str]]]]]:
    """Its url, and the (path, body, headers) of all requests so far; 404 for a path without an answer."""
    seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            seen.append((self.path, body, dict(self.headers)))
            answer = answers.get(self.path.partition("?")[0])
            status, result, *headers = answer(body) if answer else (404, {"error": "Not Found"})
            content = json.dumps(result).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers[0] if headers else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
