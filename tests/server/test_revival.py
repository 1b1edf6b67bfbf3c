"""Which engines are dead, and how another is found."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_ensemble.export.engines import Engine
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import revival
from resnet_ensemble.server.revival import Revival
from resnet_ensemble.server.stopping import SLACK

CLASSES = 10


class Closes(FakeEngine):
    """Says whether it was closed, and raises then what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(CLASSES)
        self.closed, self._error = False, error

    def close(self) -> None:
        self.closed = True
        if self._error:
            raise self._error


def killed() -> FakeEngine:
    engine = FakeEngine(CLASSES)
    engine.kill()
    return engine


def reviving(*attempts: Engine | Exception, closing: threading.Event | None = None) -> Revival:
    """Gives, or raises, these in turn."""
    following: Iterator[Any] = iter(attempts)

    def reopen(member: int) -> Engine:
        assert member == 1
        attempt: Engine | Exception = next(following)
        if isinstance(attempt, Exception):
            raise attempt
        return attempt

    probes = [np.zeros((1, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)]
    return Revival(classes=CLASSES, probes=probes, reopen=reopen, closing=closing or threading.Event())


def unexpected(error: Exception) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.full((1, CLASSES), np.nan, np.float32), "not a probability"),
        (np.full((1, CLASSES), 1 + 2 * SLACK, np.float32), "not a probability"),
        (np.full((1, CLASSES), -2 * SLACK, np.float32), "not a probability"),
        (np.zeros((1, CLASSES + 1), np.float32), r"answered \(1, 11\)"),
        (np.zeros((2, CLASSES), np.float32), r"answered \(2, 10\)"),
    ],
)
def test_what_is_no_list_of_probabilities_is_refused(answer: NDArray[np.float32], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reviving().check(answer, 1)


def test_rounding_beyond_0_and_1_is_no_nonsense() -> None:
    reviving().check(np.full((1, CLASSES), 1 + SLACK, np.float32), 1)
    reviving().check(np.full((1, CLASSES), -SLACK, np.float32), 1)


def test_an_engine_is_sound_that_answers_its_members_probe() -> None:
    sound = FakeEngine(CLASSES)

    assert reviving().is_sound(1, sound)
    assert sound.batches == [2]
    assert not reviving().is_sound(1, killed())
    assert not reviving().is_sound(1, FakeEngine(CLASSES + 1))


@pytest.mark.parametrize("error", [None, RuntimeError("the driver is gone")])
def test_a_dead_engine_is_closed_and_replaced_even_if_it_does_not_close(error: Exception | None) -> None:
    dead, fresh = Closes(error), FakeEngine(CLASSES)

    assert reviving(fresh).replace(1, dead, unexpected, nullcontext) is fresh
    assert dead.closed


def test_each_attempt_that_fails_is_told_and_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "_FIRST_DELAY", 0.001)
    told: list[str] = []
    fresh = FakeEngine(CLASSES)

    reviver = reviving(OSError("no device"), killed(), fresh)
    found = reviver.replace(1, killed(), lambda error: told.append(str(error)), nullcontext)

    assert found is fresh
    assert told[0] == "no device"
    assert "was killed" in told[1]
    assert len(told) == 2


def test_an_engine_that_is_opened_and_not_sound_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "_FIRST_DELAY", 0.001)
    unsound, fresh = Closes(), Closes()
    unsound.kill()

    assert reviving(unsound, fresh).replace(1, killed(), lambda _: None, nullcontext) is fresh
    assert (unsound.closed, fresh.closed) == (True, False)


def test_attempts_end_when_it_is_closing() -> None:
    closing = threading.Event()
    closing.set()
    told: list[Exception] = []

    assert reviving(OSError("no device"), closing=closing).replace(1, killed(), told.append, nullcontext) is None
    assert len(told) == 1


def test_what_may_hang_is_surrounded_and_the_time_between_attempts_is_not() -> None:
    seen: list[str] = []

    @contextmanager
    def attempt() -> Iterator[None]:
        seen.append("begins")
        try:
            yield
        finally:
            seen.append("ends")

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            seen.append(f"waits {timeout}")
            return False

    reviver = reviving(OSError("no device"), FakeEngine(CLASSES), closing=Waits())
    assert reviver.replace(1, killed(), lambda _: None, attempt)
    once = ["begins", "ends"]
    assert seen == [*once, *once, f"waits {revival._FIRST_DELAY}", *once]
