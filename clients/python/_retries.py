"""When to try again, and after how long: the policy in one place."""

import random

DEFAULT_RETRIES = 2
FIRST_DELAY = 0.5  # seconds; doubled with each retry
LONGEST_DELAY = 8.0
LONGEST_RETRY_AFTER = 60.0  # a server that asks for more is not waited for
_RETRIED = frozenset({408, 429})


def retryable(status: int) -> bool:
    """Whether another attempt may succeed. Classifying changes nothing, so repeating it is always safe."""
    return status in _RETRIED or status >= 500


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header; None if it is absent or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def delay(retry: int, retry_after: float | None) -> float | None:
    """Seconds before retry number `retry` (from 0), or None to give up.

    The server's word counts when it gave one, with up to a quarter more so that clients don't return together.
    """
    if retry_after is not None:
        if retry_after > LONGEST_RETRY_AFTER:
            return None
        return retry_after * random.uniform(1, 1.25)  # noqa: S311  # jitter, not a secret
    return float(min(LONGEST_DELAY, FIRST_DELAY * 2**retry) * random.uniform(0.5, 1))  # noqa: S311
