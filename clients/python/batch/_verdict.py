"""What to do about a request that failed. Pure."""

from enum import Enum

import httpx2

from resnet_ensemble.client._errors import (
    AuthenticationError,
    ConnectionFailedError,
    ResnetError,
    StatusError,
    TimedOutError,
)

LONGEST_DELAY = 2.0  # seconds: a server that comes back finds its clients there
_ATTEMPTS = {"timeout": 5, "lost": 10, "failed": 3}  # of one picture, before it is its fault


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


def verdict(error: ResnetError, attempts: int) -> Verdict:
    """Judge a failure of the attempt number `attempts` (from 1) of a picture."""
    if isinstance(error, StatusError):
        return _of_status(error, attempts)
    if not isinstance(error, ConnectionFailedError):
        return Verdict.STOP  # whatever answers there is no server of ours
    if isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)):
        return Verdict.AGAIN
    if isinstance(error, TimedOutError):
        return Verdict.REFUSED if attempts < _ATTEMPTS["timeout"] else Verdict.ROW
    # The connection broke after the picture was sent: the server went away, or this picture makes it go away.
    return Verdict.AGAIN if attempts < _ATTEMPTS["lost"] else Verdict.ROW


def _of_status(error: StatusError, attempts: int) -> Verdict:
    if isinstance(error, AuthenticationError) or error.code in (
        "not_found",
        "method_not_allowed",
        "invalid_option",
        "not_calibrated",
    ):
        return Verdict.STOP
    if error.status == 408 or error.code == "deadline_exceeded":
        return Verdict.REFUSED if attempts < _ATTEMPTS["timeout"] else Verdict.ROW
    if error.status in (502, 504) or error.code == "not_ready":
        return Verdict.AGAIN
    if error.status in (429, 503):
        return Verdict.REFUSED
    if error.status >= 500:
        return Verdict.AGAIN if attempts < _ATTEMPTS["failed"] else Verdict.ROW
    return Verdict.STOP if error.code == "unknown" and error.status == 404 else Verdict.ROW
