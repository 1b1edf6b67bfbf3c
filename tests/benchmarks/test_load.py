"""The load generator: its schedule, its requests, and that it measures what a server does to them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.load import UNANSWERED, Clients, closed_loop, evenly, form, open_loop, poisson, settle

REQUEST = form("/predict", b"a picture")


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[int]:
    """A server that calls `answer` with the handler and the number of the request; its port."""
    count = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self, next(count))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running.server_port
        finally:
            running.shutdown()
            thread.join()


def reply(handler: BaseHTTPRequestHandler, status: int = 200, body: bytes = b"{}", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


class Crowd:
    """Answers after 20 ms. `most`: requests that were there at once."""

    def __init__(self) -> None:
        self.most = 0
        self._there = 0
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler, _: int) -> None:
        with self._lock:
            self._there += 1
            self.most = max(self.most, self._there)
        threading.Event().wait(0.02)
        with self._lock:
            self._there -= 1
        reply(handler)


def against(port: int, use: Callable[[Clients], Any]) -> Any:
    async def run() -> Any:
        clients = Clients("127.0.0.1", port, [REQUEST])
        try:
            return await use(clients)
        finally:
            clients.close()

    return asyncio.run(run())


def test_a_seed_gives_the_same_arrivals_and_another_seed_others() -> None:
    assert poisson(100, 5, seed=1) == poisson(100, 5, seed=1)
    assert poisson(100, 5, seed=1) != poisson(100, 5, seed=2)


def test_arrivals_have_the_rate_and_the_variance_of_a_poisson_process() -> None:
    arrivals = poisson(50, 1000, seed=0)
    gaps = [b - a for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)

    assert arrivals == sorted(arrivals)
    assert 0 < arrivals[0] < arrivals[-1] < 1000
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert variance == pytest.approx(1 / 50**2, rel=0.06)


def test_even_arrivals_have_the_rate_and_equal_gaps() -> None:
    arrivals = evenly(40, 2.0)

    assert len(arrivals) == 80
    assert [b - a for a, b in pairwise(arrivals)] == pytest.approx([1 / 40] * 79)
    assert arrivals[-1] == pytest.approx(2.0)


def test_a_closed_loop_has_as_many_requests_under_way_as_clients() -> None:
    crowd = Crowd()
    with server(crowd) as port:
        found = against(port, lambda clients: closed_loop(clients, 3, 0.2))

    answers = found["answers"]
    assert crowd.most == 3
    assert set(answers["status"]) == {200}
    assert min(answers["seconds"]) >= 0.02
    assert len(answers["status"]) <= 3 * (found["seconds"] / 0.02 + 1)


def test_a_closed_loop_sends_the_least_number_of_requests_however_long_that_takes() -> None:
    with server(lambda handler, _: reply(handler)) as port:
        found = against(port, lambda clients: closed_loop(clients, 2, 0.0, least=7))

    assert len(found["answers"]["status"]) == 7


def test_answers_have_their_status_and_say_whether_to_come_again() -> None:
    def every_second(handler: BaseHTTPRequestHandler, number: int) -> None:
        reply(handler, 503, Retry_After="1") if number % 2 else reply(handler)

    async def two(clients: Clients) -> list[tuple[int, bool]]:
        answers = [await clients.answer(), await clients.answer()]
        return [(answer.status, answer.retry_after) for answer in answers]

    with server(every_second) as port:
        assert against(port, two) == [(200, False), (503, True)]


def test_an_open_loop_counts_the_wait_for_requests_that_came_before() -> None:
    """One request a 50 ms from one thread, and arrivals ten times as often: latencies grow, though each takes 50 ms."""
    alone = threading.Lock()

    def one_by_one(handler: BaseHTTPRequestHandler, _: int) -> None:
        with alone:
            threading.Event().wait(0.05)
        reply(handler)

    with server(one_by_one) as port:
        found = against(port, lambda clients: open_loop(clients, poisson(200, 0.1, 3), 0.1, 30, None))

    seconds = found["answers"]["seconds"]
    assert len(seconds) == len(poisson(200, 0.1, 3)) > 10
    assert max(seconds) >= 0.05 * len(seconds) - 0.1


def test_what_is_not_answered_in_time_or_at_all_is_counted() -> None:
    def never(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.close_connection = True

    with server(never) as port:
        found = against(port, lambda clients: open_loop(clients, poisson(100, 0.05, 0), 0.05, 0.5, None))

    assert set(found["answers"]["status"]) == {UNANSWERED}


def test_what_arrives_when_all_connections_are_busy_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.load.MOST_CONNECTIONS", 2)
    crowd = Crowd()
    with server(crowd) as port:
        found = against(port, lambda clients: open_loop(clients, [0.0] * 6, 0.1, 30, None))

    assert found["answers"]["status"] == [200] * 6
    assert crowd.most == 2
    assert max(found["answers"]["seconds"]) >= 3 * 0.02


def test_a_connection_that_the_server_closes_is_replaced() -> None:
    with server(lambda handler, _: reply(handler, Connection="close")) as port:
        found = against(port, lambda clients: closed_loop(clients, 1, 0.05))

    assert len(found["answers"]["status"]) > 1
    assert set(found["answers"]["status"]) == {200}


def test_settling_ends_when_answers_are_quick_again() -> None:
    def first_slowly(handler: BaseHTTPRequestHandler, number: int) -> None:
        threading.Event().wait(0.3 if number < 2 else 0)
        reply(handler)

    with server(first_slowly) as port:
        took = against(port, lambda clients: settle(clients, below=0.25))

    assert 0.6 <= took < 5
