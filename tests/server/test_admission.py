import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.server.admission import Backlog, Mean, Progress, ranks

TIMES = st.floats(0, 1000)


def one(now: float, deadline: float) -> float:
    (rank,) = ranks(now, deadline, longest_wait=10, images=1, seconds=1, others=3, spare=5)
    return rank


def test_the_oldest_deadline_goes_first() -> None:
    assert one(0, 5) < one(1, 7) < one(1, 60)


def test_a_short_deadline_is_ahead_by_the_longest_wait_at_most() -> None:
    assert one(0, 300) == one(0, 3000) == 10
    assert one(9.5, 10) == 10


@pytest.mark.parametrize(
    ("others", "spare", "before"),
    [(0, 5.0, 11), (1, 5.0, 11), (4, 5.0, 5), (1000, 5.0, 1), (1000, 1.0, 11), (1000, 0.0, 11), (1000, -1.0, 11)],
)
def test_a_single_image_comes_in_between_those_of_a_large_request(others: int, spare: float, before: int) -> None:
    large = ranks(0, 300, 10, images=200, seconds=0.1, others=others, spare=spare)

    assert sum(rank < one(2.05, 302.05) for rank in large) == before


def test_a_large_request_lets_others_pass_for_the_spare_time_or_as_long_as_it_takes_itself() -> None:
    last = [ranks(0, 300, 10, images=101, seconds=s, others=1000, spare=5.0)[-1] - 10 for s in (0.01, 0.04, 0.1)]

    assert last == pytest.approx([1 + 5, 4 + 5, 10 + 10])


def test_a_large_request_is_not_held_back_for_more_than_half_of_its_time() -> None:
    large = ranks(0, 20, 10, images=1000, seconds=1, others=1000, spare=5.0)

    assert max(large) == 20
    assert one(10.5, 30) > large[-1]


@given(
    now=TIMES,
    timeout=TIMES,
    longest=st.floats(0.1, 100),
    images=st.integers(0, 50),
    seconds=st.floats(0, 10),
    others=st.integers(0, 5000),
    spare=st.floats(-10, 100),
)
def test_ranks_keep_the_order_of_a_request(
    now: float, timeout: float, longest: float, images: int, seconds: float, others: int, spare: float
) -> None:
    found = ranks(now, now + timeout, longest, images, seconds, others, spare)

    assert len(found) == images
    assert found == sorted(found)
    assert all(now <= rank <= now + min(timeout, longest) + timeout / 2 + 1e-6 for rank in found)


def test_work_is_counted_up_to_a_rank() -> None:
    backlog = Backlog()
    for rank, seconds in [(1.2, 5.0), (1.9, 1.0), (7.0, 3.0)]:
        backlog.enter(rank, seconds)

    assert [backlog.before(rank) for rank in (0.9, 1.0, 6.9, 7.0, float("inf"))] == [0, 6, 6, 9, 9]
    backlog.change(1.2, -4.0)
    assert backlog.before(2) == 2
    backlog.leave(1.2, 1.0)
    backlog.leave(1.9, 1.0)
    assert backlog.before(5) == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1e6)), max_size=30))
def test_rounding_leaves_nothing_behind(entries: list[tuple[float, float]]) -> None:
    backlog = Backlog()
    for rank, seconds in entries:
        backlog.enter(rank, seconds)
        backlog.change(rank, 0.1)
    for rank, seconds in entries:
        backlog.leave(rank, seconds + 0.1)

    assert backlog.before(float("inf")) == 0


def test_a_running_mean_follows_each_key() -> None:
    mean = Mean(1.0)
    for _ in range(100):
        mean.add("a", 0.5)

    assert mean["a"] == pytest.approx(0.5, abs=0.01)
    assert mean["b"] == 1.0


def test_progress_is_work_by_time_whatever_takes_the_time() -> None:
    progress = Progress(2.0, longest_wait=10.0)
    progress.begin(100.0)
    for i in range(1, 11):
        progress.done(100.0 + i, seconds=0.25, left=50.0)

    assert progress.rate == pytest.approx(0.25, rel=0.1)


def test_progress_is_not_measured_while_there_is_little_to_do_or_nothing() -> None:
    progress = Progress(2.0, longest_wait=10.0)
    progress.begin(0.0)
    progress.done(1.0, seconds=0.01, left=0.3)
    progress.begin(1000.0)

    assert progress.rate == 2.0
    progress.done(1005.0, seconds=5.0, left=50.0)
    assert progress.rate == pytest.approx(1, rel=0.1)  # the pause does not count


def test_progress_never_comes_to_nothing() -> None:
    progress = Progress(2.0, longest_wait=0.001)
    progress.begin(0.0)

    progress.done(1.0, seconds=0.0, left=50.0)  # the first image of its kind: nobody knew what decoding it would take

    assert progress.rate == 2.0


def test_of_a_process_that_stood_still_little_is_learnt() -> None:
    progress = Progress(1.0, longest_wait=10.0)
    progress.begin(0.0)
    for i in range(1, 101):
        progress.done(i / 10, seconds=0.1, left=5.0)

    progress.done(3600.0, seconds=0.1, left=5.0)

    assert 0.1 < progress.rate < 1


def test_progress_that_was_slow_is_found_fast_again() -> None:
    progress = Progress(2.0, longest_wait=10.0)
    progress.begin(0.0)
    progress.done(60.0, seconds=0.001, left=1.0)  # an engine was opened anew meanwhile
    for i in range(500):
        progress.done(60.0 + i / 10, seconds=0.1, left=1.0)

    assert progress.rate == pytest.approx(1, rel=0.05)
