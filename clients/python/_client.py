"""The synchronous client."""

import importlib.metadata
import io
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias, TypeVar, Union

import httpx2

from resnet_ensemble.client._errors import (
    ConnectionFailedError,
    ResponseError,
    StatusError,
    TimedOutError,
    error_class,
)
from resnet_ensemble.client._retries import DEFAULT_RETRIES, delay, parse_retry_after, retryable
from resnet_ensemble.client._types import Info, Prediction

if TYPE_CHECKING:
    import PIL.Image

DEFAULT_TIMEOUT = httpx2.Timeout(60.0, connect=5.0)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

Image: TypeAlias = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO, "PIL.Image.Image"]
"""A path, encoded bytes, a file opened in binary mode, or a PIL image."""

_T = TypeVar("_T")


class Client:
    """Talks to one server over kept-alive connections. Thread-safe. Use it in a `with` block, or call `close`.

    - url: where the server is
    - timeout: seconds for an answer, or an httpx2.Timeout; by default 60, and 5 to connect, or what `http_client` has
    - max_retries: attempts after the first, on connection errors, 408, 429 and 5xx
    - http_client: an httpx2.Client of your own (proxies, certificates, transports); it is not closed by this one
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        timeout: float | httpx2.Timeout | None = None,
        max_retries: int = DEFAULT_RETRIES,
        http_client: httpx2.Client | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._max_retries = max_retries
        self._owns_http = http_client is None
        self._http = http_client or httpx2.Client(timeout=DEFAULT_TIMEOUT)
        self._timeout: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        self._headers = {"User-Agent": f"resnet-ensemble-python/{importlib.metadata.version('resnet-ensemble')}"}

    def classify(
        self,
        image: Image,
        *,
        top_k: int = 5,
        protocol: str | None = None,
    ) -> Prediction:
        """Classify one image.

        - image: a path, encoded bytes, a file opened in binary mode, or a PIL image
        - top_k: how many classes to answer
        - protocol: "center", "flip" or "10crop"; the server's own by default

        Raises ResnetError and its kin, and OSError for a path that can't be read.
        """
        options: dict[str, str | int] = {"top_k": top_k}
        if protocol is not None:
            options["protocol"] = protocol
        response = self._request(
            "POST", "/predict", params=options, content=encoded(image), content_type="application/octet-stream"
        )
        return _parsed(response, lambda answer: Prediction.parse(answer, response.headers.get("x-request-id", "")))

    def info(self) -> Info:
        """What the server serves."""
        return _parsed(self._request("GET", "/info"), Info.parse)

    def ready(self) -> bool:
        """Whether the server can classify now. Asks once; False also when nothing answers."""
        try:
            return self._send("GET", "/readyz").status_code == httpx2.codes.OK
        except ConnectionFailedError:
            return False

    def close(self) -> None:
        """Close the connections."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, method: str, path: str, *, content_type: str | None = None, **request: Any) -> httpx2.Response:
        """Send, and send again while the policy allows. Raises ResnetError."""
        retry = 0
        while True:
            error: ConnectionFailedError | StatusError
            wait: float | None = None
            try:
                response = self._send(method, path, content_type=content_type, **request)
            except ConnectionFailedError as failure:
                error, wait = failure, delay(retry, None)
            else:
                if response.is_success:
                    return response
                error = _status_error(response)
                if retryable(error.status):
                    wait = delay(retry, error.retry_after)
            if wait is None or retry == self._max_retries:
                raise error
            time.sleep(wait)
            retry += 1

    def _send(self, method: str, path: str, *, content_type: str | None = None, **request: Any) -> httpx2.Response:
        headers = self._headers | ({"Content-Type": content_type} if content_type else {})
        try:
            return self._http.request(method, self._url + path, headers=headers, **self._timeout, **request)
        except httpx2.TimeoutException as error:
            raise TimedOutError(f"no answer from {self._url}{path} in time ({type(error).__name__})") from error
        except httpx2.TransportError as error:
            raise ConnectionFailedError(f"no connection to {self._url}: {error}") from error


def encoded(image: Image) -> bytes:
    """The bytes to send for an image. Raises TypeError for what is none."""
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return file.read()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    # PIL is recognised by where its classes live, so that the SDK neither needs nor imports it.
    if any(base.__module__ == "PIL.Image" for base in type(image).__mro__):
        return _png(image)
    read = getattr(image, "read", None)
    content = read() if callable(read) else None
    if not isinstance(content, bytes):
        raise TypeError(
            f"an image must be a path, bytes, a file opened in binary mode or a PIL image, not {type(image).__name__}"
        )
    return content


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(content, "PNG")
    return content.getvalue()


def _status_error(response: httpx2.Response) -> StatusError:
    """The typed error for a problem document, or for whatever a proxy answered instead."""
    try:
        problem = response.json()
        code, detail = str(problem["code"]), str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        code, detail = "unknown", response.text[:200]
    request_id = response.headers.get("x-request-id", "")
    retry_after = parse_retry_after(response.headers.get("retry-after"))
    return error_class(response.status_code, code)(response.status_code, code, detail, request_id, retry_after)


def _parsed(response: httpx2.Response, parse: Callable[[Any], _T]) -> _T:
    try:
        return parse(response.json())
    except (ValueError, KeyError, TypeError) as error:
        raise ResponseError(f"{response.url} answered something else than a resnet-ensemble server: {error}") from error
