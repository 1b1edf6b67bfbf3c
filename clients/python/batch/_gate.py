"""Lets as many requests through as the limit says."""

import asyncio
from collections import deque

from resnet_ensemble.client.batch._aimd import Aimd


class Gate:
    """A semaphore whose size is the limit of an Aimd. First come, first served."""

    def __init__(self, aimd: Aimd) -> None:
        self._aimd = aimd
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._closed = False
        self.in_flight = 0

    async def enter(self) -> bool:
        """Wait for a place; False when the gate was closed meanwhile."""
        if self._closed:
            return False
        if self.in_flight < self._aimd.limit and not self._waiting:
            self.in_flight += 1
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return await turn

    def leave(self) -> None:
        """Give a place back; call it after the Aimd has been told."""
        self.in_flight -= 1
        while self._waiting and self.in_flight < self._aimd.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(True)

    def close(self) -> None:
        """Let nobody through any more."""
        self._closed = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(False)
        self._waiting.clear()
