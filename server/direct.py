"""A connection that answers requests for a prediction itself. All others go through uvicorn's cycle, ASGI and FastAPI.

The event loop and the engines want the same cores, so what HTTP costs is taken from the images. Without ASGI's
messages, Starlette's requests and responses, and a task that waits for a client to leave, it is 0.26 ms of CPU instead
of 0.47, and there are 1.05 to 1.07 times the images/s at 1, 8 and 32 clients (CIFAR-10, one member, center, 12 rounds;
two Zen 3 cores, 2026-11-26).
"""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from resnet_ensemble.server import predict
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.exchange import (
    CLIENT_CLOSED_REQUEST,
    REQUEST_ID,
    Answer,
    BodyLimit,
    identify,
    refusal,
    stopping,
)
from resnet_ensemble.server.protocol import MOST_UNREAD, LimitedHttp
from resnet_ensemble.server.service import Service

_T = TypeVar("_T")

_PATH = predict.PATH.encode()
_REQUEST_ID = REQUEST_ID.lower().encode()


class DirectHttp(LimitedHttp):
    """What is rare is left to uvicorn.

    That is HTTP/1.0, the last request of a connection, one whose client waits for 100 Continue, and one that comes
    before the one before it is answered.
    """

    cycle: Any  # uvicorn's RequestResponseCycle, or ours

    def __init__(self, service: Service, **given: Any) -> None:
        super().__init__(service.metrics, **given)
        self.service = service
        self._own: DirectExchange | None = None  # the last of ours

    def begin_answer(self) -> None:
        usual = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        waits = self.expect_100_continue or (self.cycle is not None and not self.cycle.response_complete)
        if usual and not waits and self.parser.get_method() == b"POST":
            url = httptools.parse_url(self.url)
            if url.path == _PATH:
                self._own = DirectExchange(self, url.query or b"")
                self.cycle = self._own
                return
        super().begin_answer()

    def take(self, body: bytes) -> None:
        if self._own and self.cycle is self._own:
            self._own.take(body)
        else:
            super().take(body)

    def spoil(self, error: ApiError) -> None:
        if self._own and self.cycle is self._own:
            self._own.spoil(error)
            self.flow.pause_reading()
        else:
            super().spoil(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._own:
            self._own.leave()
        super().connection_lost(exc)


class DirectExchange:
    """An Exchange. To uvicorn's protocol it is what its own RequestResponseCycle is: first what that reads and sets."""

    response_complete = False
    more_body = True
    disconnected = False
    keep_alive = True

    def __init__(self, http: DirectHttp, query: bytes) -> None:
        self.message_event = asyncio.Event()  # something has come, or it is the end
        self.headers = dict(reversed(http.headers))
        self.query = query
        self.client = http.client[0] if http.client else "unknown"
        self.request_id = identify(self.headers.get(_REQUEST_ID, b""))
        self._http = http
        self._all_headers = http.headers
        self._limit = BodyLimit(self.headers.get(b"content-length", b""), http.service.settings.max_request_bytes)
        self._body = bytearray()  # what is there of it, and not read; one object, however many chunks it has
        self._reads = True
        self._spoilt: ApiError | None = None
        self._task = http.loop.create_task(self._answer())
        http.tasks.add(self._task)
        self._task.add_done_callback(http.tasks.discard)

    async def chunk(self, until: float) -> bytes | None:
        """As Exchange has it."""
        self._limit.add(0)
        while not self._body:
            if self._spoilt:
                raise self._spoilt
            if not self.more_body:
                return None
            self.message_event.clear()
            async with asyncio.timeout(until - time.monotonic()):
                await self.message_event.wait()
        chunk = bytes(self._body)
        self._body.clear()
        if not self._spoilt:  # at the body's end, too: it is by reading that a client is found to have left
            self._http.flow.resume_reading()
        self._limit.add(len(chunk))
        return chunk

    def unless_gone(self, work: Awaitable[_T]) -> Awaitable[_T]:
        """As Exchange has it: `leave` ends it with the rest."""
        return work

    def take(self, body: bytes) -> None:
        """The next bytes of the body."""
        if self._reads:
            self._body += body
            if len(self._body) > MOST_UNREAD:
                self._http.flow.pause_reading()
            self.message_event.set()

    def spoil(self, error: ApiError) -> None:
        """What comes next of the body can't be read, and nothing after it."""
        self._spoilt = error
        self.keep_alive = False
        self.message_event.set()

    def leave(self) -> None:
        """The client has gone."""
        if not self.response_complete:
            self.disconnected = True
            self._task.cancel()

    def _read_no_more(self) -> None:
        """What else comes is of a body that was refused; the connection keeps this exchange until its next one."""
        self._reads = False
        self._body.clear()

    async def _answer(self) -> None:
        http, service = self._http, self._http.service
        try:
            if b"x-forwarded-for" in self.headers:
                await self._look_behind_proxies()
            answer = await predict.answer(self, service)
            self._read_no_more()
            if http.flow.write_paused:  # a client that sends, and does not read
                await http.flow.drain()
        except asyncio.CancelledError:
            if self.disconnected:
                service.metrics.count("POST", predict.PATH, CLIENT_CLOSED_REQUEST)
                return
            answer = refusal(stopping(), self.request_id, service.metrics)
        service.metrics.count("POST", predict.PATH, answer.status)
        self._write(answer)

    def _write(self, answer: Answer) -> None:
        http = self._http
        http.send(answer, self.request_id, last=not self.keep_alive)
        self.response_complete = True
        self._read_no_more()
        if not self.keep_alive:
            http.transport.close()
        http.on_response_complete()

    async def _look_behind_proxies(self) -> None:
        """Find the client's own address, where a proxy that is trusted names it."""

        async def see(scope: Scope, _receive: Receive, _send: Send) -> None:
            self.client = scope["client"][0]

        proxies = ProxyHeadersMiddleware(cast("Any", see), self._http.config.forwarded_allow_ips)
        seen = {"type": "http", "client": (self.client, 0), "headers": self._all_headers}
        await proxies(cast("Any", seen), cast("Any", None), cast("Any", None))
