"""HTTP client of a reward server: one request, and what its answer says."""

import ipaddress
import json
import math
import os
import ssl
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import partial

import httpx

from tealightning.errors import UserError

_CONNECT_SECONDS = 10.0
_LONGEST_BODY = 64 << 20  # bytes; an answer without an end must not fill the memory
_QUOTED_CHARACTERS = 300
_UNAVAILABLE = {429, 502, 503, 504}
_FAILED = {408, 413, 425}  # of the requests' fault statuses, those that another try or a smaller batch may mend


class UnavailableError(RuntimeError):
    """No answer, or one that says "later"; `retry_after` is how many seconds later, 0 if it does not say."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FailedAnswerError(RuntimeError):
    """The server failed at this batch, or nothing of its answer can be used."""

    retry_after = 0.0


class RequestTimeoutError(FailedAnswerError):
    """No whole answer in time."""


class RewardServerError(RuntimeError):
    """The server refuses: a setting is wrong here or there, and asking again does not help."""


class RewardClient:
    """Posts JSON to one address. It talks to that address only: no proxies, no redirects, no cookies.

    `token_env` names the environment variable with a bearer token, which is read for each request and kept nowhere.

    Raises:
        UserError: if `url` is none, holds a password or would send the token unencrypted to another machine, if the
            token is not there or cannot be sent, or the certificates cannot be read. The message holds no secret.
    """

    def __init__(self, url: str, *, timeout_seconds: float, token_env: str | None, ca_file: str | None) -> None:
        self.url = _checked_url(url, sends_token=token_env is not None)
        self.where = str(self.url.copy_with(query=None, fragment=None))  # for messages: a query may hold a secret
        self.token_env = token_env
        self.timeout_seconds = timeout_seconds
        self.ca_file = ca_file
        token = "" if token_env is None else os.environ.get(token_env, "")
        if token_env is not None and not token:
            raise UserError(f"token_env names the environment variable {token_env!r}, which is not set.")
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise UserError(
                f"token_env: the environment variable {token_env!r} holds a space, a line end or another character "
                "that a token cannot have."
            )
        try:
            self._certificates = (
                ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context(trust_env=False)
            )
        except OSError as error:
            raise UserError(f"ca_file: no certificates (PEM) can be read from {ca_file}: {error}") from error

    def __reduce__(self) -> tuple["partial[RewardClient]", tuple[()]]:
        """A copy reads the certificates anew: what holds them cannot be pickled."""
        timeout, token, file = self.timeout_seconds, self.token_env, self.ca_file
        return partial(type(self), str(self.url), timeout_seconds=timeout, token_env=token, ca_file=file), ()

    def connection(self) -> httpx.HTTPTransport:
        """A connection for one thread, a context manager; it reconnects when needed. (httpx's `Client` would add
        proxies of the environment, redirects and cookies, and log the query.)"""
        return httpx.HTTPTransport(verify=self._certificates, trust_env=False)

    def post(self, connection: httpx.HTTPTransport, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body of a successful answer. Nothing that is raised holds the request, and with it the token.

        Raises:
            UnavailableError: without an answer, or for one that says "later".
            FailedAnswerError: for another answer that another try, or a smaller batch, may mend.
            RewardServerError: for one that says that a setting is wrong.
        """
        deadline = time.monotonic() + self.timeout_seconds
        timeouts = httpx.Timeout(self.timeout_seconds, connect=min(_CONNECT_SECONDS, self.timeout_seconds))
        headers = {"Content-Type": "application/json", "User-Agent": "tealightning", **headers}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.token_env, '')}"
        extensions = {"timeout": timeouts.as_dict()}
        request = httpx.Request("POST", self.url, content=body, headers=headers, extensions=extensions)
        try:
            with closing(connection.handle_request(request)) as answer:
                content = self._read(answer, deadline)
        except httpx.TransportError as error:
            problem: RuntimeError = self._unanswered(error)
        else:
            if answer.status_code == 200:
                return content
            problem = self._error(answer, content)
        raise problem

    def _read(self, answer: httpx.Response, deadline: float) -> bytes:
        """All of it; the timeout of httpx is for one read, and a slow enough server would never meet it."""
        content = bytearray()
        for chunk in answer.iter_raw():
            content += chunk
            if len(content) > _LONGEST_BODY:
                raise FailedAnswerError(f"{self.where} sent more than {_LONGEST_BODY >> 20} MiB")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("")
        return bytes(content)

    def _unanswered(self, error: Exception) -> RuntimeError:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        if isinstance(error, httpx.ReadTimeout):
            return RequestTimeoutError(f"{self.where} did not answer within {self.timeout_seconds:g} s")
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return RewardServerError(
                f"{self.where} has a certificate that is not trusted; ca_file names others to trust."
            )
        types = dict.fromkeys(type(cause).__name__ for cause in causes)  # messages hold addresses, types do not
        return UnavailableError(f"{self.where} cannot be reached ({': '.join(types)})")

    def _error(self, answer: httpx.Response, content: bytes) -> RuntimeError:
        status = answer.status_code
        said = " ".join(content.decode("utf-8", errors="replace").split())
        if self.token_env is not None and (token := os.environ.get(self.token_env)):
            said = said.replace(token, "***")  # should the server have repeated it
        message = f"{self.where} answered {status}: {said[:_QUOTED_CHARACTERS] or '(nothing)'}"
        if status in _UNAVAILABLE:
            return UnavailableError(message, _retry_after_seconds(answer.headers.get("Retry-After", "")))
        if status >= 500 or status in _FAILED or (200 <= status < 300):
            return FailedAnswerError(message)
        if 300 <= status < 400:
            return RewardServerError(f"{message}. Redirects are not followed: give the final address as url.")
        hint = " Is token_env set, and the token right?" if status in (401, 403) else " Is url right?"
        return RewardServerError(message + hint)


