"""Batches of views from many images, run on engines by worker threads.

The unit of work is the views of one image for one member. There is a queue for each (member, view size); a free
worker takes the queue whose head has waited longest and packs its next batch from it, across images. Nothing polls: a
batch starts when a worker is free and work is waiting, so batches fill by themselves under load. When a batch fails,
its images are run one by one, so that only the bad one fails.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.engines import Engine

_SMOOTHING = 0.1  # weight of the newest batch in the running mean of seconds per view


class EngineFailure(Exception):
    """A member's engine failed on this image even when it was run alone."""


class Overloaded(Exception):
    """The predicted wait is above the limit. `retry_after`: seconds until it is expected to be below."""

    def __init__(self, predicted: float, limit: float) -> None:
        super().__init__(f"the predicted wait is {predicted:.1f} s, above the limit of {limit:g} s")
        self.retry_after = max(1, math.ceil(predicted - limit))


@dataclass(frozen=True)
class Tally:
    """What the engines gave for one image.

    - sums: float64 (members, classes), softmax vectors summed over views
    - views: int64 (members,), how many were summed
    - queue_seconds: from submission to the first batch; inference_seconds: from then to the last result
    """

    sums: NDArray[np.float64]
    views: NDArray[np.int64]
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class Job:
    """One admitted image on its way through the engines."""

    order: int
    views_per_member: int
    sums: NDArray[np.float64]
    views: NDArray[np.int64]
    future: "Future[Tally]" = field(default_factory=Future)
    active: bool = True  # until it is finished, failed or released
    submitted: float = 0.0
    started: float = 0.0


@dataclass(eq=False)
class _Item:
    """Views (n, h, w, 3) of one image that are still to be run."""

    job: Job
    views: NDArray[np.uint8]


_Key = tuple[int, tuple[int, ...]]  # member, view size


