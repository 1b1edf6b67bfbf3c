"""The scheduler's threads with fake engines: every job answered once, failures isolated, dead engines replaced."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resnet_ensemble.export import host
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.admission import Overloaded
from resnet_ensemble.server.jobs import Job
from resnet_ensemble.server.plan import Plan, cheapest_first
from resnet_ensemble.server.scheduler import EngineFailure, Observer, Scheduler
from resnet_ensemble.server.stopping import RULES, StopRule
from tests.conftest import until

CLASSES = 10
FULL, EXACT = RULES["full"], RULES["exact"]


class Gate(FakeEngine):
    """A fake engine that waits for `open` before it answers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CLASSES, **options)
        self.open, self.entered = threading.Event(), threading.Event()

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.open.wait(10)
        return super().run(views)


class Sure(FakeEngine):
    """Sure of class 4, whatever it sees."""

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        super().run(views)
        return np.eye(CLASSES, dtype=np.float32)[[4] * len(views)]


class Together(FakeEngine):
    """Answers when so many threads run it at once. `cpus`: what each of them was allowed to use."""

    def __init__(self, threads: int) -> None:
        super().__init__(CLASSES)
        self.cpus: list[set[int]] = []
        self._all = threading.Barrier(threads)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.cpus.append(os.sched_getaffinity(0))
        self._all.wait(10)
        return super().run(views)


def never(_: int) -> Engine:
    raise AssertionError("no engine has died")


@contextmanager
def scheduler(*engines: FakeEngine, **options: Any) -> Iterator[Scheduler]:
    defaults: dict[str, Any] = {
        "classes": CLASSES,
        "streams": 1,
        "batch_pixels": [32 * 16] * len(engines),
        "max_wait": 1e9,
        "probes": [np.zeros((1, 4, 4, 3), np.uint8)] * len(engines),
        "reopen": never,
    }
    running = Scheduler(engines, **(defaults | options))
    try:
        yield running
    finally:
        for engine in engines:
            if isinstance(engine, Gate):
                engine.open.set()
        running.close()


def views(brightness: int, n: int = 10, side: int = 4) -> NDArray[np.uint8]:
    return np.full((n, side, side, 3), brightness, np.uint8)


def plan(n: int = 10, members: int = 1, seconds: float = 0.001) -> Plan:
    return cheapest_first("p", [[seconds * (1 + member)] for member in range(members)], [n])


def submit(running: Scheduler, brightness: int, n: int = 10, members: int = 1, rule: StopRule = FULL) -> Job:
    (job,) = running.admit(plan(n, members), rule, deadline=time.monotonic() + 1e6)
    running.submit(job, [[views(brightness, n)]] * members)
    return job


def busy(running: Scheduler, gate: Gate) -> Job:
    """A job that keeps the only worker busy until the gate opens, so that what comes next waits in the queue."""
    job = submit(running, 0, n=1)
    assert gate.entered.wait(10)
    return job


def test_a_job_is_answered_with_the_sums_of_its_views() -> None:
    engines = FakeEngine(CLASSES), FakeEngine(CLASSES)
    with scheduler(*engines) as running:
        tally = submit(running, 255, n=3, members=2).future.result(10)

    assert tally.views.tolist() == [3, 3]
    np.testing.assert_allclose(tally.sums, 3 * engines[0].run(views(255, 1)).repeat(2, axis=0), rtol=1e-6)
    assert tally.queue_seconds >= 0
    assert tally.inference_seconds > 0


def test_an_exact_job_runs_only_what_it_needs() -> None:
    engines = Sure(CLASSES), Sure(CLASSES)
    with scheduler(*engines, streams=2) as running:
        tally = submit(running, 0, members=2, rule=EXACT).future.result(10)

        assert tally.views.tolist() == [10, 1]
        assert running.unfinished_views() == running.waiting_views() == 0
    assert sum(engines[1].batches) == 1


def test_views_of_waiting_images_share_batches() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        busy(running, gate)
        jobs = [submit(running, 20 * i) for i in range(6)]
        assert running.waiting_views() == 60
        gate.open.set()
        labels = [int(job.future.result(10).sums[0].argmax()) for job in jobs]

    assert gate.batches == [1, 32, 28]
    assert labels == [0, 1, 1, 2, 3, 4]


def test_images_of_other_sizes_are_not_packed_together() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        busy(running, gate)
        small, large = running.admit(plan(2), FULL, 2, deadline=1e9)
        running.submit(small, [[views(0, 2, side=4)]])
        running.submit(large, [[views(0, 2, side=8)]])
        gate.open.set()
        wait([small.future, large.future], 10)

    assert gate.batches == [1, 2, 2]


