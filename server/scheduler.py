"""Continuous batching of views: the threads, the clock and the engines around the decisions in dispatch.py.

Nothing polls. A worker sleeps until there is something to do; a batch starts when a worker is free and views are
waiting, so batches fill by themselves under load. New work wakes one worker, and a worker that leaves work behind wakes
the next: a thread that is woken in vain costs as much as many a small thing that it could do.

On a CPU, engines and decoders want the same cores, so the same workers do both, and mostly run themselves what they
have decoded. Where there are as many as cores, each keeps to one. A GPU has workers of its own, which wait for it while
others decode.

When a run fails, the engine is asked for a view that it has answered before (revival.py). If it does, the images are to
blame, and are run one by one. If it does not, the engine is dead: it is opened anew, and meanwhile its work waits while
other members' work goes on. If it can't be opened, what waits for it fails, and it is tried again later.

A run that does not end (hangs.py), or an opening, can't be stopped: what waits for that engine fails, and nothing more
is given to it.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export import host
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.server.dispatch import Dispatcher
from resnet_ensemble.server.hangs import Run, Runs
from resnet_ensemble.server.jobs import Batch, Blocks, Decoding, Job, Tally
from resnet_ensemble.server.lone import Lone
from resnet_ensemble.server.plan import Plan
from resnet_ensemble.server.revival import Revival
from resnet_ensemble.server.stopping import StopRule

log = logging.getLogger(__name__)

_OPENING = 15.0  # seconds that opening an engine is taken to need; it may be compiled, and answers the golden pictures


class EngineFailure(Exception):
    """A member's engine failed on this image even when it was run alone."""


class EngineHung(Exception):
    """A member's engine does not end a run, or does not open."""


class EngineGone(Exception):
    """A member's engine died with other images, and could not be opened anew."""


class Observer:
    """Told what happens, on the threads where it happens. This one ignores it."""

    def batch(self, member: int, views: int, forming: float, seconds: float) -> None:
        """An engine run of so many views; seconds to pack them, and of the run."""

    def retried(self, images: int) -> None:
        """So many images' views are run again."""

    def restarted(self, member: int) -> None:
        """A member's engine was opened anew."""

    def hung(self, member: int) -> None:
        """A member's engine does not end a run, or does not open."""


class _Role(NamedTuple):
    """What a worker does. `keeps`: to a core of its own."""

    name: str
    decodes: bool
    runs: bool
    keeps: bool = False


def _roles(streams: int, decoders: int, *, shared: bool) -> list[_Role]:
    """Of each worker."""
    decoder = _Role("decoder", decodes=True, runs=False)
    if shared:
        keeps = streams == host.cores()
        return [_Role("engine", decodes=True, runs=True, keeps=keeps)] * streams + [decoder] * (decoders - streams)
    return [_Role("engine", decodes=False, runs=True)] * streams + [decoder] * decoders


class _Use(NamedTuple):
    """Of a member's engine. `jobs`: whose views it runs; none while it is opened anew."""

    member: int
    jobs: Sequence[Job]


class _Turn(NamedTuple):
    """Of a view that nothing else runs beside."""

    lone: Lone
    on_all: bool  # cores
    begun: int  # how much had been begun when it was


