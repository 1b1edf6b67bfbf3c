"""HTTP/1.1 as uvicorn speaks it, but the head of a request, too, may only be so large and take so long.

What is no request is answered with a problem document, as everything else is. And it takes fewer system calls: an
answer is written at once, and reading a photograph does not stop half-way.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from resnet_ensemble.server.envelope import UNMATCHED
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.exchange import REQUEST_ID, Answer, identify, refusal
from resnet_ensemble.server.metrics import Metrics

# httptools has no limit of its own: 100 MB of header lines take 1.6 GB. A browser's longest line is a cookie of 4 KiB.
MAX_HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 30.0
_LINGER_SECONDS = 2.0
# Java's client offers HTTP/2 in every request. We speak no other protocol, and httptools would drop the body.
_UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)
_LOOKED_BACK = len(b"\r\nupgrade")  # where a head is cut, neither this with its colon nor its end may be overlooked
# A connection is not read any further while the application has not taken so much of a body. uvicorn's 64 KiB is less
# than a photograph has, and less than uvloop reads at once: two system calls to stop, and to go on at once.
MOST_UNREAD = 256 * 2**10
httptools_impl.HIGH_WATER_LIMIT = MOST_UNREAD  # type: ignore[attr-defined]


class AtOnce:
    """A transport that writes what one turn of the event loop gives it together.

    uvicorn writes an answer's head by itself. Its client would be woken for that, and once more for the body. With this
    and the limit above, 1.03 (one client) and 1.05 times (32) the images/s (CIFAR-10 center, 14 rounds; two Zen 3
    cores, 2026-11-26). `close`: how to end it.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        close: Callable[[asyncio.Transport], None],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._close = close
        self._closing = False
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Later in this turn, or with what comes until then."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def close(self) -> None:
        """When all is written."""
        if not self._closing:
            self.flush()
            self._closing = True
            self._close(self._transport)

    def is_closing(self) -> bool:
        """Nothing is written, or taken for a request, any more."""
        return self._closing or self._transport.is_closing()

    def flush(self) -> None:
        """Now."""
        if self._waiting and not self.is_closing():  # it may have been lost since
            self._transport.write(b"".join(self._waiting))
        self._waiting.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class LimitedHttp(HttpToolsProtocol):
    """Closes a connection whose request has no end of its head in time; only then is there someone to answer.

    Nor may what is neither a part of a body nor the end of a head grow without end, such as trailers.
    """

    _without_end = 0  # bytes of such
    _moved = False  # whether what was read last had a part of a body, or an end
    _tail = b""  # of a head that goes on: in it, what is looked for may begin
    _in_head = False
    _before_body = True  # also between two requests
    _timer: asyncio.TimerHandle | None = None
    _broken: ApiError | None = None  # what is wrong with a request that those before it are answered before

    def __init__(self, metrics: Metrics, **given: Any) -> None:
        super().__init__(**given)
        self._metrics = metrics

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        at_once = AtOnce(transport, self.loop, self._linger)
        super().connection_made(cast("asyncio.Transport", at_once))
        self.flush = at_once.flush
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arrived()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._before_body:
            before, seen = len(self._tail), self._tail + data
            end = seen.find(b"\r\n\r\n")
            head = seen if end < 0 else seen[:end]
            if self._without_end + len(head) - before > MAX_HEAD_BYTES:
                self.refuse(ApiError("head_too_large", f"a request's head may have at most {MAX_HEAD_BYTES} bytes"))
                return
            if _UPGRADE.search(head):  # what is added stands before the colon, which has just come
                data = (_UPGRADE.sub(rb"\g<0>-Ignored", head) + seen[len(head) :])[before:]
            self._tail = seen[-_LOOKED_BACK:] if end < 0 else b""
        self._moved = False
        super().data_received(data)
        self._without_end = 0 if self._moved else self._without_end + len(data)
        if self._without_end > MAX_HEAD_BYTES:
            self.refuse(ApiError("head_too_large", f"trailers may have at most {MAX_HEAD_BYTES} bytes"))
        elif (self._in_head or self._idle) and self._timer is None:  # most heads arrive whole and need none
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._arrived()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._arrived()
        self._moved = True
        self.begin_answer()  # what can't be, such as an impossible target, is still answered as a head
        self._before_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._before_body:  # a trailer is no header (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def begin_answer(self) -> None:
        """The head of a request is there."""
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        self.take(body)

    def take(self, body: bytes) -> None:
        """A part of a body."""
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = self._before_body = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # it says less
        """Uvicorn could not read what came."""
        self.refuse(ApiError("malformed_request", "what came is not HTTP/1.1"))

    def _unsupported_upgrade_warning(self) -> None:
        """A head that offers an upgrade and was not the first of a read: what follows would be read as a request."""
        self.refuse(ApiError("malformed_request", "a pipelined request can't change the protocol"))

    def refuse(self, error: ApiError) -> None:
        """Tell what is no request, and close. One that came whole before it was accepted, and has the last answer."""
        self._arrived()
        answered = self.cycle is None or self.cycle.response_complete
        if not answered and self._before_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        elif not answered and self.pipeline:
            self.pipeline.popleft()
            self._broken = error
            self.flow.pause_reading()
        elif not answered:
            self.spoil(error)
        else:
            if self._before_body:
                self._metrics.count("unknown", UNMATCHED, error.kind.status)
                self._tell(error)
            self._before_body = False  # what else comes is not wanted, either
            self.transport.close()

    def on_response_complete(self) -> None:
        if self._broken and not self.pipeline and not self.transport.is_closing():
            self._metrics.count("unknown", UNMATCHED, self._broken.kind.status)
            self._tell(self._broken)
            self.transport.close()
            return
        super().on_response_complete()

    def spoil(self, error: ApiError) -> None:
        """The body of the request that is in progress can't be read any further."""
        self.scope["state"]["told"] = error.kind.status
        self._tell(error)
        self.transport.close()

    def send(self, answer: Answer, request_id: str, *, last: bool) -> None:
        """Write an answer. `last`: of this connection."""
        of_server = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        lines = [f"{name}: {value}\r\n" for name, value in answer.headers.items()]
        if last:
            lines.append("connection: close\r\n")
        own = f"content-length: {len(answer.body)}\r\n{REQUEST_ID}: {request_id}\r\n{''.join(lines)}\r\n"
        self.transport.write(b"".join([STATUS_LINE[answer.status], *of_server, own.encode("latin-1"), answer.body]))
        self.flush()

    def _tell(self, error: ApiError) -> None:
        request_id = identify(b"")
        self.send(refusal(error, request_id, self._metrics), request_id, last=True)

    def _unset_keepalive_if_required(self) -> None:
        # A body whose request was refused has as much time as a client has between two requests.
        if self._before_body or self.transport.is_closing() or not self.cycle.response_complete:
            super()._unset_keepalive_if_required()

    @property
    def _idle(self) -> bool:
        """No request is in progress, and yet something came: an empty line, after which there may be a head."""
        answered = self.cycle is None or self.cycle.response_complete
        return self._before_body and answered and self.timeout_keep_alive_task is None

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self._in_head:
            self.refuse(ApiError("slow_upload", f"the request's head did not arrive within {HEAD_SECONDS:g} s"))
        else:
            self.transport.abort()

    def _arrived(self) -> None:
        self._in_head = False
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _linger(self, transport: asyncio.Transport) -> None:
        """Close, but let the body of a request that was refused arrive first.

        A system answers what comes to a closed connection with a reset, upon which a client that still sends does not
        read the answer.
        """
        if self._before_body or transport.is_closing():
            transport.close()
            return
        transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, transport.close)
