"""What to run next, when an image is done, and whom to take: the scheduler's decisions, without threads or clocks.

An image is decoded first. From then on the unit of work is a view of it for a member. Of each image only those views
are queued that its stop rule needs in any case (stopping.py). There is a queue for each (member, view shape); the next
batch comes from the queue whose head has the smallest rank (admission.py), and is filled from that queue across images,
by rank. Results are added up, the rule is asked again, and what it still needs is queued and packed anew.

On a CPU the same threads decode and run engines. Rank decides there, too: an image that was begun is finished before
the next one is decoded, unless that one is more urgent, or many are in line and few views wait: then batches fill.

A failed batch is run again part by part, so that only a bad image fails. What was lost with an engine that died is run
once more when the engine is back, also part by part: what kills it a second time fails alone.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.server.admission import Backlog, Mean, Overloaded, Progress, ranks
from resnet_ensemble.server.jobs import Batch, Blocks, Decoding, Job, Key, Part
from resnet_ensemble.server.plan import Plan, Stage
from resnet_ensemble.server.stopping import StopRule

# Seconds of rank within which images share a batch. Without a limit, batches fill with the views of images that came
# last, everything is in progress at once, and old images wait for young ones: in the simulation of the tests, with a
# backlog of 3 s, for 4 to 8 s instead of 3.
_WINDOW = 0.5
# Waits vary around what is predicted, and how much time refusals cost is learnt only when there are some.
# At three times the capacity and a limit of 1 s, the 99th percentile of what was taken was 0.71 to 0.82 s, and 0.93 to
# 1.01 s with 1.5; that of refusals 27 to 41 ms, and 31 to 144 (CIFAR-10 center, three rounds of 8 s; two Zen 3 cores,
# 2026-11-26).
_CAUTION = 2.0
# An image may take so many times what was expected before its request counts as slow: other work slows it down, too.
_USUAL = 1.5
_STEP = 0.05  # seconds of rank: images are not moved back by less
_NOTHING = np.zeros((0, 0, 0, 3), np.uint8)


@dataclass
class _Queue:
    """Parts by rank. One that left for another reason than its turn stays in the heap until it is at the top."""

    heap: list[tuple[float, int, int, int, Part]] = field(default_factory=list)
    views: int = 0

    def head(self) -> tuple[float, int, int, int, Part]:
        """The first part that is still waiting. There is one."""
        while self.heap[0][-1] not in self.heap[0][-1].job.waiting:
            heapq.heappop(self.heap)
        return self.heap[0]


class Dispatcher:
    """The state of all images in progress.

    - classes: how many probabilities an engine gives
    - streams: engine runs side by side
    - spread: whether views are shared out over streams that would be idle
    - batch_pixels: pixels of all views in a full batch, by member
    - max_wait: predicted wait in seconds above which `admit` raises Overloaded
    - max_bytes: of the views of decoded images in progress, from which on no further image is decoded
    """

    def __init__(
        self,
        *,
        classes: int,
        streams: int,
        batch_pixels: Sequence[int],
        max_wait: float,
        max_bytes: float = math.inf,
        spread: bool = True,
    ) -> None:
        self._shape = (len(batch_pixels), classes)
        self._streams = streams
        self._spread = spread
        self._batch_pixels = batch_pixels
        self._max_wait = max_wait
        self._max_bytes = max_bytes
        self._numbers = itertools.count(1)
        self._undecoded: list[tuple[float, int, Job]] = []  # a heap; those that have left stay in it until the top
        self._to_decode = 0
        self._held = 0
        self._queues: dict[Key, _Queue] = {}
        self._paused: set[int] = set()
        self._backlog = Backlog()
        self._requests: Counter[int] = Counter()  # images in progress of each
        self._late: dict[int, float] = {}  # by request: seconds that its images took beyond what was expected
        self._unfinished = 0  # views of images in progress that may still be run
        self._shares = Mean(1.0)  # by (protocol, rule): of the plan's seconds, how many were needed
        self._decodings = Mean()  # by protocol: seconds until an image is decoded and its views are made
        self._progress = Progress(streams, max_wait)

    @property
    def unfinished_views(self) -> int:
        """Views of admitted images that have no result and have not been saved by a stop rule."""
        return self._unfinished

    @property
    def waiting_views(self) -> int:
        """Views that could be run now if an engine were free."""
        return sum(queue.views for queue in self._queues.values())

    @property
    def view_bytes(self) -> int:
        """Bytes of the views of images that are decoded and not answered."""
        return self._held

    @property
    def images(self) -> int:
        """Admitted and not answered."""
        return self._requests.total()

    def predicted_wait(self, rank: float = math.inf) -> float:
        """Seconds until everything that goes before this rank is done."""
        return self._backlog.before(rank) / self._progress.rate

    def check(self, now: float, deadline: float) -> None:
        """Raise Overloaded if an image that came now would not be taken."""
        self._ranks(now, deadline, 1, 0.0)

    def admit(self, now: float, deadline: float, plan: Plan, rule: StopRule, images: int) -> list[Job]:
        """Take a request's images, all or none. Raises Overloaded if the last would wait too long for others' images.

        Only what was admitted before counts, so an idle server takes a request of any size.
        """
        decoding = self._decodings[plan.protocol]
        expected = decoding + plan.seconds * self._shares[plan.protocol, rule.name]
        given = self._ranks(now, deadline, images, expected / self._progress.rate) if images else []
        if not self._requests:
            self._progress.begin(now)
        request = next(self._numbers)
        pace, left = self._progress.rate, max(0.0, deadline - now)
        jobs = [
            Job(rank, next(self._numbers), request, plan, rule, expected, decoding, pace, given[0] + left / 2)
            for rank in given
        ]
        for job in jobs:
            self._backlog.enter(job.rank, job.expected)
            self._requests[request] += 1
            self._unfinished += plan.views
        return jobs

    def put_in_line(self, now: float, job: Job, decode: Callable[[], Blocks]) -> None:
        """Let an admitted image wait for someone to decode it. `decode` is not called here."""
        if not job.active:
            return
        job.decode, job.since = decode, now
        heapq.heappush(self._undecoded, (job.rank, job.order, job))
        self._to_decode += 1

    def decoded(self, now: float, job: Job, blocks: Blocks, seconds: float) -> None:
        """An image was decoded, in so many seconds of a thread's time: queue what it needs first."""
        self._decodings.add(job.plan.protocol, seconds)
        if job.active:
            self._took(job, seconds, job.decoding)
            self._expect(job, job.expected - job.decoding)
            self._progress.done(now, job.decoding, self._backlog.before(math.inf))
            self.submit(now, job, blocks)

    def submit(self, now: float, job: Job, blocks: Blocks) -> None:
        """Queue what an admitted image needs first."""
        if not job.active:
            return
        job.blocks, job.since = blocks, now
        job.held = sum({id(block): block.nbytes for of_member in blocks for block in of_member}.values())
        self._held += job.held
        job.sums, job.views = np.zeros(self._shape), np.zeros(self._shape[0], np.int64)
        self._ask(job)

    def release(self, job: Job) -> bool:
        """Forget an image: what waits leaves the queues, what runs is ignored. Whether it was in progress."""
        if not job.active:
            return False
        job.active = False
        for part in job.waiting:
            self._shrink(part.queue, len(part.views))
            part.views = _NOTHING  # its place in the heap is found empty later
        job.waiting.clear()
        self._to_decode -= job.decode is not None
        if not self._to_decode:
            self._undecoded.clear()
        job.decode, job.blocks = None, ()
        self._held -= job.held
        self._backlog.leave(job.rank, job.expected)
        self._unfinished -= job.plan.views - job.done
        self._requests[job.request] -= 1
        if not self._requests[job.request]:
            del self._requests[job.request]
            self._late.pop(job.request, None)
        return True

    def can(self, *, decode: bool, run: bool) -> bool:
        """Whether there is something for a thread that can do this."""
        return (decode and self._may_decode) or (run and bool(self._runnable))

    def next(self, now: float, *, decode: bool = True, run: bool = True) -> Batch | Decoding | None:
        """What a thread that can do this does next: run a batch or decode an image. None if there is nothing now."""
        heads = [(queue.head()[:3], key) for key, queue in self._runnable.items()]
        key = min(heads)[1] if run and heads else None
        if decode and self._may_decode and (key is None or self._decodes_before(key)):
            return self._take_undecoded(now)
        return None if key is None else self._take(key, now)

    def done(self, batch: Batch, probabilities: NDArray[np.float32], now: float) -> list[Job]:
        """Add up the answers (n, classes) of a batch; the images that are done."""
        finished, start = [], 0
        slowness = (now - batch.began) / batch.seconds if batch.seconds else 1.0
        for part in batch.parts:
            stop = start + len(part.views)
            planned = part.stage.seconds * len(part.views)
            self._took(part.job, slowness * planned, planned)
            if self._add(part, probabilities[start:stop]):
                self._shares.add((part.job.plan.protocol, part.job.rule.name), _ratio(part.job))
                self.release(part.job)
                finished.append(part.job)
            start = stop
        self._progress.done(now, batch.seconds, self._backlog.before(math.inf))
        return finished

    def failed(self, batch: Batch) -> list[Job]:
        """A batch failed on a sound engine: an image alone is given up and answered, others are run part by part."""
        if len(batch.parts) == 1:
            job = batch.parts[0].job
            return [job] if self.release(job) else []
        for part in batch.parts:
            self._put(part.job, part.stage, part.views, alone=True, lost=part.lost)
        return []

    def lost(self, batch: Batch, *, first: bool) -> list[Job]:
        """A batch was lost with its engine; what an engine died with for the second time is given up, others run again.

        `first`: it was the first batch to fail on that engine. Others, that ran beside it, are not to blame.
        """
        given_up = []
        for part in batch.parts:
            if first and part.lost:
                given_up += [part.job] if self.release(part.job) else []
            else:
                lost = first or part.lost
                self._put(part.job, part.stage, part.views, alone=lost, lost=lost)
        return given_up

    def pause(self, member: int) -> None:
        """Run nothing on a member whose engine is being replaced."""
        self._paused.add(member)

    def resume(self, member: int, now: float) -> None:
        """The member's engine is back."""
        self._paused.discard(member)
        self._progress.begin(now)

    def give_up(self, member: int) -> list[Job]:
        """The member's engine does not come back soon: the images that wait for it are given up."""
        waiting = {part.job for key, queue in self._queues.items() if key[0] == member for *_, part in queue.heap}
        waiting |= {job for *_, job in self._undecoded if any(stage.member == member for stage in job.plan.stages)}
        return [job for job in waiting if self.release(job)]

    @property
    def _runnable(self) -> dict[Key, _Queue]:
        return {key: queue for key, queue in self._queues.items() if key[0] not in self._paused}

    @property
    def _may_decode(self) -> bool:
        return self._to_decode > 0 and self._held < self._max_bytes

    def _ranks(self, now: float, deadline: float, images: int, seconds: float) -> list[float]:
        limit = min(self._max_wait, max(0.0, deadline - now))
        before_first = self.predicted_wait(now + limit)
        spare = limit / _CAUTION - before_first
        given = ranks(now, deadline, self._max_wait, images, seconds, len(self._requests), spare)
        predicted = _CAUTION * (before_first if images == 1 else self.predicted_wait(given[-1]))
        if predicted > limit:
            raise Overloaded(predicted, limit, "deadline" if limit < self._max_wait else "wait")
        return given

    def _took(self, job: Job, seconds: float, expected: float) -> None:
        """Part of an image took so long. Where that is more than expected, the rest of its request is moved back."""
        if job.active and self._requests[job.request] > 1:
            late = self._late.get(job.request, 0.0) + (seconds - _USUAL * expected) / job.pace
            self._late[job.request] = max(0.0, late)

    def _first_undecoded(self) -> Job:
        """There is one."""
        while (job := self._undecoded[0][-1]).decode is None or self._move(job):
            heapq.heappop(self._undecoded)
            if job.decode is not None:
                heapq.heappush(self._undecoded, (job.rank, job.order, job))
        return job

    def _move(self, job: Job) -> bool:
        """Move an image back, to the rank that `ranks` would have given it, had it known. Whether it was moved."""
        rank = min(job.rank - job.moved + 2 * self._late.get(job.request, 0.0), job.latest)
        if rank < job.rank + _STEP:
            return False
        self._backlog.leave(job.rank, job.expected)
        job.rank, job.moved = rank, job.moved + rank - job.rank
        self._backlog.enter(job.rank, job.expected)
        return True

    def _decodes_before(self, key: Key) -> bool:
        """Whether who can do both decodes an image before a batch of this queue is run.

        Waiting for batches to fill makes runs cheaper, and images that are ready wait; so it is done as far as it costs
        little: where many images are in line, as there are under load, and not where a few are. What waits for other
        members does not fill this queue's batch: when it counted, four members at 32 clients had batches of 3.9 views
        instead of 9.0, and 0.94 of the images/s (CIFAR-10, center; two Zen 4 cores, 2026-11-27).
        """
        ahead = self._queues[key].head()[0] - self._first_undecoded().rank
        return ahead > 0 or (-ahead <= _WINDOW and self._queues[key].views < min(self._full(key), self._to_decode))

    def _take_undecoded(self, now: float) -> Decoding:
        job = self._first_undecoded()
        heapq.heappop(self._undecoded)
        self._to_decode -= 1
        assert job.decode is not None
        work, job.decode = job.decode, None
        job.queued = now - job.since
        return Decoding(job, work)

    def _full(self, key: Key) -> int:
        """Views in a full batch."""
        member, (height, width, _), _ = key
        return max(1, self._batch_pixels[member] // (height * width))

    def _ask(self, job: Job) -> bool:
        """Queue what the stop rule needs next. False if it needs nothing: the image is done."""
        needed = job.rule.needed(job.sums, job.views, job.plan.views)
        for stage, start, stop in job.plan.between(job.asked, job.asked + needed):
            self._put(job, stage, job.blocks[stage.member][stage.block][start:stop])
        job.asked += needed
        return needed > 0

    def _put(
        self, job: Job, stage: Stage, views: NDArray[np.uint8], *, alone: bool = False, lost: bool = False
    ) -> None:
        if not job.active:
            return
        key = (stage.member, views.shape[1:], next(self._numbers) if alone else 0)
        part = Part(job, stage, views, key, lost)
        queue = self._queues.setdefault(key, _Queue())
        heapq.heappush(queue.heap, (job.rank, job.order, stage.first, next(self._numbers), part))
        queue.views += len(views)
        job.waiting.add(part)

    def _shrink(self, key: Key, views: int) -> None:
        queue = self._queues[key]
        queue.views -= views
        if not queue.views:
            del self._queues[key]

    def _take(self, key: Key, now: float) -> Batch:
        queue = self._queues[key]
        # Views are shared out over the streams where all but one would be idle otherwise. Those of other members keep
        # them busy, too: when each member's were divided, a lone image's ten crops took 1.03 to 1.05 times as long
        # (CIFAR-10, four members; two Zen 4 cores, 2026-11-27).
        room = self._full(key)
        if self._spread and not self._to_decode:
            room = min(room, math.ceil(sum(other.views for other in self._runnable.values()) / self._streams))
        parts: list[Part] = []
        latest = queue.head()[0] + _WINDOW
        while room and queue.views and queue.head()[0] <= latest:
            part = queue.head()[-1]
            count = min(room, len(part.views))
            parts.append(Part(part.job, part.stage, part.views[:count], key, part.lost))
            if count == len(part.views):
                heapq.heappop(queue.heap)
                part.job.waiting.remove(part)
            else:
                part.views = part.views[count:]
            if part.job.started is None:
                part.job.started = now
                part.job.queued += now - part.job.since
            self._shrink(key, count)
            room -= count
        return Batch(key[0], parts, sum(part.stage.seconds * len(part.views) for part in parts), now)

    def _add(self, part: Part, probabilities: NDArray[np.float32]) -> bool:
        """Whether its image is done. What was released meanwhile is ignored."""
        job, count = part.job, len(part.views)
        if not job.active:
            return False
        job.sums[part.stage.member] += probabilities.sum(axis=0, dtype=np.float64)
        job.views[part.stage.member] += count
        job.done += count
        self._unfinished -= count
        seconds = part.stage.seconds * count
        job.spent += seconds
        self._expect(job, job.expected - seconds)
        if job.done < job.asked:
            return False
        if not self._ask(job):
            return True
        self._expect(job, max(job.expected, job.plan.seconds_between(job.done, job.asked)))
        return False

    def _expect(self, job: Job, seconds: float) -> None:
        """Correct how much work is still to come for an image."""
        seconds = max(0.0, seconds)
        self._backlog.change(job.rank, seconds - job.expected)
        job.expected = seconds


def _ratio(job: Job) -> float:
    return job.spent / job.plan.seconds if job.plan.seconds else job.done / job.plan.views
