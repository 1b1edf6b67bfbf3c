from collections import Counter

import pytest

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.lone import Lone


def serve(lone: Lone, views: int, on_all: float, on_one: float) -> Counter[bool]:
    """How many of so many views were run on every core, and on one, where they take so many seconds."""
    turns: Counter[bool] = Counter()
    for _ in range(views):
        turns[taken := lone.takes_next()] += 1
        lone.took(on_all if taken else on_one, on_all=taken)
    return turns


def test_both_have_five_turns_and_then_the_slower_one_ever_fewer() -> None:
    assert serve(Lone(FakeEngine(10)), 10, 0.1, 0.2) == {True: 5, False: 5}
    assert serve(Lone(FakeEngine(10)), 110, 0.1, 0.2) == {True: 102, False: 8}  # after 8, 16 and 32 more
    assert serve(Lone(FakeEngine(10)), 10_010, 0.1, 0.2)[False] == pytest.approx(20, abs=2)
    assert serve(Lone(FakeEngine(10)), 10_010, 0.2, 0.1)[True] == pytest.approx(20, abs=2)


def test_what_was_measured_while_others_were_busy_is_corrected_soon() -> None:
    lone = Lone(FakeEngine(10))
    serve(lone, 10, 0.5, 0.2)

    assert serve(lone, 70, 0.1, 0.2)[True] >= 10

    assert serve(lone, 100, 0.1, 0.2)[True] >= 90


def test_an_engine_that_was_interrupted_now_and_then_is_not_given_up() -> None:
    lone = Lone(FakeEngine(10))
    for seconds in (0.1, 9.0, 0.1, 9.0, 0.1):
        lone.took(seconds, on_all=True)
        lone.took(0.2, on_all=False)

    assert serve(lone, 100, 0.1, 0.2)[True] == 97


def test_a_host_that_has_changed_is_noticed() -> None:
    lone = Lone(FakeEngine(10))
    serve(lone, 100, 0.3, 0.2)

    serve(lone, 5000, 0.1, 0.2)

    assert serve(lone, 100, 0.1, 0.2)[True] >= 99


def test_runs_that_something_was_beside_do_not_count() -> None:
    lone = Lone(FakeEngine(10))

    assert all(lone.takes_next() for _ in range(100))
