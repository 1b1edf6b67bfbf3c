"""Predictions that a connection answers itself, over real sockets, beside those that go through uvicorn and FastAPI."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import direct, predict
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.direct import DirectHttp
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.protocol import MAX_HEAD_BYTES, MOST_UNREAD
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.conftest import until
from tests.server.test_process import wait_for, wait_until_ready
from tests.server.test_refusals import RAW, Gate, assert_problem

Png = Callable[..., bytes]
Listen = Callable[..., Any]
THROUGH_ASGI = {"Connection": "close"}


@pytest.fixture
def listen(pair: Bundle, monkeypatch: pytest.MonkeyPatch) -> Listen:
    """A context manager: a server in this process, on fake engines. Gives its URL, and what was answered directly."""

    @contextmanager
    def listening(engine: Callable[[int], FakeEngine] = FakeEngine, **settings: Any) -> Iterator[tuple[str, list[int]]]:
        directly: list[int] = []
        unread: list[int] = []

        class Noted(direct.DirectExchange):
            def _write(self, answer: Any) -> None:
                directly.append(answer.status)
                super()._write(answer)
                unread.append(len(self._body))

        monkeypatch.setattr(direct, "DirectExchange", Noted)
        service = Service(
            Settings(**{"bundle": pair.path, **settings}),
            open_with=lambda bundle, *_: engine(len(bundle.manifest.labels)),
        )
        http: Any = partial(DirectHttp, service)
        server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, http=http, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            wait_until_ready(url)
            yield url, directly
            assert not any(unread)  # a connection keeps nothing of what it has refused
        finally:
            server.should_exit = True
            thread.join()

    return listening


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", maxsplit=1)[-1])), timeout=10)


def received(connection: socket.socket, answers: int) -> bytes:
    """What comes until there are so many answers, all of them with a JSON body."""
    data = b""
    while len(re.findall(rb"\r\n\r\n\{.*?\}(?=HTTP|$)", data, re.DOTALL)) < answers:
        chunk = connection.recv(2**16)
        assert chunk, data
        data += chunk
    return data


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(
        ("POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}", *lines, "", "")
    ).encode()


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


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_head_may_be_cut_in_its_end_and_is_not_taken_together_with_the_body(
    listen: Listen, png: Png, cut: int
) -> None:
    image = png() + bytes(MAX_HEAD_BYTES)
    with listen() as (url, _), connect(url) as connection:
        connection.sendall(head(len(image))[:-cut])
        time.sleep(0.05)
        connection.sendall(head(len(image))[-cut:] + image)
        assert received(connection, 1).startswith(b"HTTP/1.1 200")


def test_another_protocol_that_a_head_in_pieces_offers_is_overlooked(listen: Listen, png: Png) -> None:
    """Httptools would leave the body, which would be taken for the next request."""
    whole = head(len(png()), "Connection: Upgrade", "Upgrade: h2c")
    start = whole.index(b"\r\nUpgrade:")
    with listen() as (url, directly):
        for cut in range(start, start + len(b"\r\nUpgrade:") + 1):
            with connect(url) as connection:
                connection.sendall(whole[:cut])
                time.sleep(0.02)
                connection.sendall(whole[cut:] + png())
                assert received(connection, 1).startswith(b"HTTP/1.1 200"), cut
    assert set(directly) == {200}


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


def test_a_length_may_begin_with_as_many_zeros_as_a_head_holds(listen: Listen, png: Png) -> None:
    padded = head(len(png())).replace(b"Content-Length: ", b"Content-Length: " + b"0" * 5000)
    with listen() as (url, _):
        for request in (padded, padded[:-2] + b"Connection: close\r\n\r\n"):
            with connect(url) as connection:
                connection.sendall(request + png())
                assert received(connection, 1).startswith(b"HTTP/1.1 200")


def test_a_trailer_is_no_header(listen: Listen, png: Png) -> None:
    with listen() as (url, _):
        for lines in ((), ("Connection: close",)):
            chunked = head(0, "Transfer-Encoding: chunked", *lines).replace(b"Content-Length: 0\r\n", b"")
            body = b"%x\r\n%b\r\n0\r\n" % (len(png()), png())
            with connect(url) as connection:
                connection.sendall(chunked + body + b"Content-Encoding: gzip\r\nX-Request-Timeout: none\r\n\r\n")
                assert received(connection, 1).startswith(b"HTTP/1.1 200")


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


def test_requests_that_do_not_wait_for_answers_are_answered_in_their_order(listen: Listen, png: Png) -> None:
    with listen() as (url, directly), connect(url) as connection:
        one, other = png(0), png(142)
        live = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(2):
            connection.sendall(head(len(one)) + one + head(len(other)) + other + live)

            data = received(connection, 3)
            assert re.findall(rb'^\{"label":.*?"index":(\d)|^\{"status":"(ok)', data, re.MULTILINE) == [
                (b"0", b""),
                (b"5", b""),
                (b"", b"ok"),
            ]
        assert directly == [200, 200]  # of each three, the first


def test_what_is_no_http_does_not_take_the_answer_of_the_request_before(listen: Listen, png: Png) -> None:
    gate = Gate()
    with listen(gate) as (url, directly), connect(url) as connection, ThreadPoolExecutor(1) as pool:
        gate.hold(lambda: pool.submit(connection.sendall, head(len(png())) + png()))
        connection.sendall(b"xx\r\n\r\n")
        time.sleep(0.2)
        gate.open.set()

        answer = received(connection, 1)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert directly == [200]


def test_a_broken_body_does_not_take_the_answer_of_the_request_before(listen: Listen, png: Png) -> None:
    gate = Gate()
    chunked = head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    with listen(gate) as (url, directly), connect(url) as connection, ThreadPoolExecutor(1) as pool:
        both = head(len(png())) + png() + chunked + b"no length\r\n"
        gate.hold(lambda: pool.submit(connection.sendall, both))
        time.sleep(0.1)
        gate.open.set()

        data = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"400"]
        assert directly == [200]
        assert (
            'resnet_requests_total{method="POST",route="/predict",status="499"}'
            not in httpx2.get(f"{url}/metrics").text
        )


def last_answer(connection: socket.socket) -> httpx2.Response:
    """What comes until the end of the connection: one answer."""
    data = b""
    while chunk := connection.recv(2**16):
        data += chunk
    lines, body = data.split(b"\r\n\r\n")
    status, *headers = lines.decode().split("\r\n")
    return httpx2.Response(int(status.split()[1]), headers=[tuple(line.split(": ")) for line in headers], content=body)


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
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"FOO / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x00",
        b"GET http://x:99999/livez HTTP/1.1\r\n\r\n",
        b"CONNECT host:443 HTTP/1.1\r\nHost: host:443\r\n\r\n",
    ],
    ids=["TLS", "method", "header", "zero", "target", "proxy"],
)
def test_what_is_no_http_is_a_problem_that_is_counted(listen: Listen, junk: bytes) -> None:
    with listen() as (url, _):
        with connect(url) as connection:
            connection.sendall(junk)
            assert_problem(last_answer(connection), "malformed_request")
        measured = httpx2.get(f"{url}/metrics").text
        assert 'resnet_requests_total{method="unknown",route="unmatched",status="400"} 1.0' in measured
        assert 'resnet_errors_total{code="malformed_request"} 1.0' in measured


@pytest.mark.parametrize("piece", [1 << 20, 1000], ids=["whole", "in pieces"])
def test_a_head_may_only_be_so_large_however_it_comes(listen: Listen, piece: int) -> None:
    begin, end = b"GET /livez HTTP/1.1\r\nHost: x\r\nCookie: ", b"\r\n\r\n"
    with listen() as (url, _):
        for size, status in ((MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431)):
            with connect(url) as connection:
                request = begin + b"a" * (size - len(begin)) + end
                for start in range(0, len(request), piece):
                    connection.sendall(request[start : start + piece])
                    time.sleep(0.002)
                if status == 200:
                    assert received(connection, 1).startswith(b"HTTP/1.1 200")
                else:
                    assert_problem(last_answer(connection), "head_too_large")


@pytest.mark.parametrize("path", ["/predict", "/v2/models/cifar10/infer"])
def test_a_body_that_can_t_be_read_any_further_is_a_problem(listen: Listen, path: str) -> None:
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    with listen() as (url, directly):
        with connect(url) as connection:
            connection.sendall(start.encode())
            time.sleep(0.1)
            connection.sendall(b"no length\r\n")
            answer = last_answer(connection)
        assert_problem(answer, "malformed_request")
        route = path.replace("cifar10", "{name}")
        until(lambda: f'route="{route}",status="400"}} 1.0' in httpx2.get(f"{url}/metrics").text)
        if path == predict.PATH:
            assert (answer.headers["x-request-id"], directly) == ("mine", [400])


def test_a_refusal_is_not_followed_by_another_one_of_its_body(listen: Listen, png: Png) -> None:
    with listen(max_request_bytes=2, max_image_bytes=1) as (url, _), connect(url) as connection:
        chunked = head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        connection.sendall(chunked + b"3\r\nabc\r\n")
        received(connection, 1)
        connection.sendall(b"no length\r\n")
        assert connection.recv(100) == b""


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
