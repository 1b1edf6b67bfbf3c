"""When to try again, and after how long: the policy in one place."""

import email.utils
import math
import random
import time

DEFAULT_RETRIES = 2
DEFAULT_RETRY_SECONDS = 60.0  # after the first attempt began, none begins later than this
FIRST_DELAY = 0.5  # seconds; doubled with each retry
LONGEST_DELAY = 8.0
_RETRIED = frozenset({408, 429})
_NEVER = frozenset({501, 505})  # what is not implemented will not be a second later


def retryable(status: int) -> bool:
    """Whether another attempt may succeed. Classifying changes nothing, so repeating it is always safe."""
    return status in _RETRIED or (status >= 500 and status not in _NEVER)


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds from a Retry-After header, which is a number or a date; None if it is absent or neither.

    now: seconds since the epoch, for dates
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value).timestamp()
        except (ValueError, OverflowError):
            return None
        seconds = max(0.0, date - (time.time() if now is None else now))
    return seconds if 0 <= seconds < math.inf else None


def delay(retry: int, retry_after: float | None) -> float:
    """Seconds before retry number `retry` (from 0).

    The server's word counts when it gave one, with up to a quarter more so that clients don't return together.
    """
    if retry_after is not None:
        return retry_after * random.uniform(1, 1.25)  # noqa: S311  # jitter, not a secret
    # 2**retry of a large retry is no float; the bound is reached long before
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(retry, 30)) * random.uniform(0.5, 1)  # noqa: S311