def test_the_oldest_image_is_answered_first() -> None:
    gates = Gate(), Gate()
    order: list[int] = []
    with scheduler(*gates, batch_pixels=[4 * 16] * 2) as running:
        first = submit(running, 0, n=1, members=2)
        assert gates[0].entered.wait(10)
        jobs = [submit(running, 0, n=4, members=2) for _ in range(3)]
        for number, job in enumerate(jobs):
            job.future.add_done_callback(lambda _, n=number: order.append(n))
        for gate in gates:
            gate.open.set()
        wait([job.future for job in (first, *jobs)], 10)

    assert order == [0, 1, 2]


def test_one_bad_image_fails_alone() -> None:
    gate = Gate(fails=lambda view: view.max() == 255)
    with scheduler(gate) as running:
        busy(running, gate)
        jobs = [submit(running, brightness, n=3) for brightness in (10, 255, 30)]
        gate.open.set()
        wait([job.future for job in jobs], 10)

        assert [job.future.exception() is None for job in jobs] == [True, False, True]
        assert running.unfinished_views() == 0
        assert running.down == {}
    with pytest.raises(EngineFailure, match="told to fail"):
        jobs[1].future.result()


def test_an_engine_that_answers_nonsense_fails_the_image() -> None:
    class Nonsense(FakeEngine):
        def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.full((1, CLASSES), np.nan, np.float32) if views.max() else super().run(views)

    with scheduler(Nonsense(CLASSES)) as running, pytest.raises(EngineFailure, match="not a probability"):
        submit(running, 9, n=1).future.result(10)


def test_a_released_job_takes_its_views_out_of_the_queue() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        first = busy(running, gate)
        dropped, kept = submit(running, 0), submit(running, 0)
        running.release(dropped)

        assert running.unfinished_views() == 11
        gate.open.set()
        kept.future.result(10)
        first.future.result(10)
        with pytest.raises(CancelledError):
            dropped.future.result(0)

    assert gate.batches == [1, 10]


def test_a_job_that_is_released_while_it_runs_does_no_harm() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        job = busy(running, gate)
        running.release(job)
        gate.open.set()
        submit(running, 0).future.result(10)

        assert running.unfinished_views() == 0


def test_a_future_that_was_cancelled_from_outside_does_no_harm() -> None:
    """asyncio.wrap_future cancels the future itself when its task is cancelled; `release` comes after."""
    gate = Gate()
    with scheduler(gate) as running:
        job = busy(running, gate)
        job.future.cancel()
        gate.open.set()
        submit(running, 0).future.result(10)
        running.release(job)

        assert running.unfinished_views() == 0


def test_releasing_or_failing_a_finished_job_changes_nothing() -> None:
    with scheduler(FakeEngine(CLASSES)) as running:
        job = submit(running, 0)
        tally = job.future.result(10)
        running.release(job)
        running.fail(job, ValueError())

        assert job.future.result() is tally
        assert running.unfinished_views() == 0


def test_a_job_can_be_answered_with_an_error_of_its_own() -> None:
    with scheduler(FakeEngine(CLASSES)) as running:
        (job,) = running.admit(plan(), FULL, deadline=1e9)
        running.fail(job, ValueError("not an image"))

        with pytest.raises(ValueError, match="not an image"):
            job.future.result(0)
        assert running.unfinished_views() == 0


def test_admission_is_by_predicted_wait() -> None:
    gate = Gate()
    with scheduler(gate, max_wait=0.5) as running:
        far = time.monotonic() + 1e6
        running.check(far)
        running.admit(plan(100, seconds=0.01), FULL, deadline=far)

        assert running.predicted_wait() == pytest.approx(1)
        with pytest.raises(Overloaded, match=r"above the limit of 0\.5 s"):
            running.check(far)
        with pytest.raises(Overloaded):
            running.admit(plan(), FULL, deadline=far)


def test_closing_runs_what_is_queued_and_what_follows_from_it() -> None:
    gates = Gate(), Gate()
    with scheduler(*gates) as running:
        jobs = [submit(running, 0, members=2, rule=EXACT) for _ in range(5)]
        closing = threading.Thread(target=running.close)
        closing.start()
        for gate in gates:
            gate.open.set()
        closing.join(10)

        assert not closing.is_alive()
        assert all(job.future.done() for job in jobs)


class Seen(Observer):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.retries: list[int] = []
        self.restarts: list[int] = []

    def batch(self, member: int, views: int, forming: float, seconds: float) -> None:
        assert forming >= 0
        assert seconds >= 0
        self.batches.append((member, views))

    def retried(self, images: int) -> None:
        self.retries.append(images)

    def restarted(self, member: int) -> None:
        self.restarts.append(member)


