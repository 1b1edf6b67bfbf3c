"""A request with images and its answer, whatever carries them: a connection of ours (direct.py), or ASGI."""

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from resnet_ensemble.server.errors import CONTENT_TYPE, ApiError, problem
from resnet_ensemble.server.metrics import Metrics

_T = TypeVar("_T")

REQUEST_ID = "X-Request-ID"
CLIENT_CLOSED_REQUEST = 499  # a status that nobody reads; it is for the metrics
_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Exchange(Protocol):
    """A request whose body is still on its way.

    - headers: by name in lower case, of equal names the first
    - query: what follows the `?`
    - client: the address that a quota counts for
    - request_id: as `identify` gives it
    """

    headers: dict[bytes, bytes]
    query: bytes
    client: str
    request_id: str

    async def chunk(self, until: float) -> bytes | None:
        """What has come next of the body; None at its end. `until`: of time.monotonic().

        Raises TimeoutError, and ApiError("request_too_large").
        """

    def unless_gone(self, work: Awaitable[_T]) -> Awaitable[_T]:
        """`work`, which is cancelled when the client goes away. Only after the body's end."""


@dataclass(frozen=True)
class Answer:
    """What goes back. `headers`: none of them is about the body's length or the request's id."""

    status: int
    headers: dict[str, str]
    body: bytes


class BodyLimit:
    """Counts the bytes of a body. `announced`: its Content-Length, or what a client has put there."""

    def __init__(self, announced: bytes, most: int) -> None:
        self._most = most
        size = _announced(announced) or 0
        self._received = size if size > most else 0

    def add(self, size: int) -> None:
        """So much has come; with 0, none is awaited of what is too large by its announcement. Raises ApiError."""
        self._received += size
        if self._received > self._most:
            raise ApiError("request_too_large", f"the request's body may have at most {self._most} bytes")


async def read(
    exchange: Exchange, count: Callable[[int], None], take: Callable[[bytes], None], allowed: float, deadline: float
) -> None:
    """Give a body to `take`, and the sizes of its pieces to `count` before.

    It may take `allowed` seconds, and no longer than the request has. Raises ApiError: "slow_upload",
    "deadline_exceeded", "request_too_large", and what `count` and `take` raise.
    """
    until = time.monotonic() + allowed
    try:
        while (chunk := await exchange.chunk(min(until, deadline))) is not None:
            count(len(chunk))
            take(chunk)
    except TimeoutError:
        if deadline < until:
            detail = "the request's body did not arrive in the time that the request has"
            raise ApiError("deadline_exceeded", detail) from None
        raise ApiError("slow_upload", f"the request's body did not arrive within {allowed:g} s") from None


def announced(headers: Mapping[bytes, bytes], largest: int) -> int:
    """What the body will have, or 0 if that is not said; what is above `largest` is never read."""
    return min(_announced(headers.get(b"content-length", b"")) or 0, largest)


def _announced(length: bytes) -> int | None:
    """A Content-Length; None if it is none. int() refuses thousands of digits, which zeros may be."""
    return int(length.lstrip(b"0") or b"0") if length.isdigit() else None


def identify(given: bytes) -> str:
    """A request's id: the client's own when it is harmless, otherwise one that is made."""
    # Not uuid4: it asks the system for bytes, and whoever calls that waits for the interpreter lock afterwards.
    return given.decode() if _SAFE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def refusal(error: ApiError, request_id: str, metrics: Metrics) -> Answer:
    """The problem document that tells a client of `error`, which is counted."""
    return Answer(
        error.kind.status,
        {"Content-Type": CONTENT_TYPE, **headers_of(error, metrics)},
        problem(error, request_id).model_dump_json().encode(),
    )


def headers_of(error: ApiError, metrics: Metrics) -> dict[str, str]:
    """What a refusal of any shape has in its headers. It is counted here."""
    metrics.count_problem(error.code, error.reason)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 wants it
    return headers


def stopping() -> ApiError:
    """What a client is told whose request is cancelled, as uvicorn does at the drain limit."""
    return ApiError("not_ready", "the server stops, and its time for what it had accepted is over")


def internal_error() -> ApiError:
    """What a client is told of a failure of ours: no internals."""
    return ApiError("internal_error", "the failure was logged with this request's id")
