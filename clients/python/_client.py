"""The clients: the same names, the same answers; one blocks, the other is awaited."""

import collections
import copy
import math
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self, TypeAlias, TypeVar

import httpx2

from resnet_ensemble.client import _connections, _protocol
from resnet_ensemble.client._errors import ResnetError
from resnet_ensemble.client._images import Image, encoded
from resnet_ensemble.client._protocol import Conversation, Options, Outcome, Request
from resnet_ensemble.client._retries import DEFAULT_RETRIES, DEFAULT_RETRY_SECONDS
from resnet_ensemble.client._types import Info, Prediction

Answer: TypeAlias = Prediction | ResnetError | OSError
"""What `classify_many` gives for an image: its prediction, or why there is none."""

_T = TypeVar("_T")


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"the concurrency is {concurrency}; it must be at least 1")


def _changed(options: Options, **given: Any) -> Options:
    return replace(options, **{name: value for name, value in given.items() if value is not None})


class Client:
    """Talks to one server over kept-alive connections. Thread-safe. Use it in a `with` block, or call `close`.

    A process that was forked has connections of its own; those of an `http_client` it must not share.

    - url: where the server is; by default $RESNET_CLIENT_URL or http://localhost:8000
    - api_key: sent as a bearer token, for a gateway in front of the server; by default $RESNET_CLIENT_API_KEY or none
    - timeout: seconds for an answer, or an httpx2.Timeout; by default 60, and 5 to connect, or what `http_client` has.
      One that comes little by little may take twice as long. The server is told, refuses at once what it could not
      answer in time, and drops what nobody waits for
    - max_retries: attempts after the first, on connection errors, 408, 429 and 5xx, as `Retry-After` asks
    - retry_seconds: no retry begins later than this after the first attempt
    - http_client: an httpx2.Client of your own (proxies, certificates, transports); it is not closed by this one
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout | None = None,
        max_retries: int = DEFAULT_RETRIES,
        retry_seconds: float = DEFAULT_RETRY_SECONDS,
        http_client: httpx2.Client | None = None,
    ) -> None:
        self._options = Options(url, api_key, timeout, max_retries, retry_seconds)
        self._connections = _connections.blocking(http_client)
        self._closes = self._connections.ours
        self._left: threading.Event | None = None  # when it is set, nobody waits for this client's answers any more

    def classify(
        self,
        image: Image,
        *,
        top_k: int = 5,
        protocol: str | None = None,
        stop: str | None = None,
        abstain_below: float | None = None,
    ) -> Prediction:
        """Classify one image.

        - image: a path, encoded bytes, a file opened in binary mode, a PIL image, or a NumPy array of uint8
        - top_k: how many classes to answer
        - protocol: which views to average, such as "center" or "10crop"; the server's own by default
        - stop: when to stop evaluating views, such as "full" or "exact"; the server's own by default
        - abstain_below: the probability below which the answer says `abstained`; by default it never does

        Raises ResnetError and its kin, OSError for a path that can't be read, TypeError for what is no image.
        """
        conversation = _protocol.predict(
            self._options,
            encoded(image),
            top_k=top_k,
            protocol=protocol,
            stop=stop,
            abstain_below=abstain_below,
            seconds=self._options.seconds(self._connections.here().timeout),
        )
        return self._run(conversation)

    def classify_many(
        self,
        images: Iterable[Image],
        *,
        top_k: int = 5,
        protocol: str | None = None,
        stop: str | None = None,
        abstain_below: float | None = None,
        concurrency: int = 8,
    ) -> Iterator[Answer]:
        """Classify images, `concurrency` at a time, and give their answers in order. Options are those of `classify`.

        An image that fails gives its error as a value. `images` may be endless: it is read little by little, and
        nothing is begun before the first answer is asked for. Leaving early waits for the requests that are in flight,
        and sends none again.
        """
        _check(concurrency)
        client: Client = copy.copy(self)
        client._left = threading.Event()

        def classify(image: Image) -> Answer:
            try:
                return client.classify(image, top_k=top_k, protocol=protocol, stop=stop, abstain_below=abstain_below)
            except (ResnetError, OSError) as error:
                return error

        pending: collections.deque[Future[Answer]] = collections.deque()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="classify")
        try:
            for image in images:
                pending.append(pool.submit(classify, image))
                if len(pending) >= 2 * concurrency:  # so that one slow image does not hold up the others at once
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            client._left.set()
            pool.shutdown(cancel_futures=True)

    def info(self) -> Info:
        """What the server serves."""
        return self._run(_protocol.info(self._options))

    def ready(self) -> bool:
        """Whether the server can classify now. Asks once; False also when nothing answers."""
        return self._run(_protocol.ready(self._options))

    def with_options(
        self,
        *,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout | None = None,
        max_retries: int | None = None,
        retry_seconds: float | None = None,
    ) -> "Client":
        """A client with other options over the same connections, which stay this one's to close."""
        client: Client = copy.copy(self)
        client._closes = False
        client._options = _changed(
            self._options, api_key=api_key, timeout=timeout, max_retries=max_retries, retry_seconds=retry_seconds
        )
        return client

    def close(self) -> None:
        """Close the connections."""
        if self._closes:
            self._connections.here().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, conversation: Conversation[_T]) -> _T:
        outcome: Outcome = None
        while True:
            try:
                step = conversation.send(outcome)
            except StopIteration as finished:
                answer: _T = finished.value
                return answer
            if isinstance(step, Request):
                outcome = self._send(step)
            else:
                outcome = None
                if self._left is None:
                    time.sleep(step)
                elif self._left.wait(step):
                    raise CancelledError

    def _send(self, request: Request) -> httpx2.Response | httpx2.RequestError:
        client = self._connections.here()
        latest = time.monotonic() + _at_most(self._options.seconds(client.timeout))
        try:
            with client.stream(request.method, request.url, **request.arguments) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > latest:
                        raise httpx2.ReadTimeout("the answer does not end", request=response.request)
                return _whole(response, bytes(content))
        except httpx2.RequestError as error:
            return error


