"""Clients and engines that misbehave, against a server process over real sockets: nobody else notices."""

import asyncio
import contextlib
import itertools
import random
import signal
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
import uvicorn

from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.protocol import LimitedHttp
from tests.server.test_process import metric, process, wait_for, wait_until_ready
from tests.server.test_refusals import RAW, assert_problem

Png = Callable[..., bytes]
ODD = "tests.server.odd_server"
PROC = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


def form(image: bytes, count: int) -> bytes:
    """A request with so many images, as bytes."""
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n' % image
    body = part * count + b"--x--\r\n"
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def leave_at_random(port: int, request: bytes, chance: random.Random) -> None:
    """Send a part of a request, or all of it, perhaps read a part of the answer, and go: politely, or with a reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    header = request.index(b"\r\n\r\n")
    where = chance.choice(["header", "body", "waiting", "answer"])
    sent = {"header": chance.randrange(header), "body": chance.randrange(header, len(request))}
    writer.write(request[: sent.get(where, len(request))])
    await writer.drain()
    if where == "answer":
        await reader.read(chance.randrange(1, 200))
    else:
        await asyncio.sleep(chance.random() / 5)
    if chance.random() < 0.5:
        reset = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    writer.close()


def held(pid: int) -> dict[str, int]:
    """What a process holds: files and sockets, threads, KiB of memory."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"files": files, "threads": int(status["Threads"]), "memory": int(status["VmRSS"].split()[0])}


def settled(pid: int, url: str) -> dict[str, int]:
    """What it holds once everything that was left is gone."""
    for name in ("resnet_unfinished_views", "resnet_waiting_views", "resnet_images_in_flight"):
        wait_for(url, name, 0)
    wait_for(url, "resnet_waiting_view_bytes", 0)
    time.sleep(0.3)  # the last sockets are being closed
    return held(pid)


@PROC
def test_clients_that_disconnect_at_random_leave_nothing_behind(png: Png) -> None:
    chance = random.Random(0)

    async def crowd(port: int, request: bytes) -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(*(leave_at_random(port, request, chance) for _ in range(256)))

    with process(ODD, RESNET_BACKEND="fake", RESNET_STREAMS="2") as (running, url):
        wait_until_ready(url)
        request, port = form(png(142, (100, 100)), 4), int(url.rsplit(":")[-1])
        rounds = []
        for _ in range(3):
            asyncio.run(crowd(port, request))
            rounds.append(settled(running.pid, url))
            began = time.monotonic()
            answer = httpx2.post(f"{url}/predict", content=png(142), headers=RAW)
            assert answer.json()["index"] == 5
            assert time.monotonic() - began < 2

        first, *_, last = rounds
        assert last["files"] <= first["files"]
        assert last["threads"] <= first["threads"]
        assert last["memory"] <= first["memory"] + 20 * 1024


def test_no_request_is_lost_when_engines_die_under_load(png: Png) -> None:
    with process(ODD, RESNET_BACKEND="fake") as (running, url), ThreadPoolExecutor() as pool:
        wait_until_ready(url)
        done = threading.Event()

        def send(brightness: int) -> Counter[Any]:
            answers: Counter[Any] = Counter()
            with httpx2.Client(timeout=60) as client:
                while not done.is_set():
                    answer = client.post(f"{url}/predict", content=png(brightness), headers=RAW)
                    answers[answer.status_code, answer.json().get("index")] += 1
            return answers

        senders = [pool.submit(send, brightness) for brightness in (0, 57, 114, 142)]
        for _ in range(3):
            time.sleep(0.5)
            running.send_signal(signal.SIGUSR1)
        wait_for(url, "resnet_ready", 1)
        time.sleep(0.5)
        done.set()
        found = [sender.result() for sender in senders]
        restarts = sum(
            metric(url, f'resnet_engine_restarts_total{{member="{name}"}}') for name in ("resnet20", "resnet56")
        )

    assert [answers.keys() for answers in found] == [{(200, index)} for index in (0, 2, 4, 5)]
    assert restarts >= 2


