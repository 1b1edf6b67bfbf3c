"""From latencies to numbers, from numbers to verdicts."""

import json
import math
import statistics
from typing import Any

import pytest

from benchmarks import acceptance, report
from benchmarks.acceptance import Check
from benchmarks.load import poisson
from benchmarks.report import Results
from benchmarks.summary import (
    OURS,
    PIPELINE,
    Cell,
    OpenLoop,
    Overload,
    Round,
    closed_round,
    median,
    open_loop,
    overload,
    percentile,
    queued,
    ratio,
)

CENTER = "center"


def answers(*pairs: tuple[float, int], told: bool = True) -> dict[str, Any]:
    """What the load generator says: (seconds, status) of each request."""
    return {
        "seconds": [seconds for seconds, _ in pairs],
        "status": [status for _, status in pairs],
        "retry_after": [told and status == 503 for _, status in pairs],
    }


def overloaded(*pairs: tuple[float, int], told: bool = True, recovery: float = 0.5, last: float = 100) -> Overload:
    answer = {"answers": answers(*pairs, told=told), "seconds": 1.0, "late": [0.001], "recovery": recovery}
    return overload(answer, share=3, rate=30, limit=1.0, resident=[90, 100, 100, last])


def rounds(*rates: float, p99: float = 0.1) -> list[Round]:
    return [Round(rate, p50=0.05, p95=0.08, p99=p99) for rate in rates]


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.95, 95), (0.99, 99), (0.001, 1), (1.0, 100)])
def test_a_percentile_is_the_nearest_rank(share: float, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == value


def test_a_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_only_answers_with_200_count_as_throughput_and_latency() -> None:
    found = closed_round(
        {"answers": answers((0.1, 200), (0.3, 200), (9.0, 503), (9.0, 0)), "seconds": 2.0, "cpu_seconds": 0.4}, 1.0, 50
    )

    assert (found.rate, found.p50, found.p99, found.errors, found.requests) == (1.0, 0.1, 0.3, 0.5, 4)
    assert (found.server_cpu, found.client_cpu, found.resident) == (0.5, 0.2, 50)


def test_the_rounds_of_an_open_loop_are_one_sample() -> None:
    parts = [
        {"answers": answers((0.1, 200), (0.2, 200)), "late": [0.0, 0.001]},
        {"answers": answers((0.3, 200), (5.0, 0)), "late": [0.002, 0.003]},
    ]

    found = open_loop(CENTER, "x", 0.5, 10.0, parts)

    assert (found.requests, found.p50, found.p99, found.errors, found.late) == (4, 0.2, 0.3, 0.25, 0.003)


def test_two_systems_are_compared_round_by_round() -> None:
    """A machine that is twice as fast in one round does not change who is faster."""
    closed = {Cell("w", "a", 8): rounds(10, 20, 11), Cell("w", "b", 8): rounds(20, 40, 22)}

    assert ratio(closed, Cell("w", "a", 8), Cell("w", "b", 8)) == 0.5
    assert ratio(closed, Cell("w", "a", 8), Cell("w", "c", 8)) is None
    assert median(closed[Cell("w", "a", 8)]).rate == 11


@pytest.mark.parametrize(("rate", "holds"), [(92, True), (91, False)])
def test_throughput_is_held_against_the_pipeline(rate: float, holds: bool) -> None:
    closed = {Cell(CENTER, PIPELINE, 8): rounds(100), Cell(CENTER, OURS, 8): rounds(rate)}

    at_8, at_32 = acceptance.of_servers(closed, CENTER)

    assert (at_8.measured, at_8.holds) == (f"{rate / 100:.2f}", holds)
    assert (at_32.measured, at_32.holds) == ("not measured", None)


@pytest.mark.parametrize(("rate", "p99", "holds"), [(100, 0.1, True), (99, 0.1, False), (200, 0.11, False)])
def test_a_peer_must_be_reached_in_throughput_and_in_p99(rate: float, p99: float, holds: bool) -> None:
    closed = {Cell(CENTER, "peer", 1): rounds(100, p99=0.1), Cell(CENTER, OURS, 1): rounds(rate, p99=p99)}

    found = [check for check in acceptance.of_servers(closed, CENTER) if check.holds is not None]

    assert [check.holds for check in found] == [holds]
    assert "peer" in found[0].claim
    assert CENTER in found[0].claim  # the same is claimed of one member and of all


def test_the_fastest_configuration_is_found() -> None:
    closed = {Cell(name, OURS, 32): rounds(rate) for name, rate in [("full", 10), ("exact", 16), ("dense", 160)]}

    assert acceptance.of_stop_rules(closed, "full", "exact", least=1.6).holds
    fastest = acceptance.of_fastest(closed, "full", ["exact", "dense", "never measured"])
    assert ("`dense`" in fastest.claim, fastest.measured, fastest.holds) == (True, "16.00", True)


@pytest.mark.parametrize(("p99", "errors", "holds"), [(0.2, 0.0, True), (0.21, 0.0, False), (0.1, 0.01, False)])
def test_sustained_load_needs_a_short_tail_and_no_error(p99: float, errors: float, holds: bool) -> None:
    sustained = OpenLoop(CENTER, OURS, 0.8, 10, 600, 0.05, p99, errors, 0.0)

    (check,) = acceptance.of_sustained([sustained], {Cell(CENTER, OURS, 1): rounds(100)})

    assert check.holds is holds


@pytest.mark.parametrize(("pace", "holds"), [(None, True), (0.95, True), (1.05, True), (0.8, None), (1.25, None)])
def test_nothing_is_said_of_a_load_during_which_the_machine_changed_its_pace(
    pace: float | None, holds: bool | None
) -> None:
    sustained = OpenLoop(CENTER, OURS, 0.8, 10, 600, 0.05, 0.2, 0.0, 0.0, pace)

    (check,) = acceptance.of_sustained([sustained], {Cell(CENTER, OURS, 1): rounds(100)})

    assert check.holds is holds
    assert (f"{pace:.2f} times as high" in check.measured) if pace else ("capacity" not in check.measured)


def test_in_a_perfect_queue_requests_wait_for_those_before_them_only() -> None:
    assert queued([0.0, 1.0, 1.5, 9.0], 2.0, servers=1) == [2.0, 3.0, 4.5, 2.0]
    assert queued([0.0, 1.0, 1.5, 9.0], 2.0, servers=2) == [2.0, 2.0, 2.5, 2.0]


def test_the_perfect_queue_is_that_of_theory() -> None:
    """Pollaczek and Khinchine: with one server the mean wait is service times load / (2 (1 - load))."""
    latencies = queued(poisson(0.8, 200_000, seed=0), 1.0, servers=1)

    assert statistics.fmean(latencies) - 1 == pytest.approx(0.8 / (2 * 0.2), rel=0.05)


def test_a_good_overload_holds_everything() -> None:
    checks = acceptance.of_overload(overloaded((0.9, 200), (0.01, 503)))

    assert [check.holds for check in checks] == [True] * 5


@pytest.mark.parametrize(
    ("position", "found"),
    [
        (0, overloaded((1.1, 200), (0.01, 503))),
        (1, overloaded((0.9, 200), (0.06, 503))),
        (1, overloaded((0.9, 200), (0.01, 503), told=False)),
        (2, overloaded((0.9, 200), (0.01, 503), (0.1, 500))),
        (3, overloaded((0.9, 200), (0.01, 503), last=120)),
        (4, overloaded((0.9, 200), (0.01, 503), recovery=2.1)),
    ],
)
def test_each_fault_under_overload_is_found(position: int, found: Overload) -> None:
    failed = [i for i, check in enumerate(acceptance.of_overload(found)) if not check.holds]

    assert failed == [position]


def test_that_nothing_was_refused_is_no_success() -> None:
    assert acceptance.of_overload(overloaded((0.9, 200)))[1] == Check(
        "refused requests: 503 with Retry-After, p99 under 50 ms", "none was refused", None
    )


@pytest.fixture
def results() -> Results:
    closed = {
        Cell(CENTER, "bare engines", 0): [Round(200.0)],
        Cell(CENTER, PIPELINE, 8): rounds(100),
        Cell(CENTER, OURS, 8): rounds(93),
        Cell("10crop full", OURS, 8): rounds(10),
    }
    opens = [
        OpenLoop(CENTER, OURS, 0.5, 46.5, 100, 0.01, 0.02, 0.0, 0.001),
        OpenLoop(CENTER, OURS, 9, 900, 0, math.nan, math.nan, 1, 0),
    ]
    checks = [Check("a claim", "0.93", True), Check("another", "0.1", False), Check("a third", "not measured", None)]
    return Results(
        about={"machine": "a test"},
        others=0.01,
        ceiling={8: 5000.0},
        closed=closed,
        open=opens,
        sustained=[],
        overload=overloaded((0.9, 200), (0.01, 503)),
        acceptance=checks,
        notes=["LitServe: not installed"],
    )


def test_the_report_shows_every_cell_with_its_ratios(results: Results) -> None:
    text = report.markdown(results, "A title", CENTER)

    assert "| center | this server | 8 | 93.0 | 0.93 | 0.47 | 50.0 | 80.0 | 100.0 |" in text
    assert "| center | images/s x8 | p99 ms x8 | RSS MiB |" in text
    assert "| this server | 93 | 100.0 |" in text
    assert "| a claim | 0.93 | yes |\n| another | 0.1 | **no** |\n| a third | not measured |  |" in text
    assert "nan" not in text
    assert "LitServe: not installed" in text
    assert "Not a result" not in text


def test_a_measurement_under_contention_says_that_it_is_none(results: Results) -> None:
    contended = Results(**{**vars(results), "others": 0.2})

    assert "**Not a result: other processes took 20 % of the CPUs" in report.markdown(contended, "A title", CENTER)


def test_the_json_has_every_round_and_no_nan(results: Results) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(report.as_json(results), parse_constant=refuse)

    ours = next(cell for cell in content["closed"] if (cell["workload"], cell["system"]) == (CENTER, OURS))
    assert [one["rate"] for one in ours["rounds"]] == [93]
    assert content["open"][1]["p99"] is None
    assert content["others"] == 0.01


def test_the_plot_is_a_png_and_the_same_again(results: Results) -> None:
    drawn = report.draw(results, CENTER)

    assert drawn.startswith(b"\x89PNG")
    assert drawn == report.draw(results, CENTER)
