"""Both clients behind one face, so that every test of the SDK runs on both, and answers to script."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.client import Answer, AsyncClient, Client, Info, Prediction
from tests.server.test_process import process, wait_until_ready

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@dataclass
class Blocking:
    """An AsyncClient with the methods of a Client. `run` runs a coroutine where its connections live."""

    client: AsyncClient
    run: Run

    def classify(self, image: Any, **options: Any) -> Prediction:
        answer: Prediction = self.run(self.client.classify(image, **options))
        return answer

    def classify_many(self, images: Iterable[Any], **options: Any) -> Iterator[Answer]:
        async def following(answers: Any) -> Any:
            return await anext(answers, None)

        answers = self.client.classify_many(images, **options)
        while (answer := self.run(following(answers))) is not None:
            yield answer

    def info(self) -> Info:
        info: Info = self.run(self.client.info())
        return info

    def ready(self) -> bool:
        ready: bool = self.run(self.client.ready())
        return ready

    def with_options(self, **options: Any) -> "Blocking":
        return Blocking(self.client.with_options(**options), self.run)

    def close(self) -> None:
        self.run(self.client.close())


Either = Client | Blocking
Png = Callable[..., bytes]
Scripted = Callable[..., tuple[Either, list[httpx2.Request]]]


def problem(status: int, code: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"code": code, "detail": "why"}, headers={"X-Request-ID": "r1", **headers})


PREDICTION = {
    "label": "cat",
    "index": 3,
    "probability": 0.9,
    "top": [{"label": "cat", "index": 3, "probability": 0.9}],
    "members": [{"member": "resnet20", "label": "cat", "index": 3, "probability": 0.8}],
    "protocol": "10crop",
    "views_used": 20,
    "views_planned": 20,
    "bundle": "cifar10-1-0",
    "timings_ms": {"total": 1.0},
    "a field of a newer server": None,
}


def ok(**fields: Any) -> httpx2.Response:
    return httpx2.Response(200, json=PREDICTION | fields, headers={"X-Request-ID": "r0"})


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Either]]:
    """Make a client, given httpx2's transport and the client's options."""
    if request.param == "sync":
        yield lambda transport, **options: Client(http_client=httpx2.Client(transport=transport), **options)
        return
    with asyncio.Runner() as runner:
        yield lambda transport, **options: Blocking(
            AsyncClient(http_client=httpx2.AsyncClient(transport=transport), **options), runner.run
        )


@pytest.fixture
def scripted(make: Callable[..., Either]) -> Callable[..., tuple[Either, list[httpx2.Request]]]:
    """A client whose server gives these answers in turn, and the requests that it sees."""

    def scripted(*answers: httpx2.Response | Exception, **options: Any) -> tuple[Either, list[httpx2.Request]]:
        requests: list[httpx2.Request] = []
        script = iter(answers)

        def answer(request: httpx2.Request) -> httpx2.Response:
            requests.append(request)
            following = next(script)
            if isinstance(following, Exception):
                raise following
            # a new one each time: a response belongs to the kind of client that has read it
            return httpx2.Response(following.status_code, headers=following.headers, content=following.content)

        return make(httpx2.MockTransport(answer), **{"url": "http://x", **options}), requests

    return scripted


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing sleeps; the waits are kept."""
    kept: list[float] = []
    really_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        kept.append(seconds)
        await really_sleep(0)

    monkeypatch.setattr(time, "sleep", kept.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return kept


@pytest.fixture
def ports() -> Iterator[str]:
    """A server whose answers have the client's port as their label: connections that are one have one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps(PREDICTION | {"label": str(self.client_address[1])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def fake_server() -> Iterator[str]:
    """A server process on fake engines, behind a real socket."""
    with process(RESNET_BACKEND="fake") as (_, url):
        wait_until_ready(url)
        yield url


@pytest.fixture(params=["sync in process", "async in process", "sync over a socket", "async over a socket"])
def connected(request: pytest.FixtureRequest) -> Iterator[Either]:
    """Each client, connected to the real application on fake engines in each way."""
    if request.param == "sync in process":
        with Client("http://testserver", http_client=request.getfixturevalue("client")) as client:
            yield client
    elif request.param == "async in process":
        served: TestClient = request.getfixturevalue("client")
        portal, transport = served.portal, httpx2.ASGITransport(served.app)
        assert portal is not None
        in_process = AsyncClient("http://testserver", http_client=httpx2.AsyncClient(transport=transport))
        yield Blocking(in_process, lambda coroutine: portal.call(_itself, coroutine))
    elif request.param == "sync over a socket":
        with Client(request.getfixturevalue("fake_server")) as client:
            yield client
    else:
        with asyncio.Runner() as runner:
            over_socket = Blocking(AsyncClient(request.getfixturevalue("fake_server")), runner.run)
            yield over_socket
            over_socket.close()


async def _itself(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine
