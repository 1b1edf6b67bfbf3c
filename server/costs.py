"""What a view costs on each engine: from what build_engines.py recorded, otherwise measured at start."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engine_store import TIMED_BATCHES, EngineStore
from resnet_ensemble.export.engines import Engine, EngineInfo

# Runs of a size that are timed, as far as they fit into so many seconds. The shortest counts: others were interrupted.
# Sizes take turns, so that what interrupts does not hit all runs of one.
_RUNS, _TIMED = 5, 0.05
# Once a run takes so long, it makes no difference that larger batches have less overhead a view.
_LONG_RUN = 0.5
# Shorter runs cost too much besides the engine: packing, adding up, waking threads. With ResNet-20 and 32, 20 views an
# image, 24.7, 22.1 and 21.6 ms of CPU time an image in batches of 1, 10 and 40, whose runs take 0.8, 8 and 30 ms
# (2 Zen 5 cores, Python 3.11, ONNX Runtime 1.32.0).
_SHORT_RUN = 0.005
# A smaller batch is preferred to one with so much more throughput: its images are answered sooner.
_WORTH = 1.05


@dataclass(frozen=True)
class Cost:
    """`seconds` of one view at the best throughput; `batch`: how many views engine runs are filled up to."""

    seconds: float
    batch: int


def choose(timings: Mapping[int, float]) -> Cost:
    """The smallest batch with nearly the best throughput, of those whose runs are not too short.

    - timings: seconds of a run by batch size
    """
    a_view = {size: timings[size] / size for size in sorted(timings)}
    lasting = [size for size in a_view if timings[size] >= _SHORT_RUN] or [max(timings)]
    best = min(a_view[size] for size in lasting)
    return Cost(min(a_view.values()), next(size for size in lasting if a_view[size] <= _WORTH * best))


def recorded(bundle: Bundle, member: Member, engine: EngineInfo) -> dict[int, float] | None:
    """What build_engines.py measured of such an engine on this host, if it did: seconds by batch size."""
    record = EngineStore(bundle).current(member, engine.backend, engine.precision)
    if record is None:
        return None
    return {int(size): int(size) / rate for size, rate in record.views_per_second.items()}


def measure(engine: Engine, side: int, largest: int | None = None) -> dict[int, float]:
    """Run an engine on square views: seconds of a run by batch size, 40 at most whatever is allowed."""
    timings: dict[int, list[float]] = {}
    largest = TIMED_BATCHES[-1] if largest is None else min(largest, TIMED_BATCHES[-1])
    for size in sorted({*(size for size in TIMED_BATCHES if size < largest), largest}):
        engine.run(_views(size, side))
        timings[size] = [_seconds(engine, _views(size, side))]
        if timings[size][0] > _LONG_RUN:
            break
    for _ in range(_RUNS - 1):
        for size, seconds in timings.items():
            if sum(seconds) < _TIMED:
                seconds.append(_seconds(engine, _views(size, side)))
    return {size: min(seconds) for size, seconds in timings.items()}


def up_to(largest: int | None, timings: Mapping[int, float]) -> dict[int, float]:
    """Timings of batches up to the largest that is allowed, and of that one."""
    sizes = sorted(timings)
    if largest is None or largest >= sizes[-1]:
        return dict(timings)
    between = float(np.interp(largest, sizes, [timings[size] for size in sizes]))
    return {size: timings[size] for size in sizes if size <= largest} | {largest: between}


def _views(size: int, side: int) -> NDArray[np.uint8]:
    return np.zeros((size, side, side, 3), np.uint8)


def _seconds(engine: Engine, views: NDArray[np.uint8]) -> float:
    began = time.perf_counter()
    engine.run(views)
    return time.perf_counter() - began
