import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.client._retries import LONGEST_DELAY, delay, parse_retry_after, retryable


@given(retry=st.integers(0, 10_000))
def test_delays_double_up_to_a_bound_with_jitter(retry: int) -> None:
    full = min(LONGEST_DELAY, 0.5 * 2 ** min(retry, 30))

    assert full / 2 <= delay(retry, None) <= full


@given(seconds=st.floats(0, 1e6))
def test_the_servers_word_is_kept_with_some_jitter(seconds: float) -> None:
    assert seconds <= delay(0, seconds) <= 1.25 * seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Wed, 21 Oct 2026 07:28:09 GMT", 9.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
    ],
)
def test_retry_after_is_parsed_or_ignored(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=1792567680.0) == seconds


@pytest.mark.parametrize(
    ("status", "again"), [(200, False), (408, True), (422, False), (429, True), (500, True), (501, False), (503, True)]
)
def test_which_statuses_may_pass_later(status: int, again: bool) -> None:
    assert retryable(status) is again