def _checked_url(url: str, *, sends_token: bool) -> httpx.URL:
    expected = "url must be http://host:port/path or https://host/path"
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{expected}: {error}") from None
    if parts.userinfo:
        raise UserError(f"{expected}, without a name and password: put a token into the environment (token_env).")
    if parts.scheme not in ("http", "https") or not parts.host or (parts.port or 1) > 65535:
        raise UserError(f"{expected}, got {url.partition('?')[0]!r}.")
    if sends_token and parts.scheme == "http" and not _is_this_machine(parts.host):
        raise UserError(
            f"url: {parts.scheme}://{parts.netloc.decode()} is not encrypted, and everyone on the way could read the "
            "token: use https, or a tunnel to 127.0.0.1."
        )
    return parts


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after_seconds(header: str) -> float:
    """What a `Retry-After` header asks for, in seconds or as a date; 0 for what is neither."""
    if header.strip().isdecimal():
        return min(float(header), 1e9)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def scores_by_id(body: bytes, asked: Collection[str]) -> dict[str, float]:
    """The scores in `{"scores": [{"id": ..., "score": ...}, ...]}`, whatever their order.

    `null` is NaN: the server says that it cannot score this completion. A score that is no number is left out, as if
    its id were missing. Something else than such JSON, an id that was not asked for, or one that comes twice is a
    FailedAnswerError: the server mixes requests up, and its other scores cannot be trusted either.
    """
    try:
        # Integers as floats: one of more than 308 digits is infinite then, and no error.
        entries = [(entry["id"], entry["score"]) for entry in json.loads(body, parse_int=float)["scores"]]
        keys = {key for key, _ in entries}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FailedAnswerError('it is not {"scores": [{"id": string, "score": number or null}, ...]}') from error
    if not keys <= set(asked):
        raise FailedAnswerError("it scored an id that was not asked for")
    if len(keys) < len(entries):
        raise FailedAnswerError("it scored an id twice")
    return {key: math.nan if score is None else score for key, score in entries if isinstance(score, float | None)}
