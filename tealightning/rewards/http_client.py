"""HTTP client of a reward server: one request, what its answer says, and how long to wait for the next."""

import ipaddress
import json
import math
import os
import random
import ssl
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError, ReadTimeoutError

from tealightning.errors import UserError


def full_jitter(attempt: int, *, first_seconds: float, most_seconds: float, rng: random.Random) -> float:
    """Uniform on `[0, min(most_seconds, first_seconds * 2**attempt)]`, so that many clients spread out.

    Args:
        attempt: Failures so far, minus 1.
        first_seconds: Longest wait after the first failure.
        most_seconds: Longest wait of all.
        rng: Its own stream: the global ones belong to the training.
    """
    return rng.uniform(0.0, min(most_seconds, first_seconds * 2.0 ** min(attempt, 60)))


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float:
    """What a `Retry-After` header asks for, in seconds or as a date; 0 for none and for what is neither."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return min(float(header), 1e9)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    until = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


class BadAnswerError(UserError):
    """The answer is not what was asked for, and nothing of it is used."""


def scores_by_id(body: bytes, asked: Collection[str]) -> dict[str, float]:
    """The scores in `{"scores": [{"id": ..., "score": ...}, ...]}`, whatever their order.

    `null`, NaN and infinities are NaN: the server says that it cannot score this completion. A score that is no number
    is left out, as if its id were missing.

    Args:
        body: Of the answer.
        asked: The ids that the answer may name.

    Raises:
        BadAnswerError: for something else than such JSON, an id that was not asked for, or one that comes twice: then
            the server mixes requests up, and its other scores cannot be trusted either.
    """
    scores: dict[str, float] = {}
    seen: set[str] = set()
    for entry in _entries(body):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or "score" not in entry:
            raise BadAnswerError('an entry of "scores" is not {"id": string, "score": number or null}')
        key = entry["id"]
        if key not in asked:
            raise BadAnswerError("it scored an id that was not asked for")
        if key in seen:
            raise BadAnswerError("it scored an id twice")
        seen.add(key)
        score = _number(entry["score"])
        if score is not None:
            scores[key] = score
    return scores


def _entries(body: bytes) -> list[Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:  # a ValueError is also text that is not UTF-8
        raise BadAnswerError(f"it is no JSON ({type(error).__name__})") from error
    entries = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise BadAnswerError('it has no list "scores"')
    return entries


def _number(value: Any) -> float | None:
    """NaN for "cannot be scored"; None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else math.nan


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
    """The server failed at this batch."""


class RequestTimeoutError(FailedAnswerError):
    """No whole answer in time."""


class RewardServerError(RuntimeError):
    """The server refuses: a setting is wrong here or there, and asking again does not help."""


class TokenFromEnvironment(AuthBase):
    """Sends a bearer token that is read from the environment for each request and kept nowhere.

    Args:
        variable: Name of the environment variable.

    Raises:
        ValueError: if it is not set, or cannot be sent. The message does not hold the token.
    """

    def __init__(self, variable: str) -> None:
        self.variable = variable
        token = os.environ.get(variable, "")
        if not token:
            raise UserError(f"token_env names the environment variable {variable!r}, which is not set.")
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise UserError(
                f"token_env: the environment variable {variable!r} holds a space, a line end or another character that "
                "a token cannot have."
            )

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {os.environ.get(self.variable, '')}"
        return request

    def hide(self, text: str) -> str:
        """`text` without the token, should a server have repeated it."""
        token = os.environ.get(self.variable, "")
        return text.replace(token, "***") if token else text