def test_a_hung_engine_answers_nobody_for_ever_and_the_process_ends(png: Png) -> None:
    limits = {"RESNET_ENGINE_TIMEOUT_SECONDS": "0.5", "RESNET_DRAIN_SECONDS": "1", "RESNET_STREAMS": "2"}
    with process(ODD, RESNET_BACKEND="fake", **limits) as (running, url):
        wait_until_ready(url)
        sound, deadly = png(0), png(255)
        assert httpx2.post(f"{url}/predict", content=sound, headers=RAW).status_code == 200

        began = time.monotonic()
        assert_problem(httpx2.post(f"{url}/predict", content=deadly, headers=RAW, timeout=30), "not_ready")
        assert time.monotonic() - began < 5
        assert_problem(httpx2.get(f"{url}/livez"), "not_ready")
        assert_problem(httpx2.post(f"{url}/predict", content=sound, headers=RAW), "not_ready")

        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 1


def test_an_image_in_an_engine_that_hangs_is_answered_at_its_deadline(png: Png) -> None:
    with process(ODD, RESNET_BACKEND="fake", RESNET_DRAIN_SECONDS="1") as (running, url):
        wait_until_ready(url)
        began = time.monotonic()
        headers = RAW | {"X-Request-Timeout": "0.5"}
        assert_problem(httpx2.post(f"{url}/predict", content=png(255), headers=headers), "deadline_exceeded")
        assert time.monotonic() - began < 5

        running.send_signal(signal.SIGTERM)  # the hang is not found yet, so this is up to the drain limit
        assert running.wait(20) == 1


@contextmanager
def neighbours(url: str, image: bytes, index: int, clients: int = 4) -> Iterator[list[float]]:
    """Clients that send images meanwhile and are all answered rightly: the seconds that each answer took."""
    done = threading.Event()
    seconds: list[float] = []

    def send() -> None:
        with httpx2.Client(timeout=30) as client:
            while not done.is_set():
                began = time.monotonic()
                answer = client.post(f"{url}/predict", content=image, headers=RAW)
                assert (answer.status_code, answer.json()["index"]) == (200, index)
                seconds.append(time.monotonic() - began)

    with ThreadPoolExecutor() as pool:
        senders = [pool.submit(send) for _ in range(clients)]
        try:
            yield seconds
        finally:
            done.set()
        for sender in senders:
            sender.result()


