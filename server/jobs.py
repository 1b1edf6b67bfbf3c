"""What goes through the scheduler: an image as a job, its views as parts, and what a thread is given to do."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.server.plan import Plan, Stage
from resnet_ensemble.server.stopping import StopRule

Blocks = Sequence[Sequence[NDArray[np.uint8]]]  # of each member, views (n, h, w, 3) a block
Key = tuple[int, tuple[int, ...], int]  # of a queue: member, shape of a view, 0 or a number for what must run alone


@dataclass(frozen=True)
class Tally:
    """What the engines gave for one image.

    - sums: float64 (members, classes), softmax vectors summed over views
    - views: int64 (members,), how many were summed
    - queue_seconds: before it was decoded, and from then to the first batch; inference_seconds: from then to the
      last result
    """

    sums: NDArray[np.float64]
    views: NDArray[np.int64]
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class Job:
    """One admitted image on its way through the engines. Nothing here touches its `future`, which others wait for."""

    rank: float
    order: int  # of admission
    request: int
    plan: Plan
    rule: StopRule
    expected: float  # seconds of work still to come, by what images of this kind took
    decoding: float  # of these, until it is decoded
    pace: float  # seconds of expected work in a second, when it was admitted
    latest: float  # how far its rank may be moved back
    moved: float = 0.0  # how far it was
    future: "Future[Tally]" = field(default_factory=Future)
    active: bool = True  # until it is answered, failed or released
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    views: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    decode: "Callable[[], Blocks] | None" = None  # what gives its blocks, until someone has taken that on
    blocks: Blocks = ()
    held: int = 0  # bytes of the blocks
    asked: int = 0  # places of the plan that the stop rule has asked for
    done: int = 0  # of these, how many have a result
    spent: float = 0.0  # seconds of work, as planned
    since: float = 0.0  # when it began to wait: to be decoded, and then for its first batch
    queued: float = 0.0  # seconds that it has waited for these
    started: float | None = None
    waiting: "set[Part]" = field(default_factory=set)


@dataclass(eq=False)
class Part:
    """Views (n, h, w, 3) of one image for one member that are run together. `lost`: an engine died with them."""

    job: Job
    stage: Stage
    views: NDArray[np.uint8]
    queue: Key
    lost: bool = False


@dataclass(frozen=True)
class Batch:
    """What one engine run takes."""

    member: int
    parts: list[Part]
    seconds: float  # as planned
    began: float

    @property
    def views(self) -> int:
        """In all parts."""
        return sum(len(part.views) for part in self.parts)


@dataclass(frozen=True)
class Decoding:
    """An image to decode: `work` gives its blocks, or raises what is wrong with it."""

    job: Job
    work: Callable[[], Blocks]