def test_every_run_is_reported() -> None:
    seen = Seen()
    with scheduler(FakeEngine(CLASSES), FakeEngine(CLASSES), observer=seen) as running:
        submit(running, 0, n=5, members=2).future.result(10)

    assert sorted(seen.batches) == [(0, 5), (1, 5)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize("more", [0, 1])
def test_workers_keep_to_a_core_each_where_there_are_as_many(more: int) -> None:
    ours = os.sched_getaffinity(0)
    engine = Together(host.cores() + more)
    with scheduler(engine, streams=host.cores() + more) as running:
        wait([submit(running, 0, n=1).future for _ in range(host.cores() + more)])

    everywhere = more or len(ours) > host.cores()  # a quota
    assert sorted(map(sorted, engine.cpus)) == (
        [sorted(ours)] * len(engine.cpus) if everywhere else [[cpu] for cpu in sorted(ours)]
    )


# Views that nothing else runs beside


def test_views_that_nothing_runs_beside_go_to_the_engine_for_all_cores_if_that_is_sooner() -> None:
    one, all_cores = FakeEngine(CLASSES, seconds_per_view=0.02), FakeEngine(CLASSES)
    with scheduler(one, lone=[all_cores]) as running:
        for _ in range(20):
            assert submit(running, 255, n=1).future.result(10).sums.argmax() == CLASSES - 1

    assert (len(one.batches), len(all_cores.batches)) == (6, 14)  # one is tried again after eight


def test_they_stay_on_one_core_if_that_is_sooner() -> None:
    one, all_cores = FakeEngine(CLASSES), FakeEngine(CLASSES, seconds_per_view=0.02)
    with scheduler(one, lone=[all_cores]) as running:
        for _ in range(20):
            assert submit(running, 255, n=1).future.result(10).sums.argmax() == CLASSES - 1

    assert (len(one.batches), len(all_cores.batches)) == (14, 6)


def test_what_runs_beside_another_stays_on_one_core() -> None:
    one, gate = FakeEngine(CLASSES), Gate()
    with scheduler(one, lone=[gate], streams=2) as running:
        first = busy(running, gate)
        submit(running, 255, n=1).future.result(10)
        gate.open.set()
        first.future.result(10)
        submit(running, 255, n=1).future.result(10)

    # The first run does not count, so the engine for all cores has the next turn, too.
    assert (one.batches, gate.batches) == ([1], [1, 1])


def test_what_another_waits_behind_stays_on_one_core() -> None:
    one, gate = FakeEngine(CLASSES), Gate()
    with scheduler(one, lone=[gate]) as running:
        busy(running, gate)
        (larger,) = running.admit(plan(1), FULL, deadline=time.monotonic() + 1e6)
        running.submit(larger, [[views(0, 1, side=6)]])  # not packed with the next
        last = submit(running, 255, n=1)
        gate.open.set()
        wait([larger.future, last.future], 10)

    # Nothing waited behind the last one, and it was the turn of one core.
    assert (one.batches, gate.batches) == ([1, 1], [1])


def test_an_engine_for_all_cores_that_fails_is_not_used_again_and_nobody_notices() -> None:
    one, all_cores = FakeEngine(CLASSES), FakeEngine(CLASSES)
    all_cores.kill()
    with scheduler(one, lone=[all_cores]) as running:
        for _ in range(3):
            assert submit(running, 255, n=1).future.result(10).sums.argmax() == CLASSES - 1

    assert (one.batches, all_cores.batches) == ([1, 1, 1], [1])


@settings(max_examples=25, deadline=None)
@given(
    brightness=st.lists(st.integers(0, 255), min_size=1, max_size=25),
    dropped=st.sets(st.integers(0, 24)),
    streams=st.integers(1, 3),
    batch=st.integers(1, 40),
    rule=st.sampled_from([FULL, EXACT]),
)
def test_every_job_is_answered_exactly_once_and_rightly(
    brightness: list[int], dropped: set[int], streams: int, batch: int, rule: StopRule
) -> None:
    engines = [FakeEngine(CLASSES, fails=lambda view: view.max() == 7) for _ in range(2)]
    expected = FakeEngine(CLASSES)
    with scheduler(*engines, streams=streams, batch_pixels=[batch * 16] * 2) as running:
        jobs = [submit(running, value, n=4, members=2, rule=rule) for value in brightness]
        for index in dropped & set(range(len(jobs))):
            running.release(jobs[index])
        wait([job.future for job in jobs], 10)
        until(lambda: running.unfinished_views() == 0)
    for value, job in zip(brightness, jobs, strict=True):
        if job.future.cancelled():
            continue
        if value == 7:
            assert isinstance(job.future.exception(), EngineFailure)
        else:
            tally = job.future.result()
            one = expected.run(views(value, 1)).astype(np.float64)
            np.testing.assert_allclose(tally.sums, tally.views[:, None] * one, rtol=1e-5)
            assert tally.views[0] == 4
            assert tally.views[1] == 4 or rule is EXACT
