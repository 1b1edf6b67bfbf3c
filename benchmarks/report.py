"""The results as Markdown, as JSON, and drawn."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.acceptance import Check
from benchmarks.summary import BARE, OURS, PIPELINE, Cell, Closed, OpenLoop, Overload, median, ratio

CONTENDED = 0.05  # share of the machine that others may take before a measurement is none
_MIB = 2**20
_CLOSED_LOOP = (
    "Medians of the rounds; ratios are medians of the rounds' ratios. CPU is per image, of all processes of the server "
    "and of the load generator, which runs on the same cores; RSS is summed over the server's processes."
)
_OPEN_LOOP = (
    "Poisson arrivals; latency counts from the moment of arrival. The share is of this server's closed-loop throughput "
    "with the most clients: of the rounds, or just before a load of 60 s. Errors are what was not answered with 200 in "
    "time."
)


@dataclass(frozen=True)
class Results:
    """Everything that was measured in one run.

    - about: hardware, versions, date, n, by name
    - others: share of the machine's CPU time that went to processes which are no part of the measurement
    - ceiling: by clients, requests/s of the load generator against an endpoint that does nothing
    - notes: what was left out, and why
    """

    about: Mapping[str, str]
    others: float
    ceiling: Mapping[int, float]
    closed: Closed
    open: Sequence[OpenLoop]
    sustained: Sequence[OpenLoop]
    overload: Overload | None
    acceptance: Sequence[Check]
    notes: Sequence[str]


def markdown(results: Results, title: str, center: str) -> str:
    """The whole report."""
    parts = [f"# {title}"]
    if results.others > CONTENDED:
        parts.append(
            f"**Not a result: other processes took {100 * results.others:.0f} % of the CPUs while this was measured.**"
        )
    parts += [
        "\n".join(f"- {name}: {value}" for name, value in results.about.items()),
        "## Acceptance",
        table(
            ("", "measured", "holds"),
            [(check.claim, check.measured, _holds(check.holds)) for check in results.acceptance],
        ),
        "## In short",
        short_table(results.closed, center),
        "## Closed loop",
        _CLOSED_LOOP,
        closed_table(results.closed),
        "The load generator against an endpoint that does nothing: "
        + ", ".join(f"{rate:.0f} requests/s with {clients} clients" for clients, rate in results.ceiling.items())
        + ".",
        "## Open loop",
        _OPEN_LOOP,
        open_table([*results.open, *results.sustained]),
    ]
    if results.overload:
        parts += ["## Overload", _overload(results.overload)]
    if results.notes:
        parts += ["## Left out", "\n".join(f"- {note}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def short_table(closed: Closed, center: str) -> str:
    """One row a system under the workload that all of them can do: images/s and p99 by clients."""
    cells = [cell for cell in closed if cell.workload == center and cell.clients]
    clients = sorted({cell.clients for cell in cells})
    rows = []
    for system in dict.fromkeys(cell.system for cell in cells):
        found = [median(closed[Cell(center, system, n)]) for n in clients]
        rates, tails = [number(one.rate, 0) for one in found], [number(1000 * one.p99, 1) for one in found]
        rows.append((system, *rates, *tails, number(found[-1].resident / _MIB, 0)))
    heads = [f"{what} x{n}" for what in ("images/s", "p99 ms") for n in clients]
    return table((center, *heads, "RSS MiB"), rows)


def closed_table(closed: Closed) -> str:
    """One row a cell."""
    rows = []
    for cell, rounds in closed.items():
        middle = median(rounds)
        of_pipeline = ratio(closed, cell, Cell(cell.workload, PIPELINE, cell.clients))
        of_bare = ratio(closed, cell, Cell(cell.workload, BARE, 0))
        rows.append(
            (
                cell.workload,
                cell.system,
                str(cell.clients or ""),
                number(middle.rate, 1),
                number(of_pipeline, 2),
                number(of_bare, 2),
                *(number(1000 * seconds, 1) for seconds in (middle.p50, middle.p95, middle.p99)),
                *(number(1000 * seconds, 2) for seconds in (middle.server_cpu, middle.client_cpu)),
                number(middle.resident / _MIB, 0),
                number(100 * middle.errors, 1) if middle.errors else "",
            )
        )
    heads = (
        "workload|system|clients|images/s|of pipeline|of bare|p50 ms|p95 ms|p99 ms|CPU ms|client ms|RSS MiB|errors %"
    )
    return table(heads.split("|"), rows)


def open_table(found: Sequence[OpenLoop]) -> str:
    """One row a system and rate."""
    rows = [
        (
            one.workload,
            one.system,
            f"{one.share:g}",
            number(one.rate, 1),
            str(one.requests),
            *(number(1000 * seconds, 1) for seconds in (one.p50, one.p99)),
            number(100 * one.errors, 2),
            number(1000 * one.late, 1),
        )
        for one in found
    ]
    heads = ("workload", "system", "share", "arrivals/s", "n", "p50 ms", "p99 ms", "errors %", "sent late, p99 ms")
    return table(heads, rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int) -> str:
    """As text; nothing for what was not measured."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def as_json(results: Results) -> str:
    """Every round of every cell. What is not a number is null."""
    content = {
        **{name: value for name, value in vars(results).items() if name not in ("closed", "acceptance")},
        "acceptance": [asdict(check) for check in results.acceptance],
        "closed": [{**asdict(cell), "rounds": [asdict(r) for r in rounds]} for cell, rounds in results.closed.items()],
        "open": [asdict(one) for one in results.open],
        "sustained": [asdict(one) for one in results.sustained],
        "overload": asdict(results.overload) if results.overload else None,
    }
    return json.dumps(_finite(content), indent=1) + "\n"


