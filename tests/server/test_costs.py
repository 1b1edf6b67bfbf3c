from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import costs
from resnet_ensemble.server.costs import Cost, choose, measure, recorded, up_to


def test_batches_are_no_larger_than_throughput_needs() -> None:
    """A CPU computes one view after the other; a GPU computes 40 in nearly the time of one."""
    assert choose({1: 0.1, 10: 1.0, 40: 4.0}) == Cost(0.1, 1)
    assert choose({1: 0.002, 10: 0.003, 40: 0.005}) == Cost(0.005 / 40, 40)
    assert choose({1: 0.002, 10: 0.006, 40: 0.010}) == Cost(0.010 / 40, 40)


def test_runs_are_not_so_short_that_what_surrounds_them_counts() -> None:
    assert choose({1: 0.0007, 10: 0.0076, 40: 0.030}) == Cost(0.0007, 10)
    assert choose({1: 0.0001, 10: 0.0009, 40: 0.003}) == Cost(0.003 / 40, 40)


def test_a_limit_on_the_batch_is_between_what_was_timed() -> None:
    timings = {1: 0.1, 10: 1.0, 40: 3.0}

    assert up_to(None, timings) == timings
    assert up_to(64, timings) == timings
    assert up_to(10, timings) == {1: 0.1, 10: 1.0}
    assert up_to(25, timings) == {1: 0.1, 10: 1.0, 25: pytest.approx(2.0)}
    assert up_to(1, timings) == {1: 0.1}


@pytest.mark.parametrize(
    ("largest", "sizes"), [(None, {1, 10, 40}), (8, {1, 8}), (10, {1, 10}), (1, {1}), (10**9, {1, 10, 40})]
)
def test_engines_are_timed_in_batches_that_are_allowed(largest: int | None, sizes: set[int]) -> None:
    timings = measure(FakeEngine(10, seconds_per_view=0.0001), 4, largest)

    assert timings.keys() == sizes
    assert all(seconds >= 0.0001 * size for size, seconds in timings.items())


def test_a_slow_engine_is_not_timed_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_LONG_RUN", 0.02)

    assert measure(FakeEngine(10, seconds_per_view=0.005), 4).keys() == {1, 10}


def test_the_first_run_of_a_size_is_not_timed() -> None:
    class Cold(FakeEngine):
        """Slow when it sees a batch size for the first time."""

        def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
            first = len(views) not in self.batches
            self._seconds_per_view = 0.05 if first and len(views) == 1 else 0.0
            return super().run(views)

    assert measure(Cold(10), 4)[1] < 0.05


def test_what_interrupts_for_a_while_does_not_hit_all_runs_of_a_size() -> None:
    class Interrupted(FakeEngine):
        """Slow for a few runs in a row."""

        def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
            self._seconds_per_view = 0.02 / len(views) if 0 < len(self.batches) < 6 else 0.0
            return super().run(views)

    assert max(measure(Interrupted(10), 4).values()) < 0.02


def test_what_was_recorded_when_the_engine_was_built_is_not_measured_again(
    shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = shipped.manifest.members[0]
    rates = SimpleNamespace(views_per_second={"1": 500.0, "10": 1000.0, "40": 1000.0})
    monkeypatch.setattr(EngineStore, "current", lambda self, asked, *kind: rates if kind == ("x", "int8") else None)

    assert recorded(shipped, member, EngineInfo("x", "1", "int8", "cpu", threads=1)) == {1: 0.002, 10: 0.01, 40: 0.04}
    assert recorded(shipped, member, EngineInfo("x", "1", "fp32", "cpu", threads=1)) is None
