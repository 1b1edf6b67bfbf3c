"""The load: clients in a process of their own, closed loops and open loops.

Closed loop: each of n clients sends its next request when the last is answered. It finds the throughput, and hides
queues: a slow server is asked less.

Open loop: requests arrive when a Poisson process says so, or evenly, whatever the server does, and latency counts from
that moment, so that a request that had to wait for anything, even for this process, is not flattered.

The client is made for this: a request is bytes that were put together before, an answer is a status, two headers and
a length. The report says how many requests a second it manages against an endpoint that does nothing.
"""

import argparse
import asyncio
import math
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.jobs import serve_jobs

BOUNDARY = "a-picture-in-a-form"
MOST_CONNECTIONS = 512  # a process may often have no more than 1024 files; what comes beyond it waits here
UNANSWERED = 0  # in place of a status
_OK = 200
_FIRST = -10  # less nice than the servers
_SETTLED = 3  # quick answers in a row
_SETTLING_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back. `seconds` from when the request was due."""

    seconds: float
    status: int
    retry_after: bool


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests arrive, in seconds from the start: so many a second on average, independent of each other."""
    generator = random.Random(seed)  # noqa: S311  # nothing secret
    arrivals: list[float] = []
    now = generator.expovariate(rate)
    while now < seconds:
        arrivals.append(now)
        now += generator.expovariate(rate)
    return arrivals


def evenly(rate: float, seconds: float) -> list[float]:
    """When requests arrive, in seconds from the start: so many a second, each as long after the other."""
    return [number / rate for number in range(1, int(rate * seconds) + 1)]


def form(path: str, picture: bytes) -> bytes:
    """A whole request: the picture as the file `image` of a form, which all servers here accept."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="picture.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[int, bool]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio calls it."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Asyncio calls it."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = bytes(self._received[:end]).lower()
        if len(self._received) < end + 4 + int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]):
            return
        self._received.clear()
        if b"\r\nconnection: close" in head:
            self.close()
        answer, self._answer = self._answer, None
        if not answer.done():
            answer.set_result((int(head[9:12]), b"\r\nretry-after:" in head))

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio calls it."""
        self._transport = None
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed before an answer"))

    @property
    def usable(self) -> bool:
        """It is open, and nothing is under way."""
        return self._transport is not None and not self._transport.is_closing() and self._answer is None

    async def send(self, request: bytes) -> tuple[int, bool]:
        """The status, and whether there is a Retry-After."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """It is not used again."""
        if self._transport:
            self._transport.close()


class Clients:
    """Connections to one server, opened when needed, and what its answers took. `begun`: requests so far."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes]) -> None:
        self._address = host, port
        self._requests = requests
        self.begun = 0
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)

    async def ask(self, due: float, patience: float = _SETTLING_SECONDS) -> Answer:
        """Send the next request. `due`: of time.perf_counter(), from when its latency counts."""
        request = self._requests[self.begun % len(self._requests)]
        self.begun += 1
        connection: Connection | None = None
        status, retry_after = UNANSWERED, False
        try:
            async with asyncio.timeout(patience), self._room:
                connection = await self._connect()
                status, retry_after = await connection.send(request)
        except (OSError, TimeoutError):
            pass  # it stays UNANSWERED
        if connection and connection.usable:
            self._idle.append(connection)
        elif connection:
            connection.close()
        return Answer(time.perf_counter() - due, status, retry_after)

    def close(self) -> None:
        """Close all."""
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection


async def closed_loop(clients: Clients, concurrency: int, seconds: float, least: int = 0) -> dict[str, Any]:
    """So many clients for so long, and for so many requests at least; what they have begun then counts, too."""
    answers: list[Answer] = []
    began = time.perf_counter()

    async def client() -> None:
        while (now := time.perf_counter()) < began + seconds or clients.begun < least:
            answers.append(await clients.ask(now))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return {"seconds": time.perf_counter() - began, "answers": _columns(answers)}


async def settle(clients: Clients, below: float) -> float:
    """Ask one by one until some answers in a row are quick; seconds until the first of those was begun."""
    began = first = time.perf_counter()
    quick = 0
    while quick < _SETTLED and time.perf_counter() < began + _SETTLING_SECONDS:
        now = time.perf_counter()
        answer = await clients.ask(now)
        fast = answer.status == _OK and answer.seconds <= below
        first = first if quick else now
        quick = quick + 1 if fast else 0
    return first - began if quick else math.inf


async def open_loop(
    clients: Clients, arrivals: Sequence[float], seconds: float, patience: float, recovered_below: float | None
) -> dict[str, Any]:
    """Requests that arrive at these moments, in so many seconds, and how late this process sent them.

    - patience: seconds after which a request is given up
    - recovered_below: if given, when the last has arrived the server is asked until it answers so quickly again
    """
    late: list[float] = []
    began = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []
    for arrival in arrivals:
        delay = began + arrival - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        late.append(time.perf_counter() - began - arrival)
        tasks.append(asyncio.create_task(clients.ask(began + arrival, patience)))
    recovery = await settle(clients, recovered_below) if recovered_below is not None else None
    answers = await asyncio.gather(*tasks)
    return {"seconds": seconds, "answers": _columns(answers), "late": late, "recovery": recovery}


def _columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    return {
        "seconds": [answer.seconds for answer in answers],
        "status": [answer.status for answer in answers],
        "retry_after": [answer.retry_after for answer in answers],
    }


async def _do(
    pictures: Sequence[bytes],
    *,
    host: str,
    port: int,
    path: str,
    seconds: float,
    concurrency: int = 0,
    least: int = 0,
    rate: float = 0.0,
    seed: int = 0,
    even: bool = False,
    patience: float = 60.0,
    settled_below: float | None = None,
    recovered_below: float | None = None,
) -> dict[str, Any]:
    """One job: an open loop where a rate is given, otherwise a closed one."""
    clients = Clients(host, port, [form(path, picture) for picture in pictures])
    try:
        if settled_below is not None:
            await settle(clients, settled_below)
        cpu = time.process_time()
        if rate:
            arrivals = evenly(rate, seconds) if even else poisson(rate, seconds, seed)
            measured = await open_loop(clients, arrivals, seconds, patience, recovered_below)
        else:
            measured = await closed_loop(clients, concurrency, seconds, least)
        return {**measured, "cpu_seconds": time.process_time() - cpu}
    finally:
        clients.close()


def main() -> None:
    """Do jobs with the pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder; its files are sent in turn")
    pictures = [file.read_bytes() for file in sorted(parser.parse_args().pictures.iterdir())]
    with suppress(PermissionError):  # whoever may do it: so that a wait for the server's cores is not the server's
        os.nice(_FIRST)
    serve_jobs(lambda **job: uvloop.run(_do(pictures, **job)))


if __name__ == "__main__":
    main()
