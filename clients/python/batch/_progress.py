"""How a job is getting on: counts, rates and percentiles, and one line that tells them."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

RECENT = 1000  # latencies that the percentiles are of
_WINDOW = 30.0  # seconds that the rate is of


@dataclass
class Progress:
    """What is known of a running job; it counts this run only, but for `skipped`."""

    clock: Callable[[], float] = time.monotonic
    total: int | None = None  # inputs, where that is known
    skipped: int = 0  # done in an earlier run, or named twice
    rows: int = 0
    errors: int = 0
    requests: int = 0
    refusals: int = 0  # 429, 503, and timeouts
    views_used: int = 0
    views_planned: int = 0
    concurrency: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._marks.append((self.clock(), 0))

    def rate(self) -> float:
        """Rows a second, lately."""
        now = self.clock()
        self._marks.append((now, self.rows))
        while len(self._marks) > 2 and self._marks[0][0] < now - _WINDOW:
            self._marks.popleft()
        (then, before), (_, rows) = self._marks[0], self._marks[-1]
        return (rows - before) / (now - then) if now > then else 0.0

    def percentile(self, share: float) -> float:
        """A latency in ms that so many of the recent ones are not above."""
        ordered = sorted(self.latencies_ms)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan

    def line(self) -> str:
        """One line, for a terminal or a log."""
        rate, done = self.rate(), self.rows + self.skipped
        parts = [f"{done:,}"]
        if self.total:
            parts = [f"{done:,}/{self.total:,} ({done / self.total:.1%})"]
        parts.append(f"{rate:.1f}/s")
        if self.total and rate:
            parts.append(f"ETA {duration((self.total - done) / rate)}")
        parts.append(f"errors {self.errors:,}")
        if self.latencies_ms:
            parts.append(f"p50 {self.percentile(0.5):.0f} ms, p95 {self.percentile(0.95):.0f} ms")
        if self.views_planned:
            parts.append(f"views saved {1 - self.views_used / self.views_planned:.0%}")
        parts.append(f"in flight {self.concurrency}")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