def draw(results: Results, center: str) -> bytes:
    """A PNG: throughput of servers, p99 against rate, throughput of the ensemble's workloads."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    servers, queues, workloads = figure.subplots(1, 3)
    systems = dict.fromkeys(cell.system for cell in results.closed if cell.workload == center and cell.clients)
    colours = {system: f"C{i}" for i, system in enumerate(systems)}
    _draw_servers(servers, results.closed, center, colours)
    _draw_queues(queues, results.open, center, colours)
    _draw_ensemble(workloads, results.closed, center)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def _draw_servers(axes: Any, closed: Closed, center: str, colours: Mapping[str, str]) -> None:
    clients = sorted({cell.clients for cell in closed if cell.workload == center and cell.clients})
    width = 0.8 / len(colours)
    for i, (system, colour) in enumerate(colours.items()):
        rates = [median(closed[Cell(center, system, n)]).rate for n in clients]
        axes.bar([x + i * width for x in range(len(clients))], rates, width, label=system, color=colour)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(clients))], [str(n) for n in clients])
    axes.set(xlabel="clients (closed loop)", ylabel="images/s", title=center, ylim=(0, 1.4 * axes.get_ylim()[1]))
    axes.legend(fontsize="small", loc="upper left")


def _draw_queues(axes: Any, found: Sequence[OpenLoop], center: str, colours: Mapping[str, str]) -> None:
    for system in dict.fromkeys(one.system for one in found):
        points = [(one.rate, 1000 * one.p99) for one in found if one.system == system and not math.isnan(one.p99)]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=system, color=colours[system])
    axes.set(xlabel="arrivals/s (Poisson)", ylabel="p99 (ms)", yscale="log", title=f"{center}, open loop")
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize="small", loc="upper left")


def _draw_ensemble(axes: Any, closed: Closed, center: str) -> None:
    most = max(cell.clients for cell in closed)
    cells = [c for c in closed if c.clients == most and c.workload != center and c.system != PIPELINE]
    labels = [cell.workload if cell.system == OURS else f"{cell.workload}: {cell.system}" for cell in cells]
    colours = ["tab:blue" if cell.system == OURS else "tab:gray" for cell in cells]
    bars = axes.barh(labels, [median(closed[cell]).rate for cell in cells], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="images/s", title=f"ensemble, {most} clients", xlim=(0, 1.15 * axes.get_xlim()[1]))


def _holds(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "**no**"


def _overload(found: Overload) -> str:
    times = f", in {1000 * found.refused_p50:.1f} ms (p50), {1000 * found.refused_p99:.1f} ms (p99)"
    refused = times if found.refused else ""
    resident = (found.resident_before / _MIB, max(found.resident_first, found.resident_second) / _MIB)
    sentences = (
        f"{found.share:g} times the capacity ({found.rate:.0f} arrivals/s) for {found.seconds:g} s.",
        f"The wait is limited to {found.limit:g} s.",
        f"{found.accepted} accepted, with a p99 of {1000 * found.accepted_p99:.0f} ms.",
        f"{found.refused} refused{refused}.",
        f"{found.others} neither.",
        f"RSS {resident[0]:.0f} MiB before, {resident[1]:.0f} MiB at most.",
        f"Normal {found.recovery:.2f} s after the last arrival.",
        f"The load generator sent 99 % at most {1000 * found.late:.1f} ms late.",
    )
    return " ".join(sentences)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
