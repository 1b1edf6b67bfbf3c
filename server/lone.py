"""Which of a member's two engines runs a view that nothing else runs beside: one core's, or the one for every core.

Both give the same answer, so served views are what is measured. At start, a server that measured while others started
on the same cores found a ResNet-18 no quicker on two cores than on one, even in five runs of each side by side, and
answered lone requests in 54 ms for the rest of its life, where 36 were possible.
"""

from collections import deque
from statistics import median

from resnet_ensemble.export.engines import Engine

_LAST = 5  # runs of each that count
# The slower one is tried again after so many views, in case the host has changed or was busy when both were measured;
# each time after twice as many, up to a number at which neither the images/s nor the 99th percentile tell.
_AGAIN = 8
_SELDOM = 1024


class Lone:
    """Counts the turns of both engines. `engine`: the one for every core."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._seconds: dict[bool, deque[float]] = {on_all: deque(maxlen=_LAST) for on_all in (True, False)}
        self._turns = 0  # since the slower one was tried last
        self._again = _AGAIN
        self._sooner: bool | None = None

    def takes_next(self) -> bool:
        """Whether the next view is run on every core."""
        on_all, on_one = self._seconds[True], self._seconds[False]
        if min(len(on_all), len(on_one)) < _LAST:
            return len(on_all) <= len(on_one)
        sooner = median(on_all) < median(on_one)
        if sooner != self._sooner:
            self._sooner, self._turns, self._again = sooner, 0, _AGAIN
        self._turns += 1
        if self._turns <= self._again:
            return sooner
        self._turns, self._again = 0, min(2 * self._again, _SELDOM)
        return not sooner

    def took(self, seconds: float, *, on_all: bool) -> None:
        """A run that nothing was beside took so long for each of its pixels, on every core or on one."""
        self._seconds[on_all].append(seconds)
