import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.client._retries import LONGEST_DELAY, LONGEST_RETRY_AFTER, delay, parse_retry_after, retryable


@given(retry=st.integers(0, 50))
def test_delays_double_up_to_a_bound_with_jitter(retry: int) -> None:
    full = min(LONGEST_DELAY, 0.5 * 2**retry)

    waited = delay(retry, None)

    assert waited is not None
    assert full / 2 <= waited <= full


@given(seconds=st.floats(0, 1e6))
def test_the_servers_word_is_kept_or_given_up(seconds: float) -> None:
    waited = delay(0, seconds)

    if seconds > LONGEST_RETRY_AFTER:
        assert waited is None
    else:
        assert waited is not None
        assert seconds <= waited <= 1.25 * seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("inf", None), ("Wed, 21 Oct 2026", None)],
)
def test_retry_after_is_parsed_or_ignored(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


@pytest.mark.parametrize(("status", "again"), [(200, False), (408, True), (422, False), (429, True), (500, True)])
def test_which_statuses_may_pass_later(status: int, again: bool) -> None:
    assert retryable(status) is again
