"""Engines that die: how to tell, and how to get another one."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.engines import Engine
from resnet_ensemble.server.stopping import SLACK

log = logging.getLogger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0  # seconds between attempts to open an engine


class Revival:
    """Asks engines for views that a sound one answers, and opens others in place of those that don't.

    - classes: how many probabilities an engine gives
    - probes: of each member, views uint8 (n, h, w, 3) that a sound engine answers
    - reopen: opens a member's engine anew
    - closing: set when nobody needs another engine any more
    """

    def __init__(
        self,
        *,
        classes: int,
        probes: Sequence[NDArray[np.uint8]],
        reopen: Callable[[int], Engine],
        closing: threading.Event,
    ) -> None:
        self._classes = classes
        self._probes = probes
        self._reopen = reopen
        self._closing = closing

    def check(self, probabilities: NDArray[np.float32], views: int) -> None:
        """Refuse what is no list of probabilities; stopping.py relies on their range. Raises ValueError."""
        if probabilities.shape != (views, self._classes):
            raise ValueError(f"the engine answered {probabilities.shape}, not {(views, self._classes)}")
        if not (probabilities.min() >= -SLACK and probabilities.max() <= 1 + SLACK):  # so written, NaN is refused
            raise ValueError("the engine answered something that is not a probability")

    def is_sound(self, member: int, engine: Engine) -> bool:
        """Whether an engine that failed answers what it has answered before. If not, it is dead."""
        try:
            self._probe(member, engine)
        except Exception:
            log.exception("the engine of member %d fails on a view that it has answered before", member)
            return False
        return True

    def replace(
        self,
        member: int,
        dead: Engine,
        on_failure: Callable[[Exception], None],
        attempt: Callable[[], AbstractContextManager[None]],
    ) -> Engine | None:
        """Another engine in place of one that nothing uses any more, however many attempts it takes.

        - on_failure: told of each that failed, since the next may come much later
        - attempt: surrounds what may hang: closing the dead one, and each attempt

        None if it is closing.
        """
        with attempt():
            close(dead)
        delay = _FIRST_DELAY
        while True:
            try:
                with attempt():
                    fresh = self._opened(member)
            except Exception as error:
                log.exception("the engine of member %d can't be opened anew", member)
                on_failure(error)
            else:
                log.warning("the engine of member %d was opened anew", member)
                return fresh
            if self._closing.wait(delay):
                return None
            delay = min(2 * delay, _LONGEST_DELAY)

    def _opened(self, member: int) -> Engine:
        fresh = self._reopen(member)
        try:
            self._probe(member, fresh)
        except Exception:
            close(fresh)  # attempts go on for as long as it takes, and each would keep its memory
            raise
        return fresh

    def _probe(self, member: int, engine: Engine) -> None:
        probe = self._probes[member]
        self.check(engine.run(probe), len(probe))


def close(engine: Engine) -> None:
    """Free what it holds. What can't be freed is logged: others still can."""
    try:
        engine.close()
    except Exception:
        log.exception("an engine on %s can't be closed", engine.info.backend)
