import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.client.batch._aimd import Aimd


def rounds(aimd: Aimd, count: int) -> None:
    for _ in range(count * aimd.limit):
        aimd.succeeded()


def test_a_round_of_answers_raises_the_limit_by_one() -> None:
    aimd = Aimd(start=4)

    rounds(aimd, 1)
    assert aimd.limit == 4  # not quite: the pace falls as the limit rises
    aimd.succeeded()
    assert aimd.limit == 5


def test_a_refusal_halves_the_limit_once_for_all_that_was_in_flight() -> None:
    aimd = Aimd(start=32)

    for sent in (0.1, 0.2, 0.3):
        aimd.refused(sent=sent, now=1.0)
    assert aimd.limit == 16

    aimd.refused(sent=1.5, now=2.0)
    assert aimd.limit == 8


def test_it_is_careful_where_it_was_refused_and_bold_again_when_that_is_past() -> None:
    aimd = Aimd(start=16)
    aimd.refused(sent=0, now=1)

    rounds(aimd, 8)
    near = aimd.limit
    rounds(aimd, 8)
    assert 13 <= near <= 15
    assert aimd.limit <= 16

    rounds(aimd, 60)
    assert aimd.limit > 25


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=300), st.integers(1, 100), st.integers(1, 100))
def test_the_limit_stays_between_one_and_the_most(events: list[tuple[bool, float]], start: int, most: int) -> None:
    aimd = Aimd(start=start, most=most)
    now = 0.0
    for refused, passed in events:
        now += passed
        if refused:
            aimd.refused(sent=now, now=now)
        else:
            aimd.succeeded()
        assert 1 <= aimd.limit <= most


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        Aimd(most=0)


@pytest.mark.parametrize("room", [2, 5, 20, 50])
def test_it_settles_near_the_room_of_the_server_with_few_refusals(room: int) -> None:
    """A server with room for so many requests refuses any more at once; the others take a second, more or less."""
    aimd, chance = Aimd(most=64), random.Random(0)
    now, answers, refused, answered, busy = 0.0, list[float](), 0, 0, 0.0
    while now < 300:
        settled = now > 50
        while len(answers) < aimd.limit:
            if len(answers) >= room:
                aimd.refused(sent=now, now=now)
                refused += settled
                break
            answers.append(now + chance.uniform(0.5, 1.5))
        answers.sort()
        busy += settled * (answers[0] - now) * len(answers)
        answered += settled
        now = answers.pop(0)
        aimd.succeeded()

    assert busy / (now - 50) > 0.75 * room
    assert refused / answered < 0.05
