"""What surrounds a request over ASGI: its id, the limit on its body, its count in the metrics, its end."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resnet_ensemble.server.exchange import REQUEST_ID, BodyLimit, identify
from resnet_ensemble.server.metrics import Metrics

UNMATCHED = "unmatched"


def route(scope: Scope) -> str:
    """What requests are counted by: a path with parameters."""
    found = scope.get("route")
    return UNMATCHED if found is None else found.path


class Envelope:
    """ASGI middleware. A client's own X-Request-ID is kept when it is harmless, otherwise one is made.

    What takes GET takes HEAD, too.

    - on_cancelled: what a request is answered that uvicorn cancels, as it does at the drain limit
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_request_bytes: int,
        on_cancelled: Callable[[Request], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max = max_request_bytes
        self._on_cancelled = on_cancelled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = identify(headers.get(REQUEST_ID, "").encode("latin-1"))
        scope.setdefault("state", {})["request_id"] = request_id
        limit = BodyLimit(headers.get("content-length", "").encode("latin-1"), self._max)

        method = scope["method"]
        if method == "HEAD":  # what GET answers, of which the server that carries it leaves out the body
            scope = {**scope, "method": "GET"}

        async def receive_within_limit() -> Message:
            limit.add(0)
            message = await receive()
            limit.add(len(message.get("body", b"")))
            return message

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                message["headers"].append((REQUEST_ID.lower().encode(), request_id.encode()))
                self._metrics.count(method, route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive_within_limit, send_with_id)
        except asyncio.CancelledError:
            if started:
                raise
            response = await self._on_cancelled(Request(scope))
            await response(scope, receive, send_with_id)
