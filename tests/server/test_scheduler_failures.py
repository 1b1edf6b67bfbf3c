"""Engines that die, hang, or are opened anew under the scheduler's threads: no job is lost, and others go on."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_ensemble.export import host
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.plan import Plan, Stage
from resnet_ensemble.server.scheduler import EngineGone, EngineHung
from tests.conftest import until
from tests.server.test_scheduler import CLASSES, FULL, Gate, Seen, busy, plan, scheduler, submit, views


def test_no_job_is_lost_when_an_engine_dies_under_load() -> None:
    seen, first, fresh = Seen(), Gate(), FakeEngine(CLASSES)
    other = FakeEngine(CLASSES)
    with scheduler(first, other, observer=seen, reopen=lambda _: fresh) as running:
        jobs = [submit(running, 20 * (i % 10), members=2) for i in range(30)]
        assert first.entered.wait(10)
        first.kill()
        first.open.set()
        tallies = [job.future.result(10) for job in jobs]

        until(lambda: seen.restarts)
        assert running.engines == [fresh, other]
        assert running.down == {}
        assert running.unfinished_views() == 0
    for i, tally in enumerate(tallies):
        expected = 10 * FakeEngine(CLASSES).run(views(20 * (i % 10), 1)).repeat(2, axis=0)
        np.testing.assert_allclose(tally.sums, expected, rtol=1e-5)
    assert seen.restarts == [0]
    assert sum(seen.retries) >= 1
    assert fresh.batches[:2] == [1, 10]  # a view that it must know, then what was lost, image by image


def test_while_an_engine_is_opened_anew_it_is_down_and_others_go_on() -> None:
    dead, other, opening = FakeEngine(CLASSES), FakeEngine(CLASSES), threading.Event()

    def reopen(member: int) -> Engine:
        assert member == 0
        assert opening.wait(10)
        return FakeEngine(CLASSES)

    with scheduler(dead, other, reopen=reopen) as running:
        dead.kill()
        job = submit(running, 0, members=2)
        until(lambda: sum(other.batches) == 10)

        assert running.down == {0: ""}
        assert not job.future.done()
        opening.set()
        assert job.future.result(10).views.tolist() == [10, 10]
        assert running.down == {}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_an_engine_that_is_opened_anew_may_use_every_core() -> None:
    dead, seen = FakeEngine(CLASSES), []

    def reopen(_: int) -> Engine:
        seen.append(os.sched_getaffinity(0))
        return FakeEngine(CLASSES)

    with scheduler(dead, streams=host.cores(), reopen=reopen) as running:
        dead.kill()
        submit(running, 0).future.result(10)

    assert seen == [os.sched_getaffinity(0)]


def test_opening_is_tried_again_and_what_is_down_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_ensemble.server.revival._FIRST_DELAY", 0.2)
    dead = FakeEngine(CLASSES)
    unsound = FakeEngine(CLASSES)
    unsound.kill()
    attempts: Iterator[Any] = iter([OSError("no device"), unsound, FakeEngine(CLASSES)])

    def reopen(_: int) -> Engine:
        attempt = next(attempts)
        if isinstance(attempt, Exception):
            raise attempt
        engine: Engine = attempt
        return engine

    with scheduler(dead, reopen=reopen) as running:
        dead.kill()
        waiting = submit(running, 0)
        until(lambda: running.down.get(0) == "OSError: no device")
        with pytest.raises(EngineGone):
            waiting.future.result(10)
        until(lambda: "was killed" in running.down.get(0, ""))
        until(lambda: not running.down)

        assert submit(running, 0).future.result(10).views.tolist() == [10]


def test_closing_does_not_wait_for_an_engine_that_does_not_come_back() -> None:
    dead = FakeEngine(CLASSES)

    def reopen(_: int) -> Engine:
        raise OSError("no device")

    with scheduler(dead, reopen=reopen) as running:
        dead.kill()
        job = submit(running, 0)
        until(lambda: running.down.get(0))
        running.close()

        with pytest.raises(EngineGone):
            job.future.result(0)


def test_what_waits_for_an_engine_that_hangs_is_given_up_and_others_go_on() -> None:
    gate, other = Gate(), FakeEngine(CLASSES)
    with scheduler(gate, other, streams=2, run_limit=0.05) as running:
        stuck = busy(running, gate)
        until(lambda: running.hung)
        late = submit(running, 0, members=2)

        for job in (stuck, late):
            with pytest.raises(EngineHung):
                job.future.result(10)
        assert (running.hung, running.down) == ({0}, {0: "it hangs"})
        assert running.unfinished_views() == 0

        (alone,) = running.admit(plan(), FULL, deadline=time.monotonic() + 1e6)
        alone.plan = Plan("views", (Stage(member=1, block=0, first=0, views=10, seconds=0.001),))
        running.submit(alone, [[], [views(255)]])
        assert alone.future.result(10).views.tolist() == [0, 10]

        gate.open.set()
        until(lambda: not running.hung)
        assert running.down == {}
        assert submit(running, 0, members=2).future.result(10).views.tolist() == [10, 10]


def test_an_opening_that_hangs_is_told_and_what_waits_for_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_ensemble.server.scheduler._OPENING", 0.001)
    dead, other, go = FakeEngine(CLASSES), FakeEngine(CLASSES), threading.Event()

    def reopen(_: int) -> Engine:
        go.wait()
        return FakeEngine(CLASSES)

    with scheduler(dead, other, reopen=reopen, run_limit=0.05) as running:
        dead.kill()
        waiting = submit(running, 0, members=2)
        with pytest.raises(EngineHung):
            waiting.future.result(10)
        assert (running.hung, running.down) == ({0}, {0: "it hangs"})

        go.set()
        until(lambda: not running.down)
        assert running.hung == set()
        assert submit(running, 0, members=2).future.result(10).views.tolist() == [10, 10]


def test_closing_does_not_wait_for_an_opening_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_ensemble.server.scheduler._OPENING", 0.001)
    dead, go = FakeEngine(CLASSES), threading.Event()

    def reopen(_: int) -> Engine:
        go.wait()
        raise OSError("no device")

    with scheduler(dead, reopen=reopen, run_limit=0.05) as running:
        dead.kill()
        job = submit(running, 0)
        until(lambda: running.hung)
        running.close()

        with pytest.raises(EngineHung):
            job.future.result(0)
        go.set()


def test_closing_does_not_wait_for_a_run_that_hangs() -> None:
    gate = Gate()
    with scheduler(gate, run_limit=0.05) as running:
        job = busy(running, gate)
        running.close()

        assert running.hung == {0}
        with pytest.raises(EngineHung):
            job.future.result(0)
        gate.open.set()


def test_an_image_that_kills_every_engine_fails_alone() -> None:
    class Deadly(FakeEngine):
        """One that white views kill."""

        def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
            if views.max() == 255:
                self.kill()
            return super().run(views)

    with scheduler(Deadly(CLASSES), streams=2, reopen=lambda _: Deadly(CLASSES)) as running:
        jobs = [submit(running, brightness, n=3) for brightness in (10, 20, 255, 30, 40)]
        wait([job.future for job in jobs], 10)

        assert [job.future.exception() is None for job in jobs] == [True, True, False, True, True]
