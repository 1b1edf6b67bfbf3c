"""How many images one client may have in progress, and how many bytes all of them."""

from collections import Counter
from collections.abc import Iterator
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
    """Counts bytes of request bodies; used from the event loop only. `limit`: bytes in progress."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count a body of this size while the block runs. Raises ApiError("overloaded")."""
        if self._held + size > self._limit:
            raise ApiError(
                "overloaded",
                f"the bodies of requests in progress have {self._held} bytes, this one {size}; together {self._limit} "
                "are allowed. A Content-Length tells the server how little it is",
                retry_after=1,
                reason="memory",
            )
        self._held += size
        try:
            yield
        finally:
            self._held -= size
