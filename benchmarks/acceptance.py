"""What the server promises, the value measured, and whether it holds. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.summary import OURS, PIPELINE, Cell, Closed, OpenLoop, Overload, median, ratio, steady

OF_PIPELINE = 0.92  # images/s over HTTP, of those in one process
EXACT = 1.25  # times the throughput of `full`, of networks that are often unsure
EXACT_CIFAR10 = 1.6
FASTEST = 15  # times the throughput of ten crops in FP32
LOADED = 4  # times the latency of a lone request
REFUSED_SECONDS = 0.05
RECOVERY_SECONDS = 2.0
FLAT = 1.05  # times the memory of the first half, in the second


@dataclass(frozen=True)
class Check:
    """`holds` is None where it was not measured."""

    claim: str
    measured: str
    holds: bool | None


def of_servers(closed: Closed, center: str) -> list[Check]:
    """A single view, FP32: what serving costs, beside the pipeline and beside other servers."""
    checks = [
        _at_least(
            f"of the pipeline's images/s at {clients} (`{center}`)",
            ratio(closed, Cell(center, OURS, clients), Cell(center, PIPELINE, clients)),
            OF_PIPELINE,
        )
        for clients in (8, 32)
    ]
    peers = sorted({cell.system for cell in closed if cell.workload == center and cell.clients} - {OURS, PIPELINE})
    return checks + [_not_behind(closed, center, peer, clients) for peer in peers for clients in (1, 8, 32)]


def of_stop_rules(closed: Closed, full: str, exact: str, *, least: float) -> Check:
    """How much `exact` saves at 32 requests."""
    return _at_least(
        f"times the images/s of `{full}` with `{exact}` at 32",
        ratio(closed, Cell(exact, OURS, 32), Cell(full, OURS, 32)),
        least,
    )


def of_fastest(closed: Closed, full: str, candidates: Sequence[str]) -> Check:
    """The fastest configuration beside ten crops in FP32. Whether its error is as low, evaluate.py says."""
    ratios = {name: ratio(closed, Cell(name, OURS, 32), Cell(full, OURS, 32)) for name in candidates}
    found = {name: value for name, value in ratios.items() if value is not None}
    best = max(found, key=lambda name: found[name], default=None)
    claim = f"times the images/s of `{full}` with {f'`{best}`' if best else 'the fastest configuration'} at 32"
    return _at_least(claim, None if best is None else found[best], FASTEST)


def of_sustained(sustained: Sequence[OpenLoop], closed: Closed) -> list[Check]:
    """80 % of the capacity, for long.

    At random that much load makes some wait long in the best of queues, which is measured beside the server. Where the
    machine's pace has changed meanwhile, it was another share, and nothing is said.
    """
    checks = []
    for found in sustained:
        limit = f"p99 at most {LOADED} times the median of lone requests at 80 % of the capacity, no error"
        times = found.p99 / median(closed[Cell(found.workload, OURS, 1)]).p50
        measured = f"{times:.1f} times, {100 * found.errors:.2f} % errors of {found.requests}"
        if found.pace is not None:
            measured += f"; the capacity afterwards was {found.pace:.2f} times as high"
        claim = f"{found.system}: {limit} (`{found.workload}`)"
        holds = times <= LOADED and found.errors == 0
        checks.append(Check(claim, measured, holds if steady(found.pace) else None))
    return checks


def of_overload(found: Overload | None) -> list[Check]:
    """Arrivals at several times the capacity."""
    claims = (
        "accepted requests: p99 within the limit of the wait",
        f"refused requests: 503 with Retry-After, p99 under {1000 * REFUSED_SECONDS:.0f} ms",
        "every request is either answered or refused",
        f"memory flat: at most {FLAT:g} times that of the first half in the second",
        f"normal within {RECOVERY_SECONDS:g} s",
    )
    if found is None:
        return [Check(claim, "not measured", None) for claim in claims]
    growth = found.resident_second / found.resident_first
    refused = f"{1000 * found.refused_p99:.1f} ms, {found.without_retry_after} of {found.refused} without Retry-After"
    quickly = found.refused_p99 < REFUSED_SECONDS and not found.without_retry_after
    outcomes = (
        (f"{found.accepted_p99:.2f} s of {found.limit:g} s", found.accepted_p99 <= found.limit),
        (refused, quickly) if found.refused else ("none was refused", None),
        (f"{found.others} of {found.accepted + found.refused + found.others} were neither", not found.others),
        (f"{growth:.2f} times", growth <= FLAT),
        (f"{found.recovery:.2f} s", found.recovery <= RECOVERY_SECONDS),
    )
    return [Check(claim, measured, holds) for claim, (measured, holds) in zip(claims, outcomes, strict=True)]


def _at_least(claim: str, value: float | None, least: float) -> Check:
    claim = f"at least {least:g} {claim}"
    return Check(claim, "not measured", None) if value is None else Check(claim, f"{value:.2f}", value >= least)


def _not_behind(closed: Closed, workload: str, peer: str, clients: int) -> Check:
    claim = f"at {clients}, at least the images/s of {peer} at an equal or lower p99 (`{workload}`)"
    ours, theirs = Cell(workload, OURS, clients), Cell(workload, peer, clients)
    rate, p99 = ratio(closed, ours, theirs), ratio(closed, ours, theirs, "p99")
    if rate is None or p99 is None:
        return Check(claim, "not measured", None)
    holds = rate >= 1 and p99 <= 1 and not math.isnan(p99)
    return Check(claim, f"{rate:.2f} times the images/s, {p99:.2f} times the p99", holds)
