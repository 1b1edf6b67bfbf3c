"""Rows into shards, in the order of the inputs if they are to be."""

import asyncio
import time
from collections.abc import Callable

from resnet_ensemble.client.batch._output import Output
from resnet_ensemble.client.batch._rows import Row

SHARD_SECONDS = 300.0  # rows are not kept in memory longer than this


class Writer:
    """Collects rows and commits them as shards of `shard_rows`, or fewer after SHARD_SECONDS."""

    def __init__(
        self, output: Output, *, ordered: bool, shard_rows: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output = output
        self._ordered = ordered
        self._shard_rows = shard_rows
        self._clock = clock
        self._rows: list[Row] = []
        self._began = clock()  # when the first of them came
        self._early: dict[int, Row] = {}  # by position: they wait for those before them
        self._next = 0
        self._committing = asyncio.Lock()

    async def add(self, position: int, row: Row) -> int:
        """Take the row of the input at `position`. Returns how many rows went on their way to the disk by it.

        Raises OSError.
        """
        if not self._ordered:
            await self._take(row)
            return 1
        self._early[position] = row
        taken = 0
        while self._next in self._early:
            following = self._early.pop(self._next)
            self._next += 1
            taken += 1
            await self._take(following)
        return taken

    async def flush(self, *, older_than: float = 0.0) -> None:
        """Commit the rows in memory, if the first of them has been there for so many seconds. Raises OSError."""
        async with self._committing:
            if self._clock() - self._began >= older_than:
                await self._commit(len(self._rows))

    async def _take(self, row: Row) -> None:
        if not self._rows:
            self._began = self._clock()
        self._rows.append(row)
        if len(self._rows) >= self._shard_rows:
            async with self._committing:
                if len(self._rows) >= self._shard_rows:  # another task may have committed them meanwhile
                    await self._commit(self._shard_rows)

    async def _commit(self, count: int) -> None:
        rows, self._rows = self._rows[:count], self._rows[count:]
        self._began = self._clock()
        try:
            await asyncio.to_thread(self._output.commit, rows)
        except OSError:
            self._rows[:0] = rows  # what comes later must not come before them, should the disk take it
            raise
