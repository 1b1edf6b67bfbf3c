"""What is said to a server and what its answers mean, apart from sockets and clocks: both clients run this.

A conversation is a generator. It yields a Request to be sent, and is sent the response or why there is none;
or it yields seconds to wait. It returns the typed answer.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias, TypeVar

import httpx2

from resnet_ensemble.client._errors import (
    ConnectionFailedError,
    ResnetError,
    ResponseError,
    StatusError,
    TimedOutError,
    error_class,
)
from resnet_ensemble.client._retries import (
    DEFAULT_RETRIES,
    DEFAULT_RETRY_SECONDS,
    delay,
    parse_retry_after,
    retryable,
)
from resnet_ensemble.client._types import Info, Prediction

DEFAULT_URL = "http://localhost:8000"
DEFAULT_TIMEOUT = httpx2.Timeout(60.0, connect=5.0)
URL_VARIABLE = "RESNET_CLIENT_URL"
KEY_VARIABLE = "RESNET_CLIENT_API_KEY"
LONGEST_DEADLINE = 3600.0  # seconds that a server accepts

_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """One HTTP request. `arguments` are httpx2's."""

    method: str
    url: str
    arguments: Mapping[str, Any]


Step: TypeAlias = Request | float
Outcome: TypeAlias = httpx2.Response | httpx2.RequestError | None
Conversation: TypeAlias = Generator[Step, Outcome, _T]


@dataclass(frozen=True)
class Options:
    """How to talk to a server; see Client."""

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float | httpx2.Timeout | None = None
    max_retries: int = DEFAULT_RETRIES
    retry_seconds: float = DEFAULT_RETRY_SECONDS

    def __post_init__(self) -> None:
        if self.max_retries < 0 or self.retry_seconds < 0:
            raise ValueError(f"max_retries={self.max_retries} and retry_seconds={self.retry_seconds} must be 0 or more")

    def seconds(self, default: httpx2.Timeout) -> float | None:
        """How long to wait for an answer, or None for as long as it takes. `default`: of the connections."""
        timeout = default if self.timeout is None else self.timeout
        return timeout.read if isinstance(timeout, httpx2.Timeout) else timeout

    def base(self) -> str:
        """The server's URL, without a slash at its end. Raises ResnetError if it can be none."""
        given = self.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        try:
            url = httpx2.URL(given)
            url.host.encode("idna")  # as a socket does it
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise ResnetError(f"{given!r} is no URL of a server: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ResnetError(f"{given!r} is no URL of a server; one is {DEFAULT_URL}")
        return given.rstrip("/")

    def key(self) -> str | None:
        """The key to send, if there is one. Raises ResnetError if it can be none."""
        key = self.api_key or os.environ.get(KEY_VARIABLE)
        if key and not (key.isascii() and key.isprintable()):
            raise ResnetError("the API key has characters that no header can have; is there a line end in it?")
        return key


def predict(
    options: Options,
    content: bytes,
    *,
    top_k: int,
    protocol: str | None,
    stop: str | None,
    abstain_below: float | None,
    seconds: float | None,
) -> Conversation[Prediction]:
    """Classify encoded bytes. `seconds`: when nobody will wait for the answer any more; the server is told."""
    given = {"top_k": top_k, "protocol": protocol, "stop": stop, "abstain_below": abstain_below}
    headers = {"Content-Type": "application/octet-stream"}
    if seconds:
        headers["X-Request-Timeout"] = f"{min(seconds, LONGEST_DEADLINE):g}"
    response = yield from _exchange(
        options,
        "POST",
        "/predict",
        headers=headers,
        params={name: value for name, value in given.items() if value is not None},
        content=content,
    )
    return _parsed(response, lambda answer: Prediction.parse(answer, response.headers.get("x-request-id", "")))


def info(options: Options) -> Conversation[Info]:
    """Ask what is served."""
    response = yield from _exchange(options, "GET", "/info")
    return _parsed(response, Info.parse)


def ready(options: Options) -> Conversation[bool]:
    """Ask once."""
    response = yield _request(options, "GET", "/readyz")
    return isinstance(response, httpx2.Response) and response.status_code == httpx2.codes.OK


def _exchange(options: Options, method: str, path: str, **arguments: Any) -> Conversation[httpx2.Response]:
    """Send, and send again while the policy allows. Raises ResnetError."""
    request = _request(options, method, path, **arguments)
    latest = time.monotonic() + options.retry_seconds
    for retry in range(options.max_retries + 1):
        outcome = yield request
        if isinstance(outcome, httpx2.Response) and outcome.is_success:
            return outcome
        error = _error(request, outcome)
        wait = delay(retry, error.retry_after if isinstance(error, StatusError) else None)
        again = not isinstance(error, StatusError) or retryable(error.status)
        if not again or retry == options.max_retries or time.monotonic() + wait > latest:
            raise error
        yield wait
    raise AssertionError("the last retry returns or raises")


def _request(options: Options, method: str, path: str, **arguments: Any) -> Request:
    headers = {"User-Agent": _user_agent(), **arguments.pop("headers", {})}
    key = options.key()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if options.timeout is not None:
        arguments["timeout"] = options.timeout
    return Request(method, options.base() + path, {"headers": headers, **arguments})


@cache
def _user_agent() -> str:
    return f"resnet-ensemble-python/{importlib.metadata.version('resnet-ensemble')}"


def _error(request: Request, outcome: Outcome) -> ConnectionFailedError | StatusError:
    if isinstance(outcome, httpx2.Response):
        return _status_error(outcome)
    if not isinstance(outcome, httpx2.TransportError):  # something answered: a wrong Content-Encoding, redirects
        raise ResponseError(f"{request.url} gave an answer that can't be read: {outcome}") from outcome
    error: ConnectionFailedError
    if isinstance(outcome, httpx2.TimeoutException):
        error = TimedOutError(f"no answer from {request.url} in time ({type(outcome).__name__})")
    else:
        error = ConnectionFailedError(f"no connection to {request.url}: {outcome}")
    error.__cause__ = outcome
    return error


def _status_error(response: httpx2.Response) -> StatusError:
    """The typed error for a problem document, or for whatever a proxy answered instead."""
    if response.has_redirect_location:
        raise ResponseError(f"{response.url} redirects to {response.headers['location']}; give that URL's server")
    try:
        problem = response.json()
        code, detail = str(problem["code"]), str(problem["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        code, detail = "unknown", response.content[:200].decode("utf-8", "replace")  # whatever charset it says it has
    request_id = response.headers.get("x-request-id", "")
    retry_after = parse_retry_after(response.headers.get("retry-after"))
    return error_class(response.status_code, code)(response.status_code, code, detail, request_id, retry_after)


def _parsed(response: httpx2.Response, parse: Callable[[Any], _T]) -> _T:
    try:
        return parse(response.json())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResponseError(f"{response.url} answered something else than a resnet-ensemble server: {error}") from error
