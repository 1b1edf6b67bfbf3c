import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from resnet_ensemble.server.decoding import Decoders


@contextmanager
def decoders(threads: int = 1, max_bytes: int = 100) -> Iterator[Decoders]:
    made = Decoders(threads=threads, max_bytes=max_bytes)
    try:
        yield made
    finally:
        made.close()


class Work:
    """Says when it is run, and how many bytes its result has."""

    def __init__(self, size: int = 0) -> None:
        self.ran, self._size = threading.Event(), size

    def __call__(self) -> int:
        self.ran.set()
        return self._size


def test_work_is_done_by_rank_not_by_arrival() -> None:
    order: list[int] = []
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def first() -> int:
        begun.set()
        assert go.wait(10)
        return 0

    def append(rank: int) -> int:
        order.append(rank)
        if len(order) == 3:
            done.set()
        return 0

    with decoders() as pool:
        pool.submit(0, first)
        assert begun.wait(10)
        for rank in (3, 1, 2):
            pool.submit(rank, lambda rank=rank: append(rank))  # type: ignore[misc]
        go.set()
        assert done.wait(10)

    assert order == [1, 2, 3]


def test_nothing_is_begun_while_too_many_bytes_are_held() -> None:
    large, next_one = Work(100), Work(1)
    with decoders() as pool:
        ticket = pool.submit(0, large)
        assert large.ran.wait(10)
        pool.submit(1, next_one)

        assert not next_one.ran.wait(0.05)
        assert pool.held == 100
        pool.free(ticket)
        assert next_one.ran.wait(10)


def test_what_is_freed_before_its_turn_is_never_begun() -> None:
    large, dropped, last = Work(100), Work(), Work()
    with decoders() as pool:
        first = pool.submit(0, large)
        assert large.ran.wait(10)
        pool.free(pool.submit(1, dropped))
        pool.submit(2, last)
        pool.free(first)
        assert last.ran.wait(10)

    assert not dropped.ran.is_set()


def test_a_result_that_is_freed_while_it_is_made_holds_nothing() -> None:
    begun, go = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        assert go.wait(10)
        return 1000

    following = Work()
    with decoders() as pool:
        ticket = pool.submit(0, slow)
        assert begun.wait(10)
        pool.free(ticket)
        go.set()
        pool.submit(1, following)

        assert following.ran.wait(10)
        assert pool.held == 0


@pytest.mark.parametrize("held", [0, 100])
def test_closing_does_not_wait_for_what_was_not_begun(held: int) -> None:
    with decoders() as pool:
        work = Work(held)
        pool.submit(0, work)
        assert work.ran.wait(10)
        pool.submit(1, Work())
