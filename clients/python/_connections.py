"""Connections that a client may use where it is: in its process, or in its event loop."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

import httpx2

from resnet_ensemble.client._protocol import DEFAULT_TIMEOUT

_Http = TypeVar("_Http", httpx2.Client, httpx2.AsyncClient)


class Connections(Generic[_Http]):
    """The connections of a client and of those that `with_options` makes of it: the caller's, or ours.

    Ours are made anew in another place. A forked process has its parent's sockets, and each would read the other's
    answers; and the sockets of an event loop end with it.
    """

    def __init__(self, given: _Http | None, make: Callable[[], _Http], place: Callable[[], object]) -> None:
        self.ours = given is None
        self._make: Callable[[], _Http] = make
        self._place = place
        # In one tuple, because threads change it; a lock could be held while the process is forked.
        self._held: tuple[_Http, object] = (given or make(), None)  # None: not used yet

    def here(self) -> _Http:
        """Those of this place. What was closed stays closed."""
        http, place = self._held
        now = self._place() if self.ours else None
        if place != now and not http.is_closed:
            http = http if place is None else self._make()
            self._held = (http, now)
        return http


def blocking(given: httpx2.Client | None) -> Connections[httpx2.Client]:
    """Of a process."""
    return Connections(given, lambda: httpx2.Client(timeout=DEFAULT_TIMEOUT), os.getpid)


def awaited(given: httpx2.AsyncClient | None) -> Connections[httpx2.AsyncClient]:
    """Of an event loop."""
    return Connections(given, lambda: httpx2.AsyncClient(timeout=DEFAULT_TIMEOUT), _loop)


def _loop() -> object:
    import asyncio  # noqa: PLC0415  # it takes long to import, and who has a Client needs none

    return asyncio.get_running_loop()
