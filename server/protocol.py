"""HTTP/1.1 as uvicorn speaks it, but the head of a request, too, may only be so large and take so long."""

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# httptools has no limit of its own: 100 MB of header lines take 1.6 GB. A browser's longest line is a cookie of 4 KiB.
MAX_HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 30.0
# Java's client offers HTTP/2 in every request. We speak no other protocol, and httptools would drop the body.
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class LimitedHttp(HttpToolsProtocol):
    """Closes a connection whose request has no end of its head in time; only then is there someone to answer."""

    _head = 0  # bytes of a head that is not complete
    _in_head = True
    _before_body = True  # also between two requests
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arrived()

    def data_received(self, data: bytes) -> None:
        if self._before_body:
            end = data.find(b"\r\n\r\n")
            head = data if end < 0 else data[:end]
            if _UPGRADE.search(head):
                data = _UPGRADE.sub(b"\r\nX-Ignored:", head) + data[len(head) :]
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD_BYTES:
                self.transport.abort()
            elif self._timer is None:  # most heads arrive whole and need none
                self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arrived()
        self._in_head, self._head = True, 0

    def on_headers_complete(self) -> None:
        self._arrived()
        self._before_body = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._before_body = True
        super().on_message_complete()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _arrived(self) -> None:
        self._in_head = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