class AsyncClient:
    """Client for asyncio: the same options and answers. Use it in an `async with` block, or await `close`.

    One event loop after the other may use it, each with connections of its own, but for those of an `http_client`.

    http_client: an httpx2.AsyncClient of your own; it is not closed by this one
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout | None = None,
        max_retries: int = DEFAULT_RETRIES,
        retry_seconds: float = DEFAULT_RETRY_SECONDS,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._options = Options(url, api_key, timeout, max_retries, retry_seconds)
        self._connections = _connections.awaited(http_client)
        self._closes = self._connections.ours

    async def classify(
        self,
        image: Image,
        *,
        top_k: int = 5,
        protocol: str | None = None,
        stop: str | None = None,
        abstain_below: float | None = None,
    ) -> Prediction:
        """Classify one image; see Client.classify. What has to be read or encoded is, in a thread."""
        import asyncio  # noqa: PLC0415  # it takes long to import, and who has a Client needs none

        content = image if isinstance(image, bytes) else await asyncio.to_thread(encoded, image)
        conversation = _protocol.predict(
            self._options,
            content,
            top_k=top_k,
            protocol=protocol,
            stop=stop,
            abstain_below=abstain_below,
            seconds=self._options.seconds(self._connections.here().timeout),
        )
        return await self._run(conversation)

    async def classify_many(
        self,
        images: Iterable[Image] | AsyncIterable[Image],
        *,
        top_k: int = 5,
        protocol: str | None = None,
        stop: str | None = None,
        abstain_below: float | None = None,
        concurrency: int = 8,
    ) -> AsyncIterator[Answer]:
        """Classify images, `concurrency` at a time, and give their answers in order; see Client.classify_many."""
        import asyncio  # noqa: PLC0415  # it takes long to import, and who has a Client needs none

        _check(concurrency)
        running = asyncio.Semaphore(concurrency)

        async def classify(image: Image) -> Answer:
            async with running:
                try:
                    return await self.classify(
                        image, top_k=top_k, protocol=protocol, stop=stop, abstain_below=abstain_below
                    )
                except (ResnetError, OSError) as error:
                    return error

        pending: collections.deque[asyncio.Task[Answer]] = collections.deque()
        try:
            async for image in _each(images):
                pending.append(asyncio.create_task(classify(image)))
                if len(pending) >= 2 * concurrency:
                    yield await pending[0]
                    pending.popleft()
            while pending:
                yield await pending[0]
                pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def info(self) -> Info:
        """What the server serves."""
        return await self._run(_protocol.info(self._options))

    async def ready(self) -> bool:
        """Whether the server can classify now. Asks once; False also when nothing answers."""
        return await self._run(_protocol.ready(self._options))

    def with_options(
        self,
        *,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout | None = None,
        max_retries: int | None = None,
        retry_seconds: float | None = None,
    ) -> "AsyncClient":
        """A client with other options over the same connections, which stay this one's to close."""
        client: AsyncClient = copy.copy(self)
        client._closes = False
        client._options = _changed(
            self._options, api_key=api_key, timeout=timeout, max_retries=max_retries, retry_seconds=retry_seconds
        )
        return client

    async def close(self) -> None:
        """Close the connections."""
        if self._closes:
            await self._connections.here().aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _run(self, conversation: Conversation[_T]) -> _T:
        import asyncio  # noqa: PLC0415  # it takes long to import, and who has a Client needs none

        outcome: Outcome = None
        while True:
            try:
                step = conversation.send(outcome)
            except StopIteration as finished:
                answer: _T = finished.value
                return answer
            if isinstance(step, Request):
                outcome = await self._send(step)
            else:
                outcome = None
                await asyncio.sleep(step)

    async def _send(self, request: Request) -> httpx2.Response | httpx2.RequestError:
        import asyncio  # noqa: PLC0415  # it takes long to import, and who has a Client needs none

        client = self._connections.here()
        seconds = _at_most(self._options.seconds(client.timeout))
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                return await client.request(request.method, request.url, **request.arguments)
        except httpx2.RequestError as error:
            return error
        except TimeoutError:
            return httpx2.ReadTimeout("the answer does not end")


def _at_most(seconds: float | None) -> float:
    """For a request and its answer as a whole; each part of them may take `seconds`, from one byte to the next."""
    return math.inf if seconds is None else 2 * seconds


def _whole(response: httpx2.Response, content: bytes) -> httpx2.Response:
    """The answer with its body, which was read and decoded as it came."""
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() != "content-encoding"]
    return httpx2.Response(response.status_code, headers=headers, content=content, request=response.request)


async def _each(images: Iterable[Image] | AsyncIterable[Image]) -> AsyncIterator[Image]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
