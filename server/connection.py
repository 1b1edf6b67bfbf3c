"""What routes ask of a request over ASGI: what answers it, until when it is of use, its body, if a client is there."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from starlette.requests import ClientDisconnect

from resnet_ensemble.server.classifier import Classifier
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


class AsgiExchange:
    """An Exchange over ASGI."""

    def __init__(self, request: Request) -> None:
        self.headers = dict(reversed(request.scope["headers"]))
        self.query: bytes = request.scope["query_string"]
        self.client = request.client.host if request.client else "unknown"
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
        try:
            async with asyncio.timeout(None) as until:
                gone = asyncio.create_task(self._leave(until))
                try:
                    return await work
                finally:
                    gone.cancel()
        except TimeoutError:
            if until.expired():
                raise ClientDisconnect from None
            raise

    async def _leave(self, until: asyncio.Timeout) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        until.reschedule(0)
