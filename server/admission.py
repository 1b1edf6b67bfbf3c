"""Whom to take, and who comes first. No threads, no clocks: the time is an argument.

Every image has a rank, a point in time: the oldest deadline goes first. But a deadline further away than the longest
wait that is accepted counts as that, so that impatient clients are only so much ahead of others; and the later images
of a request are moved back, so that others have their turn in between, as far as the limit of its wait allows. An image
goes before everything that arrives so much later that its own rank is larger: nobody starves, whatever else arrives.
"""

import math
from collections.abc import Hashable

_SMOOTHING = 0.1  # weight of the newest value in a running mean
# Of the longest wait: how long work must last for progress to be measured, and for how long what is assumed in the
# beginning counts. With much less, the first small batch of a burst looks slow, and others are refused; with more, the
# first second of an overload is taken as if engines were all that takes time.
_LITTLE = 0.02


class Overloaded(Exception):
    """The predicted wait is above the limit.

    - reason: `wait` for the server's limit, `deadline` for the request's own
    - retry_after: seconds until the wait is expected to be below
    """

    def __init__(self, predicted: float, limit: float, reason: str) -> None:
        allowed = "the time that the request has left" if reason == "deadline" else "the limit"
        super().__init__(f"the predicted wait is {predicted:.1f} s, above {allowed} of {round(limit, 1):g} s")
        self.reason = reason
        self.retry_after = max(1, math.ceil(predicted - limit))


def ranks(
    now: float, deadline: float, longest_wait: float, images: int, seconds: float, others: int, spare: float
) -> list[float]:
    """The ranks of a request's images, in their order.

    - seconds: from one of its images to the next if the engines had nothing else to do
    - others: requests in progress
    - spare: seconds that it may wait for those that come later

    The first image competes as the only image of a request would. The following ones rank as if they came when they
    would be run if all requests shared the engines equally; but with more others than that, as if they came after the
    spare seconds, or in every second turn if that is later: otherwise a large request would wait for as long as there
    are new ones. Never later than after half of the request's time. If its images take longer than was expected, those
    that are still in line are moved back accordingly (dispatch.py).
    """
    left = max(0.0, deadline - now)
    first = now + min(left, longest_wait)
    alone = [i * seconds for i in range(images)]
    return [first + min(time + max(time, min(others * time, spare)), left / 2) for time in alone]


class Backlog:
    """Seconds of expected work by rank, in steps of a second, so that a request is judged without looking at all."""

    def __init__(self) -> None:
        self._steps: dict[int, list[float]] = {}  # by whole second of rank: seconds of work, images

    def enter(self, rank: float, seconds: float) -> None:
        """Count an image."""
        step = self._steps.setdefault(math.floor(rank), [0.0, 0])
        step[0] += seconds
        step[1] += 1

    def change(self, rank: float, seconds: float) -> None:
        """More or less work for an image that is counted."""
        self._steps[math.floor(rank)][0] += seconds

    def leave(self, rank: float, seconds: float) -> None:
        """Count an image no more, nor the seconds that it was still expected to take."""
        step = self._steps[math.floor(rank)]
        step[0] -= seconds
        step[1] -= 1
        if not step[1]:  # nothing is left of rounding, either
            del self._steps[math.floor(rank)]

    def before(self, rank: float) -> float:
        """Seconds of work that goes before what comes now with this rank. Another thread may count meanwhile."""
        return sum(seconds for step, (seconds, _) in list(self._steps.items()) if step <= rank)


class Progress:
    """How many seconds of expected work are done in a second: by engines, decoders and all that happens around them.

    It is measured while enough work is left, since few images can't keep everything busy; measurements are forgotten
    over the longest wait.

    - first: what is assumed in the beginning
    - longest_wait: in seconds
    """

    def __init__(self, first: float, longest_wait: float) -> None:
        self._longest_wait = longest_wait
        self._time = _LITTLE * longest_wait
        self._work = first * self._time
        self._last = 0.0

    @property
    def rate(self) -> float:
        """Seconds of expected work in a second."""
        return self._work / self._time

    def begin(self, now: float) -> None:
        """Work comes after there was none, or goes on that could not be done."""
        self._last = now

    def done(self, now: float, seconds: float, left: float) -> None:
        """So much expected work was done, and so much is left. Of what nothing was expected, nothing is learnt.

        Nor is much from a process or a machine that stood still for a while.
        """
        elapsed, self._last = min(now - self._last, self._longest_wait + seconds), now
        if not seconds or left < _LITTLE * self._longest_wait * self.rate:
            return
        kept = math.exp(-elapsed / self._longest_wait)
        self._work, self._time = kept * self._work + seconds, kept * self._time + elapsed


class Mean:
    """Running means by key, of which the newest values count most.

    - first: what is assumed before there is a value; without it 0, and the first value counts alone
    """

    def __init__(self, first: float | None = None) -> None:
        self._first = first
        self._values: dict[Hashable, float] = {}

    def __getitem__(self, key: Hashable) -> float:
        return self._values.get(key, self._first or 0.0)

    def add(self, key: Hashable, value: float) -> None:
        """Move the mean of a key towards a value."""
        known = self._values.get(key, value if self._first is None else self._first)
        self._values[key] = known + _SMOOTHING * (value - known)
