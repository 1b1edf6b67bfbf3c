"""The scheduler with fake engines: every job answered once, batches packed across images, failures isolated."""

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

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.scheduler import EngineFailure, Job, Overloaded, Scheduler

CLASSES = 10


class Gate(FakeEngine):
    """A fake engine that waits for `open` before it answers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CLASSES, **options)
        self.open, self.entered = threading.Event(), threading.Event()

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.open.wait(10)
        return super().run(views)


@contextmanager
def scheduler(*engines: FakeEngine, **options: Any) -> Iterator[Scheduler]:
    defaults: dict[str, Any] = {"classes": CLASSES, "streams": 1, "max_batch": 32, "max_wait": 1e9}
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


def submit(running: Scheduler, brightness: int, n: int = 10, members: int = 1) -> Job:
    (job,) = running.admit(n)
    running.submit(job, [views(brightness, n)] * members)
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


def test_views_of_waiting_images_share_batches() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        busy(running, gate)
        jobs = [submit(running, 20 * i) for i in range(6)]
        gate.open.set()
        labels = [int(job.future.result(10).sums[0].argmax()) for job in jobs]

    assert gate.batches == [1, 32, 28]
    assert labels == [0, 1, 1, 2, 3, 4]


def test_a_lone_image_is_shared_out_over_the_streams() -> None:
    engine = FakeEngine(CLASSES)
    with scheduler(engine, streams=2) as running:
        submit(running, 0, n=10).future.result(10)

    assert engine.batches[0] == 5
    assert sum(engine.batches) == 10


def test_images_of_other_sizes_are_not_packed_together() -> None:
    gate = Gate()
    with scheduler(gate) as running:
        busy(running, gate)
        (small,), (large,) = running.admit(2), running.admit(2)
        running.submit(small, [views(0, 2, side=4)])
        running.submit(large, [views(0, 2, side=8)])
        gate.open.set()
        wait([small.future, large.future], 10)

    assert gate.batches == [1, 2, 2]


def test_the_oldest_image_goes_first() -> None:
    gates = Gate(), Gate()
    order: list[int] = []
    with scheduler(*gates, max_batch=4) as running:
        (first,) = running.admit(1)
        running.submit(first, [views(0, 1), views(0, 1)])
        assert gates[0].entered.wait(10)
        jobs = [submit(running, 0, n=4, members=2) for _ in range(3)]
        for number, job in enumerate(jobs):
            job.future.add_done_callback(lambda _, n=number: order.append(n))
        for gate in gates:
            gate.open.set()
        wait([job.future for job in jobs], 10)

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
    with pytest.raises(EngineFailure, match="told to fail"):
        jobs[1].future.result()


@pytest.mark.parametrize(
    "answer", [np.full((1, CLASSES), np.nan, np.float32), np.zeros((1, CLASSES + 1), np.float32), np.zeros(3)]
)
def test_an_engine_that_answers_nonsense_fails_the_image(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(CLASSES)
    with scheduler(engine) as running:
        monkeypatch.setattr(engine, "run", lambda _: answer)

        with pytest.raises(EngineFailure, match="not a number"):
            submit(running, 0, n=1).future.result(10)


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


def test_releasing_a_finished_job_changes_nothing() -> None:
    with scheduler(FakeEngine(CLASSES)) as running:
        job = submit(running, 0)
        tally = job.future.result(10)
        running.release(job)

        assert job.future.result() is tally
        assert running.unfinished_views() == 0


def test_admission_is_by_predicted_wait_and_says_when_to_come_back() -> None:
    gate = Gate(seconds_per_view=0.01)
    gate.open.set()
    with scheduler(gate, max_wait=0.5) as running:
        running.warm_up([views(0, 4)])
        gate.open.clear()
        running.admit(100)

        assert 1 <= running.predicted_wait() < 10  # sleeping takes at least its time, on a busy machine more
        with pytest.raises(Overloaded, match=r"above the limit of 0\.5 s") as error:
            running.admit(1)
        assert error.value.retry_after >= 1


def test_an_idle_server_takes_a_request_of_any_size() -> None:
    gate = Gate(seconds_per_view=0.001)
    gate.open.set()
    with scheduler(gate, max_wait=0.01) as running:
        running.warm_up([views(0, 4)])

        assert len(running.admit(10, images=64)) == 64


def test_released_room_is_free_again() -> None:
    gate = Gate(seconds_per_view=0.01)
    gate.open.set()
    with scheduler(gate, max_wait=0.1) as running:
        running.warm_up([views(0, 4)])
        jobs = running.admit(10, images=10)
        with pytest.raises(Overloaded):
            running.admit(1)
        for job in jobs:
            running.release(job)

        assert running.predicted_wait() == 0
        running.admit(1)


def test_closing_runs_what_is_queued() -> None:
    gate = Gate()
    running = Scheduler([gate], classes=CLASSES, streams=1, max_batch=8, max_wait=1e9)
    jobs = [submit(running, 0) for _ in range(5)]
    closing = threading.Thread(target=running.close)
    closing.start()
    gate.open.set()
    closing.join(10)

    assert not closing.is_alive()
    assert all(job.future.done() for job in jobs)


def test_every_run_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    engines = FakeEngine(CLASSES), FakeEngine(CLASSES)
    with scheduler(*engines, on_batch=lambda member, n, seconds: seen.append((member, n))) as running:
        submit(running, 0, n=5, members=2).future.result(10)

    assert sorted(seen) == [(0, 5), (1, 5)]


@settings(max_examples=25, deadline=None)
@given(
    brightness=st.lists(st.integers(0, 255), min_size=1, max_size=25),
    dropped=st.sets(st.integers(0, 24)),
    streams=st.integers(1, 3),
    max_batch=st.integers(1, 40),
)
def test_every_job_is_answered_exactly_once_and_rightly(
    brightness: list[int], dropped: set[int], streams: int, max_batch: int
) -> None:
    engines = [FakeEngine(CLASSES, fails=lambda view: view.max() == 7) for _ in range(2)]
    expected = FakeEngine(CLASSES)
    with scheduler(*engines, streams=streams, max_batch=max_batch) as running:
        jobs = [submit(running, value, n=4, members=2) for value in brightness]
        for index in dropped & set(range(len(jobs))):
            running.release(jobs[index])
        wait([job.future for job in jobs], 10)
        deadline = time.monotonic() + 5
        while running.unfinished_views() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert running.unfinished_views() == 0
    for value, job in zip(brightness, jobs, strict=True):
        if job.future.cancelled():
            continue
        if value == 7:
            assert isinstance(job.future.exception(), EngineFailure)
        else:
            np.testing.assert_allclose(
                job.future.result().sums, 4 * expected.run(views(value, 1)).repeat(2, axis=0), rtol=1e-5
            )
