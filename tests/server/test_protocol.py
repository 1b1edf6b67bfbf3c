"""Heads and bodies, whole, in pieces, broken or one after the other; and how answers leave through a connection."""

import asyncio
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from resnet_ensemble.server import predict
from resnet_ensemble.server.protocol import MAX_HEAD_BYTES, AtOnce
from tests.conftest import until
from tests.server.sockets import connect, head, last_answer, received
from tests.server.test_refusals import Gate, assert_problem

Png = Callable[..., bytes]
Listen = Callable[..., Any]


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


class Written(asyncio.Transport):
    """A transport that notes what happens to it."""

    def __init__(self) -> None:
        self.happened: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        assert not self.is_closing()
        self.happened.append(data)

    def close(self) -> None:
        self.happened.append("closed")

    def abort(self) -> None:
        self.happened.append("aborted")

    def is_closing(self) -> bool:
        return not {"closed", "aborted"}.isdisjoint(self.happened)


@pytest.mark.parametrize(
    ("then", "happened"),
    [
        ("", [b"head, body", b"next"]),
        ("flush", [b"head, body"]),
        ("close", [b"head, body", "closed"]),
        ("abort", ["aborted"]),  # as when the client has gone
    ],
)
def test_what_a_turn_of_the_event_loop_writes_leaves_together(then: str, happened: list[bytes | str]) -> None:
    written = Written()

    async def answer() -> None:
        transport = AtOnce(written, asyncio.get_running_loop(), lambda whole: whole.close())
        transport.write(b"head, ")
        transport.write(b"body")
        if then:
            getattr(transport, then)()
        await asyncio.sleep(0)
        if not then:
            transport.write(b"next")
        await asyncio.sleep(0)

    asyncio.run(answer())

    assert written.happened == happened


def test_a_pipelined_head_that_offers_an_upgrade_makes_no_request_of_its_body(listen: Listen) -> None:
    """Its body, which a proxy takes for one, would be read as the next request."""
    inner = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    first = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with listen() as (url, _), connect(url) as connection:
        connection.sendall(first + head(len(inner), "Connection: Upgrade", "Upgrade: h2c"))
        time.sleep(0.1)  # what comes with the head is not read at all
        with suppress(OSError):  # the connection may be closed
            connection.sendall(inner)
        data = b""
        while chunk := connection.recv(2**16):
            data += chunk

    assert data.startswith(b"HTTP/1.1 200")
    assert b"404" not in data
    assert data.count(b"HTTP/1.1 ") <= 2
