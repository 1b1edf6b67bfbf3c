"""Predictions that a connection answers itself, over real sockets, beside those that go through uvicorn and FastAPI."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from resnet_ensemble.server import direct, predict
from resnet_ensemble.server.direct import DirectHttp
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.protocol import MOST_UNREAD
from resnet_ensemble.server.settings import Settings
from tests.server.sockets import connect, head, received
from tests.server.test_process import wait_for
from tests.server.test_refusals import RAW, Gate, assert_problem

Png = Callable[..., bytes]
Listen = Callable[..., Any]
THROUGH_ASGI = {"Connection": "close"}


@pytest.mark.parametrize(
    ("query", "body", "status"),
    [
        ("", "image", 200),
        ("?protocol=center&top_k=2", "form", 200),
        ("", "options", 200),
        ("", "damaged and sound", 200),
        ("", "damaged", 415),
        ("", "cut off", 400),
        ("?top_k=0", "image", 422),
        ("?top_k=1&top_k=2", "image", 422),
    ],
)
def test_a_connection_answers_as_the_application_does(
    listen: Listen, png: Png, query: str, body: str, status: int
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "image": {"content": png(142), "headers": RAW},
        "form": {"files": [("image", png(142))]},
        "options": {"files": [("image", png(142))], "data": {"protocol": "flip"}},
        "damaged and sound": {"files": [("image", b"no image"), ("image", png(142))]},
        "damaged": {"content": b"no image", "headers": RAW},
        "cut off": {"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    }
    request = bodies[body]
    with listen() as (url, directly), httpx2.Client() as client:
        answers = []
        for way in ({}, THROUGH_ASGI):
            headers = request.get("headers", {}) | {"X-Request-ID": "mine"} | way
            answer = client.post(f"{url}/predict{query}", **request | {"headers": headers})
            same = {name: answer.headers.get(name) for name in ("content-type", "x-bundle", "x-request-id", "server")}
            text = re.sub(r'"timings_ms":\{.*?\}', "", answer.text)
            answers.append((answer.status_code, text, same, answer.headers.keys() - {"connection"}))

        assert answers[0] == answers[1]
        assert directly == [status] == [answers[0][0]]  # one of them; the other went through the application
        counted = f'resnet_requests_total{{method="POST",route="/predict",status="{status}"}} 2.0'
        assert counted in client.get(f"{url}/metrics").text


def test_a_body_may_come_in_pieces(listen: Listen, png: Png) -> None:
    with listen() as (url, directly), connect(url) as connection:
        request = head(len(png())) + png()
        for start in range(0, len(request), 7):
            connection.sendall(request[start : start + 7])
            time.sleep(0.001)

        assert received(connection, 1).startswith(b"HTTP/1.1 200 OK\r\n")
        assert directly == [200]


@pytest.mark.parametrize("path", ["/predict", "/v2/models/cifar10/infer"])
def test_what_would_wait_too_long_is_refused_before_its_body_is_there(listen: Listen, png: Png, path: str) -> None:
    gate = Gate(seconds_per_view=0.005)
    with listen(gate, streams=1, max_wait_seconds=0.02) as (url, _), ThreadPoolExecutor(1) as pool:
        first = gate.hold(lambda: pool.submit(httpx2.post, f"{url}/predict", files=[("image", png())] * 5, timeout=30))
        with connect(url) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
            assert connection.recv(2**16).startswith(b"HTTP/1.1 503")
        gate.open.set()
        assert first.result().status_code == 200


def test_a_body_is_not_read_any_further_while_too_much_of_it_waits() -> None:
    happened: list[str] = []

    async def upload() -> None:
        flow = SimpleNamespace(
            pause_reading=lambda: happened.append("pause"), resume_reading=lambda: happened.append("resume")
        )
        service = SimpleNamespace(settings=Settings(), metrics=Metrics())
        loop = asyncio.get_running_loop()
        http = SimpleNamespace(headers=[], client=None, service=service, loop=loop, tasks=set(), flow=flow)
        exchange = direct.DirectExchange(http, b"")  # type: ignore[arg-type]
        exchange._task.cancel()
        for _ in range(MOST_UNREAD // 1024):
            exchange.take(bytes(1024))
        assert happened == []
        exchange.take(b"x")
        assert happened == ["pause"]
        assert await exchange.chunk(time.monotonic() + 1) == bytes(MOST_UNREAD) + b"x"
        assert happened == ["pause", "resume"]

    asyncio.run(upload())


@pytest.mark.parametrize(
    ("path", "status"), [("/info", 200), ("/metrics", 200), ("/v2", 200), ("/nowhere", 404), ("/predict", 405)]
)
def test_head_is_answered_as_get_without_a_body(listen: Listen, path: str, status: int) -> None:
    with listen() as (url, _), httpx2.Client() as client:
        answer, whole = client.head(f"{url}{path}"), client.get(f"{url}{path}")
        assert client.get(f"{url}/livez").json() == {"status": "ok"}  # on the same connection: no body was in between

        assert (answer.status_code, answer.content) == (whole.status_code, b"") == (status, b"")
        assert answer.headers["content-type"] == whole.headers["content-type"]
        assert int(answer.headers["content-length"]) > 0
        route = path if status == 200 else "unmatched" if status == 404 else "/predict"
        counted = f'resnet_requests_total{{method="HEAD",route="{route}",status="{status}"}} 1.0'
        assert counted in client.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("settings", "header", "code"),
    [({"upload_seconds": 0.3}, "", "slow_upload"), ({}, "X-Request-Timeout: 0.3", "deadline_exceeded")],
)
def test_a_body_that_does_not_arrive_is_given_up(
    listen: Listen, settings: dict[str, Any], header: str, code: str
) -> None:
    with listen(**settings) as (url, directly), connect(url) as connection:
        connection.sendall(head(100, *filter(None, [header])) + b"begin")

        assert f'"code":"{code}"'.encode() in received(connection, 1)
        assert len(directly) == 1


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_when_that_is_known(listen: Listen, announced: bool) -> None:
    limits = {"max_request_bytes": 1000, "max_image_bytes": 1000}
    with listen(**limits) as (url, directly), connect(url) as connection:
        chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001
        connection.sendall(head(1001) if announced else chunked)

        assert b'"code":"request_too_large"' in received(connection, 1)
        assert directly == [413]


def test_the_connection_goes_on_after_a_refusal_that_did_not_wait_for_the_body(listen: Listen, png: Png) -> None:
    limits = {"max_request_bytes": 1000, "max_image_bytes": 1000}
    with listen(**limits) as (url, directly), connect(url) as connection:
        connection.sendall(head(1001))
        received(connection, 1)
        connection.sendall(b"x" * 1001 + head(len(png())) + png())

        assert received(connection, 1).startswith(b"HTTP/1.1 200")
        assert directly == [413, 200]


@pytest.mark.parametrize("further", [[], ["Connection: close"]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_leaves_is_not_waited_for(listen: Listen, png: Png, whole: bool, further: list[str]) -> None:
    gate = Gate()
    with listen(gate) as (url, directly), ThreadPoolExecutor(1) as pool:
        image = png()
        request = head(len(image), *further) + (image if whole else image[:-1])
        with connect(url) as connection:
            if whole:
                gate.hold(lambda: pool.submit(connection.sendall, request))
            else:
                connection.sendall(request)
                time.sleep(0.2)
        wait_for(url, 'resnet_requests_total{method="POST",route="/predict",status="499"}', 1)
        wait_for(url, "resnet_images_in_flight", 0)
        wait_for(url, "resnet_unfinished_views", 0)
        gate.open.set()
        assert httpx2.post(f"{url}/predict", content=image, headers=RAW).status_code == 200
        assert directly == [200]


def test_a_client_that_reads_nothing_is_not_answered_any_further(
    listen: Listen, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = DirectHttp.connection_made

    def with_little_room(self: DirectHttp, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=2**14)
        connected(self, transport)

    monkeypatch.setattr(DirectHttp, "connection_made", with_little_room)
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n' % png()
    form = part * 8 + b"--x--\r\n"
    request = head(len(form)).replace(b"image/png", b"multipart/form-data; boundary=x") + form
    most = 100
    with listen() as (url, directly), connect(url) as connection:
        for sent in range(1, most):
            connection.sendall(request)
            deadline = time.monotonic() + 1
            while len(directly) < sent and time.monotonic() < deadline:
                time.sleep(0.001)
            if len(directly) < sent:
                break
        assert len(directly) < sent < most  # it waits

        answers = received(connection, sent)
        assert answers.count(b"HTTP/1.1 200 OK") == len(directly) == sent


def test_nothing_is_kept_of_a_body_while_its_refusal_waits_for_a_client_that_reads_nothing() -> None:
    async def refuse() -> None:
        never = asyncio.Event()
        flow = SimpleNamespace(write_paused=True, drain=never.wait)
        service = SimpleNamespace(settings=Settings(), metrics=Metrics())
        loop = asyncio.get_running_loop()
        http = SimpleNamespace(headers=[], client=None, service=service, loop=loop, tasks=set(), flow=flow)
        exchange = direct.DirectExchange(http, b"top_k=0")  # type: ignore[arg-type]
        exchange.take(b"x")
        await asyncio.sleep(0)
        exchange.take(b"x")
        assert not exchange._body
        exchange.leave()
        await asyncio.gather(*http.tasks, return_exceptions=True)

    asyncio.run(refuse())


def test_a_body_that_came_with_a_refused_head_is_dropped(listen: Listen, png: Png) -> None:
    with listen() as (url, directly), connect(url) as connection:
        wrong = head(len(png())).replace(b"/predict", b"/predict?top_k=0")
        connection.sendall(wrong + png())
        assert received(connection, 1).startswith(b"HTTP/1.1 422")
        connection.sendall(head(len(png())) + png())
        assert received(connection, 1).startswith(b"HTTP/1.1 200")
        assert directly == [422, 200]


def test_a_client_behind_a_trusted_proxy_has_a_quota_of_its_own(listen: Listen, png: Png) -> None:
    gate = Gate()
    limits = {"max_images_per_client": 1, "max_images_per_request": 1}
    with listen(gate, **limits) as (url, directly), httpx2.Client() as client, ThreadPoolExecutor(2) as pool:

        def send(address: str) -> Any:
            headers = RAW | {"X-Forwarded-For": f"10.0.0.9, {address}"}
            return client.post(f"{url}/predict", content=png(), headers=headers, timeout=30)

        held = gate.hold(lambda: pool.submit(send, "10.0.0.1"))
        beside = pool.submit(send, "10.0.0.2")
        wait_for(url, "resnet_images_in_flight", 2)
        assert_problem(send("10.0.0.1"), "quota_exceeded")
        gate.open.set()

        assert held.result().status_code == beside.result().status_code == 200
        assert sorted(directly) == [200, 200, 429]


def test_a_failure_of_ours_is_logged_and_told_without_internals(
    listen: Listen, png: Png, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(predict.uploads, "reader", fail)
    with listen() as (url, directly), httpx2.Client() as client:
        answer = client.post(f"{url}/predict", content=png(), headers=RAW)

        told = assert_problem(answer, "internal_error")
        assert "secret" not in answer.text
        assert "a secret" in caplog.text
        assert told["request_id"] in caplog.text
        assert directly == [500]


def test_what_is_answered_while_the_server_stops_is_the_last_of_its_connection(listen: Listen, png: Png) -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        with listen(gate) as (url, directly):
            request = gate.hold(lambda: pool.submit(httpx2.post, f"{url}/predict", content=png(), headers=RAW))
            threading.Timer(0.5, gate.open.set).start()
        answer = request.result()

    assert answer.status_code == 200
    assert answer.headers["connection"] == "close"
    assert directly == [200]
