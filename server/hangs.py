"""Which engine runs, and openings, will not end. No threads, no clocks: the time is an argument.

A call into a library that hangs can't be ended from within its process. So whoever waits for it is told, and so is
whoever can restart the process; should the run end after all, the engine is used again.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")
# A busy machine is no hanging one.
_TIMES_PLANNED = 20


@dataclass(frozen=True)
class Run(Generic[_T]):
    """What is run, and when it is overdue."""

    what: _T
    began: float
    due: float


class Runs(Generic[_T]):
    """Engine runs and openings in progress.

    - limit: seconds that each may take, or _TIMES_PLANNED times what was planned for it if these are more
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._runs: dict[Hashable, Run[_T]] = {}

    def begin(self, key: Hashable, what: _T, planned: float, now: float) -> None:
        """A run that was planned to take so many seconds."""
        self._runs[key] = Run(what, now, now + max(self._limit, _TIMES_PLANNED * planned))

    def end(self, key: Hashable) -> None:
        """It has ended, however late."""
        del self._runs[key]

    def overdue(self, now: float) -> dict[Hashable, Run[_T]]:
        """Those that hang, by key."""
        return {key: run for key, run in self._runs.items() if run.due <= now}
