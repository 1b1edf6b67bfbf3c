"""One input to one row: read, send, and send again while that may help."""

import asyncio
import hashlib
import math
import time
from collections import Counter

from resnet_ensemble.client._client import AsyncClient
from resnet_ensemble.client._errors import ResnetError, StatusError
from resnet_ensemble.client._retries import delay
from resnet_ensemble.client._types import Prediction
from resnet_ensemble.client.batch import _rows
from resnet_ensemble.client.batch._aimd import Aimd
from resnet_ensemble.client.batch._gate import Gate
from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._progress import Progress
from resnet_ensemble.client.batch._rows import Row
from resnet_ensemble.client.batch._verdict import LONGEST_DELAY, Verdict, verdict


class StopJobError(Exception):
    """Every other picture would fail too; the message says why."""


class Sender:
    """Makes rows. Any number of inputs at a time: the gate says how many of them are in flight.

    The bytes of all of them are in memory, also of those that wait for the gate or for another attempt.

    - bundle: what has to answer; rows of two bundles don't belong together
    - most_bytes: what it refuses pictures above, if that is known; files of more are not read whole, nor sent
    - patience: seconds without any answer after which it stops
    """

    def __init__(
        self,
        client: AsyncClient,
        *,
        bundle: str,
        most_bytes: int | None,
        top_k: int,
        protocol: str | None,
        stop: str | None,
        max_concurrency: int,
        patience: float,
        progress: Progress,
    ) -> None:
        self._client = client
        self._bundle = bundle
        self._most = most_bytes
        self._top_k = top_k
        self._protocol = protocol
        self._stop = stop
        self._patience = patience
        self._progress = progress
        self._aimd = Aimd(most=max_concurrency)
        self._gate = Gate(self._aimd)
        self._draining = asyncio.Event()
        self._heard = -math.inf  # when a picture was answered the last time
        self._silent_since: float | None = None  # since when all have failed

    async def row(self, item: Item) -> Row | None:
        """The row of an input; None if it was not done because of `drain`. Raises StopJobError."""
        path = _rows.printable(item.path)
        most = -1 if self._most is None else self._most + 1  # one more tells that it is too large
        try:
            content = item.content if item.content is not None else await asyncio.to_thread(item.read, most)
        except OSError as error:
            return _rows.of_error(item.id, path, None, _rows.UNREADABLE, str(error))
        if self._most is not None and len(content) > self._most:
            message = f"it has more than the {self._most:,} bytes that the server takes"
            return _rows.of_error(item.id, path, None, _rows.TOO_LARGE, message)
        sha256 = hashlib.sha256(content).hexdigest()
        attempts, failures = 0, Counter[str]()
        while await self._gate.enter():
            attempts += 1
            began = time.monotonic()
            try:
                answer = await self._send(content)
                failed = verdict(answer, failures) if isinstance(answer, ResnetError) else None
                self._count(answer, failed, began)
            finally:
                self._gate.leave()
                self._progress.concurrency = self._gate.in_flight
            if isinstance(answer, Prediction):
                if answer.bundle != self._bundle:
                    raise StopJobError(f"the server has changed from {self._bundle} to {answer.bundle}")
                latency = 1000 * (time.monotonic() - began)
                self._progress.latencies_ms.append(latency)
                return _rows.of_prediction(item.id, path, sha256, answer, latency)
            if failed is Verdict.STOP:
                raise StopJobError(str(answer))
            # A picture that gets no answer may be to blame, but not when none gets one.
            if self._silent_since is not None and time.monotonic() - self._silent_since > self._patience:
                raise StopJobError(f"nothing was answered for {self._patience:g} s; the last error: {answer}")
            if failed is Verdict.ROW:
                return _rows.of_error(item.id, path, sha256, _rows.error_code(answer), _rows.error_message(answer))
            await self._pause(answer, attempts)
        return None

    def drain(self) -> None:
        """Finish what is in flight and begin nothing more."""
        self._draining.set()
        self._gate.close()

    async def _send(self, content: bytes) -> Prediction | ResnetError:
        self._progress.requests += 1
        self._progress.concurrency = self._gate.in_flight
        try:
            return await self._client.classify(content, top_k=self._top_k, protocol=self._protocol, stop=self._stop)
        except ResnetError as error:
            return error

    def _count(self, answer: Prediction | ResnetError, failed: Verdict | None, began: float) -> None:
        if failed is None or (failed is Verdict.ROW and isinstance(answer, StatusError)):
            self._heard, self._silent_since = time.monotonic(), None
            self._aimd.succeeded()
            return
        if self._silent_since is None:
            self._silent_since = max(began, self._heard)  # not before it failed: there may have been nothing to ask
        if failed is Verdict.REFUSED:
            self._progress.refusals += 1
            self._aimd.refused(sent=began, now=time.monotonic())

    async def _pause(self, error: ResnetError, attempts: int) -> None:
        """Wait as long as the server asked for, or a little longer each time; less when draining or out of patience."""
        asked = error.retry_after if isinstance(error, StatusError) else None
        seconds = delay(attempts - 1, asked or None)  # at once, again and again, would drown a busy server
        if not asked:
            seconds = min(seconds, LONGEST_DELAY)
        if self._silent_since is not None:
            seconds = min(seconds, self._silent_since + self._patience - time.monotonic())
        try:
            async with asyncio.timeout(seconds):
                await self._draining.wait()
        except TimeoutError:
            pass  # the usual case: it is time for another attempt
