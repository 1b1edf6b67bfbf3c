"""Decoding on threads of its own, in the order of rank, and not further ahead of the engines than memory allows."""

import heapq
import itertools
import threading
from collections.abc import Callable

from resnet_ensemble.export import host


class Ticket:
    """One piece of work. Give it back with `Decoders.free`."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.work: Callable[[], int] | None = work
        self.held = 0
        self.freed = False


class Decoders:
    """Threads that run work by rank, the smallest first.

    - max_bytes: of results; no work is begun while more are held
    """

    def __init__(self, *, threads: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Ticket]] = []
        self._orders = itertools.count()
        self._closing = False
        self._threads = [threading.Thread(target=self._run, name=f"decode-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def held(self) -> int:
        """Bytes of results that were not given back yet."""
        return self._held

    def submit(self, rank: float, work: Callable[[], int]) -> Ticket:
        """Run `work` when its turn comes. It deals with its own errors, and says how many bytes its result holds."""
        ticket = Ticket(work)
        with self._changed:
            heapq.heappush(self._waiting, (rank, next(self._orders), ticket))
            self._changed.notify()
        return ticket

    def free(self, ticket: Ticket) -> None:
        """Its result is not needed any more; if it was not begun yet, it never will be."""
        with self._changed:
            ticket.freed, ticket.work = True, None
            if self._held >= self._max_bytes and ticket.held:
                self._changed.notify_all()
            self._held -= ticket.held

    def close(self) -> None:
        """Finish what was begun."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        host.give_way()
        while True:
            with self._changed:
                while not self._closing and (not self._waiting or self._held >= self._max_bytes):
                    self._changed.wait()
                if self._closing:
                    return
                _, _, ticket = heapq.heappop(self._waiting)
                work, ticket.work = ticket.work, None
            if work is None:
                continue
            size = work()
            with self._changed:
                if not ticket.freed:
                    ticket.held = size
                    self._held += size
            del work, ticket  # an encoded image, which nobody needs while this thread waits
