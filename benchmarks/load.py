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
import gc
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.jobs import serve_jobs

BOUNDARY = "a-picture-in-a-form"
MOST_CONNECTIONS = 512  # a process may often have no more than 1024 files; what comes beyond it waits here
UNANSWERED = 0  # in place of a status
_OK = 200
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


@dataclass(eq=False)
class Question:
    """A request, and what to do once with its answer. `due`: of time.perf_counter(), from when its latency counts."""

    request: bytes
    due: float
    then: Callable[[Answer], None]
    timer: asyncio.TimerHandle | None = None
    connection: "Connection | None" = None
    open: bool = True

    def answer(self, status: int, *, retry_after: bool = False) -> None:
        """There is an answer, or none will come."""
        if self.open:
            self.open = False
            if self.timer:
                self.timer.cancel()
            self.then(Answer(time.perf_counter() - self.due, status, retry_after))

    def give_up(self) -> None:
        """Do not wait any longer."""
        if self.connection:
            self.connection.close()
        self.answer(UNANSWERED)


class Connection(asyncio.Protocol):
    """One connection, one request at a time. `free` is called when the next may follow, or nothing may any more."""

    def __init__(self, free: "Callable[[Connection], None]") -> None:
        self._free = free
        self._received = b""
        self._question: Question | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio calls it."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Asyncio calls it."""
        self._received += data  # most answers come in one piece, which is not copied
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._question is None:
            return
        head = self._received[:end].lower()
        if len(self._received) < end + 4 + int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]):
            return
        self._received = b""
        if b"\r\nconnection: close" in head:
            self.close()
        question, self._question = self._question, None
        self._free(self)
        question.answer(int(head[9:12]), retry_after=b"\r\nretry-after:" in head)

    def connection_lost(self, _: Exception | None) -> None:
        """Asyncio calls it."""
        self._transport = None
        self._free(self)
        if self._question:
            self._question.answer(UNANSWERED)

    @property
    def usable(self) -> bool:
        """It is open, and nothing is under way."""
        return self._transport is not None and not self._transport.is_closing() and self._question is None

    def send(self, question: Question) -> None:
        """Only on a usable one."""
        assert self._transport is not None
        self._question, question.connection = question, self
        self._transport.write(question.request)

    def close(self) -> None:
        """It is not used again."""
        if self._transport:
            self._transport.close()


class Clients:
    """Connections to one server, opened when needed. `begun`: requests so far.

    What they take of the processor, the server does not get: 0.19 ms a request in an open loop, and 0.27 with a task, a
    future and a timeout for each (two Zen 4 cores, 2026-11-27).
    """

    def __init__(self, host: str, port: int, requests: Sequence[bytes]) -> None:
        self._address = host, port
        self._requests = requests
        self.begun = 0
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[Question] = deque()  # until there may be another connection, or one is free

    def ask(self, due: float, then: Callable[[Answer], None], patience: float = _SETTLING_SECONDS) -> None:
        """Send the next request, as Question has it; `patience`: seconds after which it is given up."""
        question = Question(self._requests[self.begun % len(self._requests)], due, then)
        question.timer = asyncio.get_running_loop().call_later(patience, question.give_up)
        self.begun += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(question)
                return
        self._waiting.append(question)
        self._open_more()

    async def answer(self) -> Answer:
        """To the next request, which is due now."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.ask(time.perf_counter(), answered.set_result)
        return await answered

    def close(self) -> None:
        """Close all."""
        for connection in self._connections:
            connection.close()

    def _open_more(self) -> None:
        while len(self._opening) < min(len(self._waiting), MOST_CONNECTIONS - len(self._connections)):
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self._free), *self._address)
        except OSError:
            if self._waiting:
                self._waiting.popleft().answer(UNANSWERED)
            return
        self._connections.add(connection)
        self._free(connection)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self._open_more()

    def _free(self, connection: Connection) -> None:
        if not connection.usable:
            self._connections.discard(connection)
            self._open_more()
            return
        while self._waiting:
            question = self._waiting.popleft()
            if question.open:
                connection.send(question)
                return
        self._idle.append(connection)


async def closed_loop(clients: Clients, concurrency: int, seconds: float, least: int = 0) -> dict[str, Any]:
    """So many clients for so long, and for so many requests at least; what they have begun then counts, too."""
    answers: list[Answer] = []
    under_way = 0
    done = asyncio.Event()
    began = time.perf_counter()

    def go_on() -> None:
        nonlocal under_way
        now = time.perf_counter()
        if now < began + seconds or clients.begun < least:
            under_way += 1
            clients.ask(now, take)
        elif not under_way:
            done.set()

    def take(answer: Answer) -> None:
        nonlocal under_way
        under_way -= 1
        answers.append(answer)
        go_on()

    for _ in range(concurrency):
        go_on()
    await done.wait()
    return {"seconds": time.perf_counter() - began, "answers": _columns(answers)}


async def settle(clients: Clients, below: float) -> float:
    """Ask one by one until some answers in a row are quick; seconds until the first of those was begun."""
    began = first = time.perf_counter()
    quick = 0
    while quick < _SETTLED and time.perf_counter() < began + _SETTLING_SECONDS:
        now = time.perf_counter()
        answer = await clients.answer()
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
    answers: list[Answer] = []
    done = asyncio.Event()

    def take(answer: Answer) -> None:
        answers.append(answer)
        if len(answers) == len(arrivals):
            done.set()

    began = time.perf_counter()
    for arrival in arrivals:
        delay = began + arrival - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        late.append(time.perf_counter() - began - arrival)
        clients.ask(began + arrival, take, patience)
    recovery = await settle(clients, recovered_below) if recovered_below is not None else None
    if arrivals:
        await done.wait()
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
    gc.disable()  # there is nothing to collect, and the server would seem slow meanwhile
    serve_jobs(lambda **job: uvloop.run(_do(pictures, **job)))


if __name__ == "__main__":
    main()
