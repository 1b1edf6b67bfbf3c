"""How many images one client may have in progress, and how many bytes all of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from resnet_ensemble.server.errors import ApiError


class Quota:
    """Counts images by client; used from the event loop only. `limit`: images in progress, None for any number."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()

    @property
    def images(self) -> int:
        """In progress, of all clients."""
        return self._held.total()

    @contextmanager
    def hold(self, client: str, images: int) -> Iterator[None]:
        """Count `images` while the block runs. Raises ApiError("quota_exceeded")."""
        if self._limit is not None and self._held[client] + images > self._limit:
            held = self._held[client]
            raise ApiError(
                "quota_exceeded",
                f"{client} has {held} images in progress and asks for {images} more; {self._limit} are allowed",
                retry_after=1,
                reason="quota",
            )
        self._held[client] += images
        try:
            yield
        finally:
            self._held[client] -= images
            if not self._held[client]:
                del self._held[client]


class Memory:
    """Counts bytes of request bodies; used from the event loop only. `limit`: bytes in progress.

    Bytes count when they have come. If they did when they are announced, few clients that send nothing would keep all
    others away.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextmanager
    def hold(self, announced: int) -> Iterator[Callable[[int], None]]:
        """Count a body while the block runs: call what this gives with the size of each piece that has come.

        Both raise ApiError("overloaded"), this one if what is announced would be too much now.
        """
        self._check(announced)
        size = 0

        def take(piece: int) -> None:
            nonlocal size
            self._check(piece)
            size += piece
            self._held += piece

        try:
            yield take
        finally:
            self._held -= size

    def _check(self, more: int) -> None:
        if self._held + more > self._limit:
            raise ApiError(
                "overloaded",
                f"the bodies of requests in progress have {self._held} bytes, and {more} more would come; together "
                f"{self._limit} are allowed",
                retry_after=1,
                reason="memory",
            )
