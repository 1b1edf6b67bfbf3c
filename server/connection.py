"""What routes ask of a request over ASGI: whose it is, how large, until when of use, whether its client is there."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from starlette.requests import ClientDisconnect

from resnet_ensemble.server.classifier import Classifier
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.openapi import NotNull
from resnet_ensemble.server.service import Service

_T = TypeVar("_T")

TIMEOUT = "X-Request-Timeout"
Timeout = Annotated[
    float | None,
    NotNull(),
    Header(
        alias=TIMEOUT,
        ge=0.001,
        le=3600,
        allow_inf_nan=False,
        description="Seconds after which an answer is of no use: what is not done then is 504",
    ),
]


def service_of(request: Request) -> Service:
    """What the application serves."""
    service: Service = request.app.state.service
    return service


async def _leased(request: Request) -> AsyncIterator[Classifier]:
    with service_of(request).lease() as classifier:
        yield classifier


# What answers a request, from its beginning to its end: while another bundle takes over, too. Raises "not_ready".
Leased = Annotated[Classifier, Depends(_leased, scope="function")]


def client_of(request: Request) -> str:
    """The address that a quota counts for."""
    return request.client.host if request.client else "unknown"


def body_size(request: Request, largest: int) -> int:
    """What the body will have at most."""
    length = request.headers.get("content-length", "")
    return min(int(length), largest) if length.isdecimal() else largest


async def uploaded(reading: Awaitable[_T], allowed: float, deadline: float) -> _T:
    """Await the reading of a body. It may take `allowed` seconds, and no longer than the request has.

    Raises ApiError: "slow_upload", "deadline_exceeded".
    """
    left = deadline - time.monotonic()
    try:
        async with asyncio.timeout(min(allowed, left)):
            return await reading
    except TimeoutError:
        if left < allowed:
            detail = "the request's body did not arrive in the time that the request has"
            raise ApiError("deadline_exceeded", detail) from None
        raise ApiError("slow_upload", f"the request's body did not arrive within {allowed:g} s") from None


async def unless_disconnected(request: Request, work: Awaitable[_T]) -> _T:
    """Await `work`, but cancel it when the client goes away, so that its views leave the queues."""
    try:
        async with asyncio.timeout(None) as until:
            gone = asyncio.create_task(_disconnect(request, until))
            try:
                return await work
            finally:
                gone.cancel()
    except TimeoutError:
        if until.expired():
            raise ClientDisconnect from None
        raise
    except asyncio.CancelledError:  # uvicorn cancels what is not answered at the drain limit
        raise ApiError("not_ready", "the server stops, and its time for what it had accepted is over") from None


async def _disconnect(request: Request, until: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    until.reschedule(0)


class AsgiExchange:
    """An Exchange over ASGI."""

    def __init__(self, request: Request) -> None:
        self.headers = dict(reversed(request.scope["headers"]))
        self.query: bytes = request.scope["query_string"]
        self.client = client_of(request)
        self.request_id: str = request.state.request_id
        self._request = request
        self._more = True

    async def chunk(self, until: float) -> bytes | None:
        """As Exchange has it. Raises ClientDisconnect, too."""
        if not self._more:
            return None
        async with asyncio.timeout(until - time.monotonic()):
            message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._more = message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    async def unless_gone(self, work: Awaitable[_T]) -> _T:
        """As Exchange has it. Raises ClientDisconnect."""
        return await unless_disconnected(self._request, work)