class RewardClient:
    """Posts JSON to one address, from any thread. It talks to that address only: no proxies, no redirects, no cookies.

    Args:
        url: Of the reward server.
        token: Adds the bearer token; None = none is sent.
        timeout_seconds: Longest wait for a whole answer.
        ca_file: Certificates to trust instead of the usual ones.
    """

    def __init__(
        self, url: str, *, token: TokenFromEnvironment | None, timeout_seconds: float, ca_file: str | None = None
    ) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds
        self._token = token
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy of the environment, and a .netrc would replace the token
        self._session.auth = token
        self._session.verify = ca_file or True
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for prefix in ("http://", "https://"):
            self._session.mount(prefix, HTTPAdapter(pool_maxsize=64, max_retries=0))

    @property
    def where(self) -> str:
        """The address for messages: without the query, which may hold a secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def post(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body of a successful answer.

        Raises:
            UnavailableError: without an answer, or for one that says "later".
            FailedAnswerError: for another answer that another try, or a smaller batch, may mend.
            RewardServerError: for one that says that a setting is wrong.

        Nothing that is raised holds the request, and with it the token.
        """
        deadline = time.monotonic() + self.timeout_seconds
        try:
            timeouts = (min(_CONNECT_SECONDS, self.timeout_seconds), self.timeout_seconds)
            with self._session.post(
                self.url, data=body, headers=headers, timeout=timeouts, allow_redirects=False, stream=True
            ) as answer:
                content = self._read(answer, deadline)
        except (OSError, HTTPError) as error:  # every exception of requests is an OSError
            if _is_slow(error):
                raise RequestTimeoutError(f"{self.where} did not answer within {self.timeout_seconds:g} s") from None
            if _is_certificate(error):
                raise RewardServerError(
                    f"{self.where} has a certificate that is not trusted; ca_file names others to trust."
                ) from None
            raise UnavailableError(f"{self.where} cannot be reached ({_kind(error)})") from None
        if answer.status_code == 200:
            return content
        raise self._error(answer, content)

    def close(self) -> None:
        self._session.close()

    def _read(self, answer: requests.Response, deadline: float) -> bytes:
        """All of it; the timeout of requests is for one read, and a slow enough server would never meet it."""
        content = bytearray()
        while chunk := answer.raw.read1(1 << 16, decode_content=True):  # what has come, not a full chunk of it
            content += chunk
            if len(content) > _LONGEST_BODY:
                raise FailedAnswerError(f"{self.where} sent more than {_LONGEST_BODY >> 20} MiB")
            if time.monotonic() > deadline:
                raise requests.ReadTimeout
        return bytes(content)

    def _error(self, answer: requests.Response, content: bytes) -> RuntimeError:
        status = answer.status_code
        said = " ".join(content.decode("utf-8", errors="replace").split())
        said = self._token.hide(said) if self._token is not None else said
        message = f"{self.where} answered {status}: {said[:_QUOTED_CHARACTERS] or '(nothing)'}"
        if status in _UNAVAILABLE:
            return UnavailableError(message, retry_after_seconds(answer.headers.get("Retry-After")))
        if status >= 500 or status in _FAILED or (200 <= status < 300):
            return FailedAnswerError(message)
        if 300 <= status < 400:
            return RewardServerError(f"{message}. Redirects are not followed: give the final address as url.")
        hint = " Is token_env set, and the token right?" if status in (401, 403) else " Is url right?"
        return RewardServerError(message + hint)


def checked_url(url: str, *, sends_token: bool) -> SplitResult:
    """The parts of `url`.

    Raises:
        ValueError: for something else than http(s)://host/path, for a password in it, and for a token that would
            travel unencrypted to another machine. The message does not hold what may be secret.
    """
    expected = "url must be http://host:port/path or https://host/path"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{expected}: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{expected}, without a name and password: put a token into the environment (token_env).")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{expected}, got {url.partition('?')[0]!r}.")
    if sends_token and parts.scheme == "http" and not _is_this_machine(parts.hostname):
        raise UserError(
            f"url: {parts.scheme}://{parts.netloc} is not encrypted, and everyone on the way could read the token: use "
            "https, or a tunnel to 127.0.0.1."
        )
    return parts


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wrapped(error: BaseException) -> list[BaseException]:
    """`error` and what it wraps, innermost last: requests wraps urllib3's exceptions, which wrap Python's."""
    inner = [one for one in (*error.args, getattr(error, "reason", None)) if isinstance(one, BaseException)]
    return [error, *(_wrapped(inner[0]) if inner else [])]


def _is_certificate(error: BaseException) -> bool:
    return any(isinstance(one, ssl.SSLCertVerificationError) for one in _wrapped(error))


def _is_slow(error: BaseException) -> bool:
    """Whether the answer, not the connection, took too long."""
    return any(isinstance(one, requests.ReadTimeout | ReadTimeoutError) for one in _wrapped(error))


def _kind(error: BaseException) -> str:
    """The types of it and of what it wraps: messages hold addresses, types do not."""
    return ": ".join(type(one).__name__ for one in _wrapped(error))
