"""From latencies to numbers. Pure functions.

A cell is a system under a workload with a number of clients; it is measured once in every round. Rounds are
interleaved, and two cells are compared by the median of their ratios round by round, since machines drift.
"""

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

OURS, PIPELINE, BARE = "this server", "pipeline", "bare engines"
OK = 200
DRIFT = 1.1  # times the capacity, up or down, within a minute: then a share of it says nothing
# Arrivals for long, and what they would wait in a queue that loses nothing.
EVEN, RANDOM, PERFECT = f"{OURS}, at even intervals", f"{OURS}, at random", "a perfect queue, at random"


@dataclass(frozen=True)
class Cell:
    """What is measured. `clients`: requests under way; 0 where there are none."""

    workload: str
    system: str
    clients: int


@dataclass(frozen=True)
class Round:
    """One measurement. Rate in images/s, percentiles in s, CPU in s an image; NaN where there is none.

    - errors: share of requests that were not answered with 200
    """

    rate: float
    p50: float = math.nan
    p95: float = math.nan
    p99: float = math.nan
    server_cpu: float = math.nan
    client_cpu: float = math.nan
    resident: float = math.nan
    errors: float = 0.0
    requests: float = 0


@dataclass(frozen=True)
class OpenLoop:
    """Requests that arrived at a rate (1/s), which was a share of a capacity. Percentiles in s.

    - late: the 99th percentile of how late the load generator was itself
    - pace: the capacity afterwards, of that capacity; None where it was not measured
    """

    workload: str
    system: str
    share: float
    rate: float
    requests: int
    p50: float
    p99: float
    errors: float
    late: float
    pace: float | None = None


@dataclass(frozen=True)
class Overload:
    """Arrivals at a multiple of the capacity: what became of the accepted and of the refused. Times in s.

    - resident: RSS before, and the largest of the first and of the second half
    """

    share: float
    rate: float
    seconds: float
    limit: float
    accepted: int
    accepted_p99: float
    refused: int
    refused_p50: float
    refused_p99: float
    refused_longest: float
    without_retry_after: int
    others: int
    recovery: float
    resident_before: float
    resident_first: float
    resident_second: float
    late: float


Closed = Mapping[Cell, Sequence[Round]]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that so large a share of all does not exceed. NaN of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def closed_round(answer: Mapping[str, Any], server_cpu: float, resident: float) -> Round:
    """From what the load generator says of a closed loop.

    - server_cpu: seconds that the server's processes took for all of it
    """
    answers = answer["answers"]
    good = _seconds_of(answers, OK)
    images = max(1, len(good))
    return Round(
        rate=len(good) / answer["seconds"],
        p50=percentile(good, 0.50),
        p95=percentile(good, 0.95),
        p99=percentile(good, 0.99),
        server_cpu=server_cpu / images,
        client_cpu=answer["cpu_seconds"] / images,
        resident=resident,
        errors=1 - len(good) / max(1, len(answers["status"])),
        requests=len(answers["status"]),
    )


def queued(arrivals: Sequence[float], service: float, servers: int) -> list[float]:
    """Latencies in a queue where nothing is lost: first come, first served, each so many seconds on one of `servers`.

    Arrivals ascend. It is what random arrivals cost by themselves: M/D/c of queueing theory.
    """
    free = [0.0] * servers
    latencies = []
    for arrival in arrivals:
        done = max(arrival, free[0]) + service
        heapq.heapreplace(free, done)
        latencies.append(done - arrival)
    return latencies


def open_loop(workload: str, system: str, share: float, rate: float, parts: Sequence[Mapping[str, Any]]) -> OpenLoop:
    """All rounds of one rate together."""
    good = [seconds for part in parts for seconds in _seconds_of(part["answers"], OK)]
    sent = sum(len(part["answers"]["status"]) for part in parts)
    late = [seconds for part in parts for seconds in part["late"]]
    return OpenLoop(
        workload=workload,
        system=system,
        share=share,
        rate=rate,
        requests=sent,
        p50=percentile(good, 0.50),
        p99=percentile(good, 0.99),
        errors=1 - len(good) / max(1, sent),
        late=percentile(late, 0.99),
    )


def steady(pace: float | None) -> bool:
    """Whether a load was the share of the capacity that it was meant to be, until its end."""
    return pace is None or 1 / DRIFT <= pace <= DRIFT


def overload(
    answer: Mapping[str, Any], *, share: float, rate: float, limit: float, resident: Sequence[float]
) -> Overload:
    """From what the load generator says, and RSS before and during."""
    answers = answer["answers"]
    statuses = answers["status"]
    good, refused = _seconds_of(answers, OK), _seconds_of(answers, 503)
    half = len(resident) // 2
    told = sum(told for told, status in zip(answers["retry_after"], statuses, strict=True) if status == 503)
    return Overload(
        share=share,
        rate=rate,
        seconds=answer["seconds"],
        limit=limit,
        accepted=len(good),
        accepted_p99=percentile(good, 0.99),
        refused=len(refused),
        refused_p50=percentile(refused, 0.50),
        refused_p99=percentile(refused, 0.99),
        refused_longest=max(refused, default=math.nan),
        without_retry_after=len(refused) - told,
        others=len(statuses) - len(good) - len(refused),
        recovery=answer["recovery"],
        resident_before=resident[0],
        resident_first=max(resident[: half + 1]),
        resident_second=max(resident[half:]),
        late=percentile(answer["late"], 0.99),
    )


def median(rounds: Sequence[Round]) -> Round:
    """Of every field."""
    return Round(**{field.name: statistics.median(getattr(r, field.name) for r in rounds) for field in fields(Round)})


def ratio(closed: Closed, cell: Cell, reference: Cell, field: str = "rate") -> float | None:
    """Of a field of two cells: the median over the rounds. None unless both were measured."""
    if cell not in closed or reference not in closed:
        return None
    pairs = zip(closed[cell], closed[reference], strict=True)
    return statistics.median(_divided(getattr(a, field), getattr(b, field)) for a, b in pairs)


def _divided(a: float, b: float) -> float:
    return a / b if b else math.inf


def _seconds_of(answers: Mapping[str, Sequence[Any]], status: int) -> list[float]:
    return [seconds for seconds, was in zip(answers["seconds"], answers["status"], strict=True) if was == status]