def bomb(side: int) -> bytes:
    """A PNG that says that it has so many pixels a side, and has none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )


def test_what_is_wrong_with_one_image_or_client_is_not_felt_by_others(png: Png) -> None:
    good = png(142, (200, 200), "JPEG")
    with process(ODD, RESNET_BACKEND="fake", RESNET_UPLOAD_SECONDS="1.5") as (_, url):
        wait_until_ready(url)
        with neighbours(url, good, 5) as undisturbed:
            time.sleep(1.5)

        with neighbours(url, good, 5) as disturbed, httpx2.Client(timeout=30) as client:
            address = ("127.0.0.1", int(url.rsplit(":")[-1]))
            with socket.create_connection(address) as slow:
                request = form(good, 2)
                end = time.monotonic() + 1.3
                slow.sendall(request[:200])
                for byte in itertools.islice(request, 200, len(request)):
                    images = [("image", good)] * 3 + [("image", good[: len(good) // 2]), ("image", bomb(40_000))]
                    results = client.post(f"{url}/predict", files=images).json()["results"]
                    codes = [(result["problem"] or {}).get("code") for result in results]
                    assert codes == [None, None, None, "corrupt_image", "too_many_pixels"]
                    assert [result["prediction"]["index"] for result in results[:3]] == [5] * 3
                    if time.monotonic() > end:
                        break
                    slow.sendall(bytes([byte]))
                slow.settimeout(10)
                assert slow.recv(100).startswith(b"HTTP/1.1 408")

    middle = [sorted(seconds)[len(seconds) // 2] for seconds in (undisturbed, disturbed)]
    assert len(disturbed) > 20
    assert middle[1] < 3 * middle[0] + 0.05  # a fifth client sends 5 images at a time meanwhile


@PROC
@pytest.mark.parametrize("begin", ["", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"], ids=["head", "trailers"])
def test_a_request_whose_head_or_trailers_do_not_end_is_not_kept(begin: str) -> None:
    with process(RESNET_BACKEND="fake") as (running, url):
        wait_until_ready(url)
        before = held(running.pid)["memory"]
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1]))) as endless:
            endless.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\n{begin}".encode())
            with contextlib.suppress(ConnectionError):
                endless.sendall(b"X-A: b\r\n" * 4_000_000)
            assert endless.recv(100).startswith(b"HTTP/1.1 431")
        assert held(running.pid)["memory"] < before + 20 * 1024
        large = {"Cookie": "a" * 30_000}
        assert httpx2.get(f"{url}/livez", headers=large).status_code == 200


@asynccontextmanager
async def listening(app: Any, **settings: Any) -> AsyncIterator[int]:
    """Our protocol in this process, where times can be made short, before an application. Gives the port."""
    config = uvicorn.Config(
        app, port=0, http=cast("Any", partial(LimitedHttp, Metrics())), lifespan="off", log_config=None, **settings
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def refuse(_scope: Any, _receive: Any, send: Any) -> None:
    """An application that answers at once, whatever comes."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_head_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelined and kept connections have a clock for each head, and so has one that sent an empty line."""
    monkeypatch.setattr("resnet_ensemble.server.protocol.HEAD_SECONDS", 0.3)
    begin, whole = b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def talk() -> None:
        async with listening(refuse) as port:
            for parts in ([b""], [begin], [whole + begin], [whole, b"\r\n"]):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                answers = b""
                for part in parts:
                    writer.write(part)
                    if part.endswith(b"\r\n\r\n"):
                        answers += await reader.readuntil(b"\r\n\r\n")
                answers += await asyncio.wait_for(reader.read(), 5)
                assert answers.count(b"204") == b"".join(parts).count(b"Host")
                assert (b"HTTP/1.1 408" in answers) == (begin in parts[-1] and not parts[-1].endswith(b"\r\n\r\n"))
                writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("rest", [0, 5, 10], ids=["none of it", "a part of it", "all of it"])
def test_a_body_that_is_not_wanted_may_not_take_for_ever(rest: int) -> None:
    async def talk() -> None:
        async with listening(refuse, timeout_keep_alive=1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            assert b"204" in await reader.readuntil(b"\r\n\r\n")
            for _ in range(rest):
                writer.write(b"x")
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    asyncio.run(talk())


def test_a_request_after_a_body_that_was_not_wanted_has_its_own_time() -> None:
    answered = 0

    async def slow_at_last(scope: Any, receive: Any, send: Any) -> None:
        nonlocal answered
        answered += 1
        if answered == 2:
            await asyncio.sleep(1.5)
        await refuse(scope, receive, send)

    async def talk() -> None:
        async with listening(slow_at_last, timeout_keep_alive=1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
            writer.write(head)
            assert b"204" in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x" * 10 + head + b"x" * 10)
            assert b"204" in await reader.readuntil(b"\r\n\r\n")
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("sent_after", [1, 50])
def test_a_client_that_still_sends_gets_the_answer_that_closes_its_connection(sent_after: int) -> None:
    chunk = b"x" * 2**16

    async def talk() -> None:
        async with listening(refuse) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {100 * 2**16}\r\n\r\n"
            writer.write(head.encode() + chunk)
            await asyncio.sleep(0.2)  # it is answered meanwhile
            for _ in range(sent_after):
                writer.write(chunk)
                await writer.drain()
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 204")
            writer.close()

    asyncio.run(talk())
