import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resnet_ensemble.server import temperature

MEANS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(2, 6)),
    elements=st.one_of(st.floats(-0.0078, 1), st.sampled_from([0.0, 0.5, 0.5 + 2**-53, 1.0])),
).filter(lambda rows: bool((rows.max(axis=-1) > 0).all()))


@given(MEANS, st.floats(0.05, 20))
def test_no_temperature_changes_a_label(means: np.ndarray, value: float) -> None:
    result = temperature.apply(means, value)

    assert result.argmax(axis=-1).tolist() == means.argmax(axis=-1).tolist()
    np.testing.assert_allclose(result.sum(axis=-1), 1)
    assert (result >= 0).all()


def test_a_largest_probability_that_is_next_to_nothing_does_not_overflow() -> None:
    assert temperature.apply(np.array([5e-324, -0.005]), 1.0).tolist() == [1.0, 0.0]


def test_a_difference_that_rounding_would_lose_stays() -> None:
    means = np.array([0.5, np.nextafter(0.5, 1)])

    assert temperature.apply(means, 20.0).argmax() == 1


def test_a_high_temperature_softens_and_a_low_one_sharpens() -> None:
    means = np.array([0.6, 0.3, 0.1])

    np.testing.assert_allclose(temperature.apply(means, 1.0), means)
    np.testing.assert_allclose(temperature.apply(means, 0.5), means**2 / (means**2).sum())
    assert temperature.apply(means, 2.0)[0] < 0.6


def drawn(images: int, value: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sharp by a temperature, and labels from the right ones."""
    random = np.random.default_rng(0)
    right = random.dirichlet(np.full(5, 0.5), images)
    labels = (right.cumsum(axis=1) > random.random((images, 1))).argmax(axis=1)
    return temperature.apply(right, 1 / value), labels


@pytest.mark.parametrize("value", [0.7, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(value: float) -> None:
    probabilities, labels = drawn(20_000, value)

    found = temperature.fit(probabilities, labels)

    assert found == pytest.approx(value, rel=0.05)
    losses = [temperature.loss(temperature.apply(probabilities, t), labels) for t in (found, found / 1.1, found * 1.1)]
    assert losses[0] == min(losses)


def test_the_calibration_error_falls_to_that_of_chance() -> None:
    probabilities, labels = drawn(20_000, 2.5)

    found = temperature.apply(probabilities, temperature.fit(probabilities, labels))

    assert temperature.calibration_error(probabilities, labels) > 0.1
    assert temperature.calibration_error(found, labels) < 0.015


def test_an_image_has_no_say_in_its_own_temperature() -> None:
    probabilities, labels = drawn(50, 2.5)
    changed = labels.copy()
    changed[7] = (labels[7] + 1) % 5

    before, after = temperature.held_out(probabilities, labels), temperature.held_out(probabilities, changed)

    same_fold = np.arange(50) % temperature.FOLDS == 7 % temperature.FOLDS
    np.testing.assert_array_equal(before[same_fold], after[same_fold])
    assert (before[~same_fold] != after[~same_fold]).any()
    others = temperature.fit(probabilities[~same_fold], labels[~same_fold])
    np.testing.assert_array_equal(before[7], temperature.apply(probabilities[7], others))


def test_labels_that_are_all_right_or_impossible_give_the_ends_of_the_range() -> None:
    sure = np.array([[0.9, 0.1], [0.8, 0.2]])

    assert temperature.fit(sure, np.array([0, 0])) == pytest.approx(0.05)
    assert temperature.fit(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(20.0)


def test_the_calibration_error_is_the_mean_distance_of_bins() -> None:
    """Two in a bin at 0.9, one of them right; one at 0.6, right; one at 1.0, in the last bin."""
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [1.0, 0.0]])
    labels = np.array([0, 0, 0, 0])

    assert temperature.calibration_error(probabilities, labels) == pytest.approx((0.8 + 0.4 + 0.0) / 4)


def test_the_loss_is_the_mean_logarithm_of_the_labels() -> None:
    assert temperature.loss(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 0])) == pytest.approx(1.5 * np.log(2))
