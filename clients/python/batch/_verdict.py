"""What to do about a request that failed. Pure."""

from collections import Counter
from enum import Enum
from typing import Literal

import httpx2

from resnet_ensemble.client._errors import (
    AuthenticationError,
    ConnectionFailedError,
    ResnetError,
    StatusError,
    TimedOutError,
)

LONGEST_DELAY = 2.0  # seconds: a server that comes back finds its clients there
# Failures that may be the picture's own fault, and how many of them it takes. A server that was away or busy in between
# says nothing about the picture, so that does not count.
_MOST = {"timeout": 5, "lost": 10, "failed": 3}


class Verdict(Enum):
    """What to do.

    - AGAIN: later, for as long as the job is patient; nothing is wrong with the picture
    - REFUSED: the same, and with fewer requests in flight
    - ROW: it is an error row
    - STOP: every other picture would fail too
    """

    AGAIN = "again"
    REFUSED = "refused"
    ROW = "row"
    STOP = "stop"


def verdict(error: ResnetError, before: Counter[str]) -> Verdict:
    """Judge a failure of a picture. `before` holds what it may be to blame for up to now, and is added to."""
    known = _known(error)
    if isinstance(known, Verdict):
        return known
    before[known] += 1
    if before[known] >= _MOST[known]:
        return Verdict.ROW
    return Verdict.REFUSED if known == "timeout" else Verdict.AGAIN


def _known(error: ResnetError) -> Verdict | Literal["timeout", "lost", "failed"]:
    """What to do, or what the picture may be to blame for."""
    if isinstance(error, StatusError):
        return _of_status(error)
    if not isinstance(error, ConnectionFailedError):
        return Verdict.STOP  # whatever answers there is no server of ours
    if isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)):
        return Verdict.AGAIN
    # Otherwise it broke after the picture was sent: the server went away, or this picture makes it go away.
    return "timeout" if isinstance(error, TimedOutError) else "lost"


def stops(error: StatusError) -> bool:
    """Whether it would be the same for every picture."""
    asked_wrongly = error.code in ("method_not_allowed", "invalid_option", "not_calibrated")
    return isinstance(error, AuthenticationError) or asked_wrongly or error.status == 404


def _of_status(error: StatusError) -> Verdict | Literal["timeout", "failed"]:
    if stops(error):
        return Verdict.STOP
    if error.status == 408 or error.code == "deadline_exceeded":
        return "timeout"
    if error.status in (502, 504) or error.code == "not_ready":
        return Verdict.AGAIN
    if error.status in (429, 503):
        return Verdict.REFUSED
    return "failed" if error.status >= 500 else Verdict.ROW