class Scheduler:
    """Runs jobs on one engine a member.

    - classes: how many probabilities an engine gives
    - streams: engine runs side by side
    - max_batch: views in one run
    - max_wait: predicted wait in seconds above which `admit` raises Overloaded
    - on_batch: told (member, views, seconds) of every run
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        classes: int,
        streams: int,
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int, int, float], None] = lambda member, views, seconds: None,
    ) -> None:
        self._engines = engines
        self._classes = classes
        self._streams = streams
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._orders = itertools.count()
        self._ready = threading.Condition()
        self._queues: dict[_Key, deque[_Item]] = {}
        self._unfinished = [0] * len(engines)  # admitted views that have no result yet, by member
        self._seconds_per_view = [0.0] * len(engines)
        self._closing = False
        self._workers = [threading.Thread(target=self._work, name=f"engine-{i}", daemon=True) for i in range(streams)]
        for worker in self._workers:
            worker.start()

    def predicted_wait(self) -> float:
        """Seconds until everything admitted so far is done, from the measured cost of a view."""
        with self._ready:
            return self._predicted_wait()

    def unfinished_views(self) -> int:
        """Admitted views that have no result yet."""
        with self._ready:
            return sum(self._unfinished)

    def admit(self, views_per_member: int, images: int = 1) -> list[Job]:
        """Reserve room for images, all or none. Raises Overloaded.

        Only what was admitted before counts, so an idle server takes a request of any allowed size.
        """
        with self._ready:
            predicted = self._predicted_wait()
            if predicted > self._max_wait:
                raise Overloaded(predicted, self._max_wait)
            for member in range(len(self._engines)):
                self._unfinished[member] += views_per_member * images
            shape = (len(self._engines), self._classes)
            return [
                Job(next(self._orders), views_per_member, np.zeros(shape), np.zeros(shape[0], np.int64))
                for _ in range(images)
            ]

    def submit(self, job: Job, views: Sequence[NDArray[np.uint8]]) -> "Future[Tally]":
        """Queue an admitted image's views, uint8 (views_per_member, h, w, 3) for each member.

        The future fails with EngineFailure, or is cancelled by `release`.
        """
        job.submitted = time.monotonic()
        with self._ready:
            for member, array in enumerate(views):
                self._queues.setdefault((member, array.shape[1:]), deque()).append(_Item(job, array))
            self._ready.notify_all()
        return job.future

    def release(self, job: Job) -> None:
        """Forget a job: its waiting views leave the queues and its room is free. Without effect on a finished one."""
        with self._ready:
            if job.active:
                self._forget(job)
                if job.future.cancel():
                    job.future.set_running_or_notify_cancel()  # wakes whoever waits for it

    def warm_up(self, views: Sequence[NDArray[np.uint8]]) -> None:
        """Run every engine on its array, uint8 (n, h, w, 3), twice: first runs are slow, second ones are a measure."""
        for member, array in enumerate(views):
            self._engines[member].run(array)
            self._infer(member, [array])

    def close(self) -> None:
        """Run what is queued, then stop the workers."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        for worker in self._workers:
            worker.join()

    def _predicted_wait(self) -> float:
        costs = zip(self._unfinished, self._seconds_per_view, strict=True)
        return sum(views * seconds for views, seconds in costs) / self._streams

    def _work(self) -> None:
        while True:
            with self._ready:
                while not any(self._queues.values()):
                    if self._closing:
                        return
                    self._ready.wait()
                key, batch = self._take()
            self._run(key[0], batch)

    def _take(self) -> tuple[_Key, list[_Item]]:
        """The next batch, from the queue whose head is the oldest image."""
        key = min((k for k, queue in self._queues.items() if queue), key=lambda k: self._queues[k][0].job.order)
        queue = self._queues[key]
        waiting = sum(len(item.views) for item in queue)
        # A lone request's views are shared out over the streams instead of leaving all but one idle.
        room = min(self._max_batch, math.ceil(waiting / self._streams))
        batch: list[_Item] = []
        now = time.monotonic()
        while queue and room:
            item = queue[0]
            if len(item.views) <= room:
                queue.popleft()
                taken = item
            else:
                taken = _Item(item.job, item.views[:room])
                item.views = item.views[room:]
            room -= len(taken.views)
            taken.job.started = taken.job.started or now
            batch.append(taken)
        if not queue:
            del self._queues[key]
        return key, batch

    def _run(self, member: int, batch: list[_Item]) -> None:
        try:
            probabilities = self._infer(member, [item.views for item in batch])
        except Exception as error:  # noqa: BLE001  # the edge between us and a backend, which may raise anything
            if len(batch) == 1:
                self._fail(batch[0].job, error)
            else:
                for item in batch:
                    self._run(member, [item])
            return
        start = 0
        for item in batch:
            self._add(item.job, member, probabilities[start : start + len(item.views)])
            start += len(item.views)

    def _infer(self, member: int, arrays: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        views = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        began = time.monotonic()
        probabilities = self._engines[member].run(views)
        seconds = time.monotonic() - began
        if probabilities.shape != (len(views), self._classes) or not np.isfinite(probabilities).all():
            raise ValueError(f"the engine answered {probabilities.shape} or something that is not a number")
        with self._ready:
            latest, known = seconds / len(views), self._seconds_per_view[member]
            self._seconds_per_view[member] = known + _SMOOTHING * (latest - known) if known else latest
        self._on_batch(member, len(views), seconds)
        return probabilities

    def _add(self, job: Job, member: int, probabilities: NDArray[np.float32]) -> None:
        with self._ready:
            if not job.active:  # released or failed while this batch was running
                return
            job.sums[member] += probabilities.sum(axis=0, dtype=np.float64)
            job.views[member] += len(probabilities)
            self._unfinished[member] -= len(probabilities)
            if job.views.min() == job.views_per_member:
                job.active = False
                now = time.monotonic()
                if job.future.set_running_or_notify_cancel():
                    job.future.set_result(Tally(job.sums, job.views, job.started - job.submitted, now - job.started))

    def _fail(self, job: Job, error: Exception) -> None:
        with self._ready:
            if job.active:
                self._forget(job)
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(EngineFailure(f"{type(error).__name__}: {error}"))

    def _forget(self, job: Job) -> None:
        """Take the rest of a job out of the queues and the account. Called with the lock held."""
        job.active = False
        for member, done in enumerate(job.views):
            self._unfinished[member] -= job.views_per_member - int(done)
        for key, queue in list(self._queues.items()):
            self._queues[key] = deque(item for item in queue if item.job is not job)
            if not self._queues[key]:
                del self._queues[key]
