"""What a view costs on each engine: from what build_engines.py recorded, otherwise measured at start."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import Engine

# As export/build_engines.py times engines.
SIZES = (1, 10, 40)
# Once a run takes so long, it makes no difference that larger batches have less overhead a view.
_LONG_RUN = 0.5
# Seconds that a batch costs besides the engine: packing, adding up, waking threads (2 Zen 5 cores, Python 3.11).
_OVERHEAD = 0.0002
# A smaller batch is preferred to one with so much more throughput: its images are answered sooner.
_WORTH = 1.05


@dataclass(frozen=True)
class Cost:
    """`seconds` of one view in batches of `batch` views, the size that engine runs are filled up to."""

    seconds: float
    batch: int


def choose(timings: Mapping[int, float]) -> Cost:
    """The smallest batch with nearly the best throughput. `timings`: seconds of a run by batch size."""
    a_view = {size: (seconds + _OVERHEAD) / size for size, seconds in sorted(timings.items())}
    best = min(a_view.values())
    size = next(size for size, seconds in a_view.items() if seconds <= _WORTH * best)
    return Cost(timings[size] / size, size)


def recorded(bundle: Bundle, member: Member, backend: str | None) -> dict[int, float] | None:
    """What build_engines.py measured of the engine that `open_engine` takes: seconds by batch size."""
    record = EngineStore(bundle).best(member, backend)
    if record is None:
        return None
    return {int(size): int(size) / rate for size, rate in record.views_per_second.items()}


def measure(engine: Engine, side: int, largest: int | None = None) -> dict[int, float]:
    """Run an engine on square views: seconds by batch size, the shorter of two runs after a first one."""
    timings: dict[int, float] = {}
    for size in SIZES if largest is None else sorted({*(size for size in SIZES if size < largest), largest}):
        views = np.zeros((size, side, side, 3), np.uint8)
        engine.run(views)
        timings[size] = min(_seconds(engine, views), _seconds(engine, views))
        if timings[size] > _LONG_RUN:
            break
    return timings


def up_to(largest: int | None, timings: Mapping[int, float]) -> dict[int, float]:
    """Timings of batches up to the largest that is allowed, and of that one."""
    sizes = sorted(timings)
    if largest is None or largest >= sizes[-1]:
        return dict(timings)
    between = float(np.interp(largest, sizes, [timings[size] for size in sizes]))
    return {size: timings[size] for size in sizes if size <= largest} | {largest: between}


def _seconds(engine: Engine, views: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> float:
    began = time.perf_counter()
    engine.run(views)
    return time.perf_counter() - began
