"""How many requests to have in flight: additive up, halved when the server refuses. Pure; the caller has the clock."""

import math

PROBING = 1 / 16  # of the usual pace, where the server refused the last time


class Aimd:
    """A limit between 1 and `most`.

    Each round of answers raises it by one. A refusal halves it, once for all that was in flight. Near the limit at
    which the server refused the last time it rises slowly: otherwise, with a short queue, one request in ten or so
    would be sent only to be refused.
    """

    def __init__(self, *, start: int = 4, most: int = 64) -> None:
        if most < 1:
            raise ValueError(f"the greatest concurrency is {most}; it must be at least 1")
        self._most = most
        self._limit = float(min(start, most))
        self._ceiling = math.inf  # the limit that was refused the last time
        self._last_cut = -math.inf

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return int(self._limit)

    def succeeded(self) -> None:
        """Count an answer."""
        if self._limit > self._ceiling + 1:
            self._ceiling = math.inf  # the server takes more than it did
        pace = 1.0 if self._limit + 1 < self._ceiling else PROBING
        self._limit = min(self._most, self._limit + pace / self._limit)

    def refused(self, *, sent: float, now: float) -> None:
        """Count a refusal of a request that was sent at `sent`; one sent before the last cut tells nothing new."""
        if sent < self._last_cut:
            return
        self._ceiling = self._limit
        self._limit = max(1.0, self._limit / 2)
        self._last_cut = now
