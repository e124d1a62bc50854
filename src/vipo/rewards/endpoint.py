"""JSON over HTTP POST to somebody else's server: timeouts, bounded retries with back-off, concurrency, a token."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

MAX_REPLY = 16 * 2**20
"""Bytes of a reply that are read; a longer one is an error."""
MAX_DELAY = 30.0
"""Seconds of the longest pause between two attempts."""
_SHOWN = 300  # characters of a server's words that an error repeats
_SECRET = re.compile("key|token|secret|passw|pwd|auth|sig|credential", re.IGNORECASE)
_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")
Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=BaseModel)


class _Unavailable(Exception):
    """An attempt failed in a way that the next may not."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how patiently.

    A server's 5xx or 429, a timeout and a dropped connection are tried again; another 3xx or 4xx is not, and redirects
    are never followed: they would carry the token elsewhere. The proxies of the environment are used (HTTPS_PROXY,
    NO_PROXY).
    """

    url: str = field(repr=False)
    """http:// or https://, without a user or password, which belong into `token_env`."""
    _: KW_ONLY
    timeout: float = 60.0
    """Seconds per attempt: to connect, then until the reply begins, then until it ends."""
    retries: int = 3
    """Attempts after the first one."""
    backoff: float = 0.5
    """Seconds before the second attempt, doubled before each further one up to 30, times a random 0.5 to 1."""
    concurrency: int = 4
    """Requests in flight at once."""
    token_env: str | None = None
    """Environment variable with a token, sent as `Authorization: Bearer`; it is read anew for each request."""

    def __post_init__(self) -> None:
        """Raise ValueError for an url or a number that cannot work, or a token that is not there."""
        if "@" in self.url:
            raise ValueError(
                "url: expected no @, as a user or password would bring; name a variable with a token in token_env"
            )
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, a bracket that is not closed
            known = False
        if not known or " " in self.url or not self.url.isascii() or not self.url.isprintable():
            raise ValueError(f"url: expected http(s)://host[:port]/path without blanks, got {self.place!r}")
        secret = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(key)]
        if secret:  # the address is written into the run's config.yaml
            raise ValueError(f"url: {secret[0]!r} reads like a secret; name a variable that holds it in token_env")
        if not 0 < self.timeout < math.inf or not 0 <= self.backoff < math.inf:
            raise ValueError(f"expected timeout > 0 and backoff >= 0, got {self.timeout} and {self.backoff}")
        if self.retries < 0 or self.concurrency < 1:
            raise ValueError(f"expected retries >= 0 and concurrency >= 1, got {self.retries} and {self.concurrency}")
        if self.token_env is not None:
            read_token(self.token_env)

    @property
    def place(self) -> str:
        """The url without its query, which may hold a secret: what errors call the server."""
        return self.url.partition("?")[0]

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Apply `work` to the items in `concurrency` threads; results in the items' order, or the first error."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(work, items))

    def post(self, payload: Mapping[str, Any], answer: type[Answer]) -> Answer:
        """Send JSON, and read the reply as an `answer`.

        Raises:
            ConnectionError: no attempt got an answer.
            ValueError: the server refused (3xx, 4xx), or its reply is no `answer`.
        """
        token = None if self.token_env is None else read_token(self.token_env)
        body = json.dumps(payload, allow_nan=False).encode()
        reply = self._persist(body, token)
        try:
            return answer.model_validate_json(reply)
        except ValidationError as error:
            problem = first_problem(error)
        raise ValueError(f"{self.place}: unexpected reply ({problem}): {_shown(reply, token)}")

    def _persist(self, body: bytes, token: str | None) -> bytes:
        chance = random.Random()  # its own: the global one belongs to the run's seed
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(body, token)
            except _Unavailable as error:
                reason = str(error)
            if attempt < self.retries:
                time.sleep(min(self.backoff * 2**attempt, MAX_DELAY) * chance.uniform(0.5, 1))
        raise ConnectionError(
            f"{self.place}: no answer in {self.retries + 1} attempts; the last: {reason}; is the server running there?"
        )

    def _attempt(self, body: bytes, token: str | None) -> bytes:
        """Send the request once and return the body of a 2xx reply."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        opener = urllib.request.OpenerDirector()  # no handler of redirects or statuses: a reply comes back as it is
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            opener.add_handler(handler())
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with opener.open(request, timeout=self.timeout) as response:
                reply = self._read(response, time.monotonic() + self.timeout)
                status = response.status
        except TimeoutError:
            raise _Unavailable(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error  # the socket's own error
            if isinstance(cause, TimeoutError):
                raise _Unavailable(f"no connection within {self.timeout:g} s") from None
            raise _Unavailable(_shown(str(cause) or type(cause).__name__, token)) from None
        if status >= 500 or status == 429:  # 429: too many requests, which hosted models answer when busy
            raise _Unavailable(f"HTTP {status}: {_message(reply, token)}")
        if not 200 <= status < 300:
            raise ValueError(f"{self.place}: HTTP {status}: {_message(reply, token)}")
        return reply

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """Read a whole body; a server that sends a byte now and then must not hold the run for ever."""
        chunks, size = [], 0
        while chunk := response.read1(65536):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_REPLY:
                raise ValueError(f"{self.place}: the reply is longer than {MAX_REPLY} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # read1 takes a connection that closes early for the end
            raise ConnectionResetError(f"the connection closed {response.length} bytes before the reply's end")
        return b"".join(chunks)


def read_token(variable: str) -> str:
    """Return the token in an environment variable; ValueError names the variable, never what is in it."""
    token = os.environ.get(variable, "").strip()
    if not token and not _VARIABLE.fullmatch(variable):
        raise ValueError(
            "token_env: expected the name of an environment variable, such as REWARD_TOKEN, got something else, not "
            "shown: it may be the token itself"
        )
    if not token:
        raise ValueError(
            f"token_env: the environment variable {variable} is not set or empty; export {variable}=... before the run"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"token_env: {variable} holds blanks or characters that no HTTP header may carry")
    return token


def first_problem(error: ValidationError) -> str:
    """One line for the first thing that pydantic found wrong, without the value, which may be megabytes."""
    found = error.errors(include_input=False, include_url=False)[0]
    key = ".".join(str(part) for part in found["loc"])
    message = found["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def where_finite(frames: Tensor, scores: Tensor) -> Tensor:
    """Scores (N,) with NaN for every sample of frames (N, ...) that is not finite: 8 bits cannot say so."""
    return torch.where(frames.flatten(1).isfinite().all(1), scores, torch.nan)


def _message(reply: bytes, token: str | None) -> str:
    """The words in an error's body: FastAPI's detail, OpenAI's error.message, or the text itself."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return _shown(reply, token)
    for key in ("error", "detail", "message"):
        found = found[key] if isinstance(found, dict) and key in found else found
    return _shown(found if isinstance(found, str) else json.dumps(found), token)


def _shown(words: bytes | str, token: str | None) -> str:
    """A server's words as one printable line of bounded length, without the token."""
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else words
    text = text if token is None else text.replace(token, "***")
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 10 * _SHOWN])
    line = " ".join(line.split())
    return (line[:_SHOWN] + " ...") if len(line) > _SHOWN else line or "(nothing)"
