"""Schedules at their corners and as laws."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.training import schedules
from resnet_ensemble.training.recipes import RECIPES


@given(steps=st.integers(2, 5000), warm_up=st.floats(0.01, 0.9))
def test_the_one_cycle_rate_rises_to_its_peak_once_and_falls_towards_zero(steps: int, warm_up: float) -> None:
    rates = [schedules.one_cycle(step, steps=steps, peak=0.2, warm_up=warm_up) for step in range(steps)]

    top = rates.index(max(rates))
    assert all(0 < rate <= 0.2 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_one_cycle_corners() -> None:
    def rate(step: int) -> float:
        return schedules.one_cycle(step, steps=100, peak=1.0, warm_up=0.2)

    assert [rate(0), rate(19), rate(20), rate(60)] == pytest.approx([0.05, 1.0, 1.0, 0.5])
    assert rate(99) == pytest.approx(0.0125)


def test_the_staircase_of_the_paper_s_110_layers() -> None:
    def rate(step: int) -> float:
        return schedules.staircase(step, steps=64_000, peak=0.1, warm_up=400 / 64_000, drops=(0.5, 0.75))

    corners = [rate(step) for step in (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert corners == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_rate_on_a_plateau_falls_after_more_than_patience_epochs_without_a_better_one() -> None:
    def rate(*errors: float) -> float:
        return schedules.plateau(errors, peak=0.1, patience=2)

    assert rate() == 0.1
    assert rate(50, 40, 40, 40) == 0.1
    assert rate(50, 40, 40, 40, 40) == pytest.approx(0.01)
    assert rate(50, 40, 40, 40, 40, 39, 40, 40) == pytest.approx(0.01)
    assert rate(50, 40, 40, 40, 40, 39, 40, 40, 40) == pytest.approx(0.001)


def test_the_plateau_of_the_paper_s_recipes_is_as_long_as_the_readme_says(root: Path) -> None:
    patience = RECIPES["resnet50-imagenet-paper"].patience

    rates = [schedules.plateau([10.0] + [11.0] * epochs, peak=0.1, patience=patience) for epochs in range(8)]
    length = next(epochs for epochs, rate in enumerate(rates) if rate < 0.1)

    readme = (root / "training" / "README.md").read_text()
    assert f"÷10 on a plateau of {length} epochs" in readme
    assert f"{length} epochs in a row without a new lowest validation error" in readme


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 5))
def test_a_plateau_s_rate_never_rises(errors: list[float], patience: int) -> None:
    rates = [schedules.plateau(errors[:n], peak=0.1, patience=patience) for n in range(len(errors) + 1)]

    assert rates == sorted(rates, reverse=True)


def test_crops_grow_from_the_first_size_to_the_last() -> None:
    sizes = [schedules.crop_size(epoch, epochs=40, first=160, last=224) for epoch in range(40)]

    assert sizes[:29] == [160] * 29
    assert sizes[36:] == [224] * 4
    assert sizes == sorted(sizes)
    assert set(sizes) == {160, 192, 224}


@given(epoch=st.integers(0, 99), last=st.sampled_from([32, 192, 224]))
def test_crops_of_one_size_stay_so(epoch: int, last: int) -> None:
    assert schedules.crop_size(epoch, epochs=100, first=last, last=last) == last


@pytest.mark.parametrize(("first", "last"), [(160, 176), (128, 185), (161, 192)])
def test_the_last_tenth_has_the_last_crop_also_where_that_is_no_number_of_steps_away(first: int, last: int) -> None:
    sizes = [schedules.crop_size(epoch, epochs=40, first=first, last=last) for epoch in range(40)]

    assert sizes[0] == first
    assert sizes[36:] == [last] * 4
    assert max(sizes) == last


def test_an_average_forgets_the_weights_that_it_began_with_also_in_a_short_run() -> None:
    kept = 1.0
    for updates in range(1, 300):
        kept *= schedules.ema_decay(updates, decay=0.999)

    assert kept < 1e-6
    assert schedules.ema_decay(10**5, decay=0.999) == 0.999


def test_any_new_lowest_error_is_one() -> None:
    """Of 50,000 images one fewer is a step of 0.002 %, less than what torch overlooks unless it is told."""
    assert schedules.plateau([25.0, *[24.998] * 6], peak=0.1, patience=5) == 0.1
    assert schedules.plateau([25.0, *[25.0] * 6], peak=0.1, patience=5) == pytest.approx(0.01)
