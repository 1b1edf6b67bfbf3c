"""What surrounds every request: its id, the limit on its body, its count in the metrics."""

import random
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics

REQUEST_ID = "X-Request-ID"
_HEADER = REQUEST_ID.lower().encode()
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Envelope:
    """ASGI middleware. A client's own X-Request-ID is kept when it is harmless, otherwise one is made."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_request_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max = max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        # Not uuid4: it asks the system for bytes, and whoever calls that waits for the interpreter lock afterwards.
        request_id = given if _SAFE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id
        announced = headers.get("content-length", "")
        received = int(announced) if announced.isdecimal() and int(announced) > self._max else 0

        async def receive_within_limit() -> Message:
            nonlocal received
            if received <= self._max:
                message = await receive()
                received += len(message.get("body", b""))
            if received > self._max:
                raise ApiError("request_too_large", f"the request's body may have at most {self._max} bytes")
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((_HEADER, request_id.encode()))
                route = scope.get("route")
                path = route.path if route is not None else "unmatched"
                self._metrics.requests.labels(scope["method"], path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive_within_limit, send_with_id)
