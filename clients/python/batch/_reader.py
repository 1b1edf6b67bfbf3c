"""A blocking stream from a thread of its own, so that a slow disk or a terminal holds up nothing else."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Reader(Generic[_T]):
    """Reads ahead of whoever iterates, by `slots` items that were not given back with `release`."""

    def __init__(self, items: Iterable[_T], slots: int) -> None:
        self._items = items
        self._slots = threading.Semaphore(slots)
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_T | Exception | None] = asyncio.Queue()  # None: there are no more

    async def __aiter__(self) -> AsyncIterator[_T]:
        """The items. Raises what reading them raised."""
        # A daemon, because nothing can wake a thread that waits for a line from a terminal.
        threading.Thread(target=self._read, name="inputs", daemon=True).start()
        while (item := await self._queue.get()) is not None and not self._stopped:
            if isinstance(item, Exception):
                raise item
            yield item

    def release(self, slots: int) -> None:
        """Let it read so many more."""
        if slots:
            self._slots.release(slots)

    def stop(self) -> None:
        """End the iteration."""
        self._stopped = True
        self._slots.release()
        self._queue.put_nowait(None)

    def _read(self) -> None:
        end: Exception | None = None
        try:
            for item in self._items:
                self._slots.acquire()
                if self._stopped:
                    return
                self._put(item)
        except Exception as error:  # noqa: BLE001  # the edge of a thread: it is raised where the items are used
            end = error
        self._put(end)

    def _put(self, entry: _T | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, entry)