class Scheduler:
    """Runs jobs on one engine a member.

    - lone: of each member, an engine for views that nothing else runs beside, or None (lone.py says when it is used);
      one that fails is not used again
    - classes, streams, batch_pixels, max_wait, max_bytes: as in Dispatcher
    - decoders: images that are decoded side by side
    - shared: whether engines run on the cores that decode
    - probes: of each member, views uint8 (n, h, w, 3) that a sound engine answers
    - reopen: opens a member's engine anew
    - run_limit: seconds after which a run hangs (hangs.py)
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        lone: Sequence[Engine | None] | None = None,
        classes: int,
        streams: int,
        batch_pixels: Sequence[int],
        max_wait: float,
        max_bytes: float = math.inf,
        decoders: int = 1,
        shared: bool = True,
        probes: Sequence[NDArray[np.uint8]],
        reopen: Callable[[int], Engine],
        run_limit: float = 60.0,
        observer: Observer | None = None,
    ) -> None:
        self._engines = list(engines)
        self._lone = [None if engine is None else Lone(engine) for engine in lone or [None] * len(self._engines)]
        self._closing, self._closed = threading.Event(), threading.Event()
        self._revival = Revival(classes=classes, probes=probes, reopen=reopen, closing=self._closing)
        self._observer = observer or Observer()
        self._decide = Dispatcher(
            classes=classes,
            streams=streams,
            batch_pixels=batch_pixels,
            max_wait=max_wait,
            max_bytes=max_bytes,
            # On a GPU ten views take 1.2 times as long as five (ResNet-50 in FP16, NVIDIA H200, 2026-11-27).
            spread=shared,
        )
        self._lock = threading.Lock()  # guards everything below and the decisions
        roles = _roles(streams, decoders, shared=shared)
        self._asleep: dict[_Role, list[threading.Condition]] = {role: [] for role in roles}  # they have nothing to do
        self._run_ended = threading.Condition(self._lock)  # for who waits until an engine is not used any more
        self._running: Counter[int] = Counter()  # batches on each member's engine
        self._decoding = 0  # images
        self._begun = 0  # runs and images to decode, since the start
        self._down: dict[int, str] = {}  # members whose engine is being opened anew, and why it has not succeeded yet
        self._runs: Runs[_Use] = Runs(run_limit)  # by the thread that waits for it
        self._hung: dict[Hashable, Run[_Use]] = {}  # of these, the overdue, when they were looked at last
        self._look_every = run_limit / 4  # seconds
        self._reopening: list[threading.Thread] = []
        self._workers = [
            threading.Thread(target=self._work, args=(role, i), name=f"{role.name}-{i}", daemon=True)
            for i, role in enumerate(roles)
        ]
        self._watcher = threading.Thread(target=self._watch, name="engine-watcher", daemon=True)
        for thread in (*self._workers, self._watcher):
            thread.start()

    @property
    def engines(self) -> list[Engine]:
        """Of each member, the one that is used now."""
        with self._lock:
            return list(self._engines)

    @property
    def lone(self) -> list[Engine | None]:
        """Of each member, the one for views that nothing runs beside, if it has one."""
        with self._lock:
            return [lone.engine if lone else None for lone in self._lone]

    @property
    def down(self) -> dict[int, str]:
        """Members whose engine has died and is not back, with what went wrong when it was last opened, or "".

        And those whose engine hangs.
        """
        if not self._down and not self._hung:  # as nearly always: then the event loop does not wait for a lock
            return {}
        with self._lock:
            return self._down | {run.what.member: "it hangs" for run in self._hung.values()}

    @property
    def hung(self) -> set[int]:
        """Members whose engine does not end a run, or does not open."""
        with self._lock:
            return {run.what.member for run in self._hung.values()}

    def predicted_wait(self) -> float:
        """Seconds until everything admitted so far is done, from the measured cost of a view."""
        with self._lock:
            return self._decide.predicted_wait()

    def unfinished_views(self) -> int:
        """Views of admitted images that have no result and have not been saved by a stop rule."""
        with self._lock:
            return self._decide.unfinished_views

    def waiting_views(self) -> int:
        """Views that could be run now if an engine were free."""
        with self._lock:
            return self._decide.waiting_views

    def view_bytes(self) -> int:
        """Bytes of the views of images that are decoded and not answered."""
        with self._lock:
            return self._decide.view_bytes

    def check(self, deadline: float) -> None:
        """Raise Overloaded if an image that came now, to be answered by then, would not be taken.

        An estimate, so it may be of a moment that is just passing: the event loop does not wait for the workers' lock.
        """
        self._decide.check(time.monotonic(), deadline)

    def admit(self, plan: Plan, rule: StopRule, images: int = 1, *, deadline: float) -> list[Job]:
        """Reserve room for a request's images, all or none. Raises Overloaded. `deadline`: of time.monotonic()."""
        with self._lock:
            return self._decide.admit(time.monotonic(), deadline, plan, rule, images)

    def decode(self, job: Job, work: Callable[[], Blocks]) -> None:
        """Decode an admitted image when its turn comes, and run it. Its future is set later, even if `work` fails."""
        with self._lock:
            self._decide.put_in_line(time.monotonic(), job, work)
            self._wake()

    def submit(self, job: Job, blocks: Blocks) -> None:
        """Queue an admitted image's views, which are there already. Its future is set later."""
        with self._lock:
            self._decide.submit(time.monotonic(), job, blocks)
            self._wake()

    def release(self, job: Job) -> None:
        """Forget a job: its waiting views leave the queues and its room is free. Without effect on a finished one."""
        if not job.active:  # as most are: then the event loop does not wait for the workers' lock
            return
        with self._lock:
            released = self._decide.release(job)
            self._wake()  # there may be room to decode another one
        if released:
            job.future.cancel()

    def fail(self, job: Job, error: Exception) -> None:
        """Answer a job with an error. Without effect on a finished one."""
        with self._lock:
            released = self._decide.release(job)
            self._wake()
        if released and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

    def close(self) -> None:
        """Run what is queued, then stop the workers. What hangs is not waited for."""
        self._closing.set()
        with self._lock:
            self._wake_all()
        for thread in (*self._workers, *self._reopening):
            while thread.is_alive() and not self._waits_for_ever(thread):
                thread.join(self._look_every)
        self._closed.set()
        self._watcher.join()

    def _waits_for_ever(self, thread: threading.Thread) -> bool:
        with self._lock:
            return thread.ident in self._hung or any(
                thread.name == f"reopen-{run.what.member}" for run in self._hung.values()
            )

    def _watch(self) -> None:
        while not self._closed.wait(self._look_every):
            self._look()

    def _look(self) -> None:
        """Give up what waits for an engine that hangs."""
        with self._lock:
            overdue = self._runs.overdue(time.monotonic())
            fresh = [run.what.member for key, run in overdue.items() if key not in self._hung]
            self._hung = overdue
            waiting = [job for run in overdue.values() for job in run.what.jobs if self._decide.release(job)]
            for member in {run.what.member for run in overdue.values()}:
                self._decide.pause(member)
                waiting += self._decide.give_up(member)
            if overdue:
                self._wake_all()
        for member in fresh:
            log.critical("the engine of member %d hangs: restart this process", member)
            self._observer.hung(member)
        self._give_up(waiting, EngineHung())

    def _wake(self) -> None:
        """Wake a worker for what waits, if one sleeps. Called with the lock held, as the next.

        The one that fell asleep last: what it used is still in the caches of its core.
        """
        for role, asleep in self._asleep.items():
            if asleep and self._decide.can(decode=role.decodes, run=role.runs):
                asleep.pop().notify()

    def _wake_all(self) -> None:
        for asleep in self._asleep.values():
            while asleep:
                asleep.pop().notify()

    def _work(self, role: _Role, number: int) -> None:
        host.give_way()
        if role.keeps:
            host.keep_to_core(number)
        woken = threading.Condition(self._lock)
        while (work := self._next(role, woken)) is not None:
            work()
            del work  # an image, or views, that nobody needs while this thread waits

    def _next(self, role: _Role, woken: threading.Condition) -> Callable[[], None] | None:
        """Wait for work. None if there is nothing to come: it is closing."""
        with self._lock:
            while (work := self._take(role)) is None:
                self._wake()
                if self._closing.is_set() and not self._more_may_come():
                    self._wake_all()
                    return None
                self._asleep[role].append(woken)
                woken.wait()
            self._begun += 1
            begun = self._begin_decoding(work) if isinstance(work, Decoding) else self._begin(work)
            self._wake()
            return begun

    def _take(self, role: _Role) -> Batch | Decoding | None:
        # What nobody waits for any more is not decoded.
        decodes = role.decodes and not self._closing.is_set()
        return self._decide.next(time.monotonic(), decode=decodes, run=role.runs)

    def _more_may_come(self) -> bool:
        running = self._running.total() - sum(bool(run.what.jobs) for run in self._hung.values())
        return bool(self._decide.waiting_views or running or self._decoding)

    def _begin_decoding(self, decoding: Decoding) -> Callable[[], None]:
        self._decoding += 1
        return lambda: self._decode(decoding)

    def _begin(self, batch: Batch) -> Callable[[], None]:
        engine = self._engines[batch.member]
        alone = self._decide.images <= 1 and not self._decide.waiting_views and not self._running.total()
        lone = self._lone[batch.member] if alone else None
        turn = _Turn(lone, lone.takes_next(), self._begun) if lone else None
        self._running[batch.member] += 1
        use = _Use(batch.member, [part.job for part in batch.parts])
        self._runs.begin(threading.get_ident(), use, batch.seconds, time.monotonic())
        return lambda: self._run(batch, engine, turn)

    def _decode(self, decoding: Decoding) -> None:
        began, blocks, failure = time.monotonic(), None, None
        try:
            blocks = decoding.work()
        except Exception as error:  # noqa: BLE001  # this thread goes on; who waits for the image is told
            failure = error
        with self._lock:
            self._decoding -= 1
            if blocks is not None:
                now = time.monotonic()
                self._decide.decoded(now, decoding.job, blocks, now - began)
            if self._closing.is_set():
                self._wake_all()
        if failure is not None:
            self.fail(decoding.job, failure)

    def _run(self, batch: Batch, engine: Engine, turn: _Turn | None) -> None:
        began = formed = time.monotonic()
        try:
            arrays = [part.views for part in batch.parts]
            views = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            formed = time.monotonic()
            probabilities = self._lone_answer(batch.member, turn.lone.engine, views) if turn and turn.on_all else None
            if probabilities is None:
                probabilities = engine.run(views)
                self._revival.check(probabilities, len(views))
        except Exception as error:  # noqa: BLE001  # the edge between us and a backend, which may raise anything
            self._on_failure(batch, engine, error)
            return
        now = time.monotonic()
        with self._lock:
            if turn and turn.begun == self._begun:  # nothing has been begun beside it
                turn.lone.took((now - formed) / views.size, on_all=turn.on_all)
            jobs = self._decide.done(batch, probabilities, now)
            self._finished(batch)
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                started = now if job.started is None else job.started
                job.future.set_result(Tally(job.sums, job.views, job.queued, now - started))
        self._observer.batch(batch.member, len(views), formed - began, now - formed)

    def _lone_answer(self, member: int, lone: Engine, views: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        try:
            probabilities = lone.run(views)
            self._revival.check(probabilities, len(views))
        except Exception:
            log.exception("member %d runs on one core again: its engine for all cores failed", member)
            with self._lock:
                self._lone[member] = None
            return None
        return probabilities

    def _finished(self, batch: Batch) -> None:
        """Called by its worker, with the lock held."""
        self._running[batch.member] -= 1
        self._ended(batch.member)
        self._run_ended.notify_all()

    def _ended(self, member: int) -> None:
        """What this thread waited for. Called with the lock held."""
        self._runs.end(threading.get_ident())
        if self._hung.pop(threading.get_ident(), None):
            log.warning("the engine of member %d does not hang after all", member)
            if member not in self._down | {run.what.member: "" for run in self._hung.values()}:
                self._decide.resume(member, time.monotonic())
                self._wake_all()

    def _on_failure(self, batch: Batch, engine: Engine, error: Exception) -> None:
        member = batch.member
        with self._lock:
            dead = self._engines[member] is not engine or member in self._down
        dead = dead or not self._revival.is_sound(member, engine)
        with self._lock:
            beside = self._engines[member] is not engine or member in self._down
            if dead and not beside:
                log.error("the engine of member %d died: %s: %s", member, type(error).__name__, error)
                self._down[member] = ""
                self._decide.pause(member)
                thread = threading.Thread(target=self._reopen, args=(member,), name=f"reopen-{member}", daemon=True)
                self._reopening.append(thread)
                thread.start()
            failed = self._decide.lost(batch, first=not beside) if dead else self._decide.failed(batch)
            self._finished(batch)
        self._observer.retried(len(batch.parts) - len(failed))
        self._give_up(failed, error)

    def _reopen(self, member: int) -> None:
        host.leave_core()  # of the worker that started it: an engine's threads would stay there
        with self._lock:
            while self._running[member]:
                self._run_ended.wait()
            dead = self._engines[member]
        fresh = self._revival.replace(
            member, dead, lambda error: self._not_reopened(member, error), lambda: self._attempt(member)
        )
        if fresh is None:
            return
        with self._lock:
            self._engines[member] = fresh
            self._lone[member] = None  # it may be of another kind
            del self._down[member]
            self._decide.resume(member, time.monotonic())
            self._reopening.remove(threading.current_thread())
            self._wake_all()
        self._observer.restarted(member)

    @contextmanager
    def _attempt(self, member: int) -> Iterator[None]:
        """To open its engine anew."""
        with self._lock:
            self._runs.begin(threading.get_ident(), _Use(member, ()), _OPENING, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                self._ended(member)

    def _not_reopened(self, member: int, error: Exception) -> None:
        """The images that wait for this engine are given up: it may be long until there is one."""
        with self._lock:
            self._down[member] = f"{type(error).__name__}: {error}"
            waiting = self._decide.give_up(member)
            self._wake_all()
        self._give_up(waiting, EngineGone())

    def _give_up(self, jobs: Sequence[Job], error: Exception) -> None:
        own = isinstance(error, EngineHung | EngineGone)
        told = error if own else EngineFailure(f"{type(error).__name__}: {error}")
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(told)
