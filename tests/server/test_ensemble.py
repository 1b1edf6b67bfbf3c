import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resnet_ensemble.server.ensemble import average, entropy, top, uncertainty

MEMBERS, CLASSES = 3, 5
SUMS = hnp.arrays(np.float64, (MEMBERS, CLASSES), elements=st.floats(0, 10))
VIEWS = hnp.arrays(np.int64, MEMBERS, elements=st.integers(1, 40))


def softmax(shape: tuple[int, ...], seed: int) -> np.ndarray:
    weights = np.exp(np.random.default_rng(seed).normal(size=shape))
    return weights / weights.sum(axis=-1, keepdims=True)


@given(seed=st.integers(0, 2**32), views=st.integers(1, 12))
def test_the_ensemble_is_the_mean_of_all_softmax_vectors(seed: int, views: int) -> None:
    vectors = softmax((MEMBERS, views, CLASSES), seed)

    mean = average(vectors.sum(axis=1), np.full(MEMBERS, views))

    np.testing.assert_allclose(mean.ensemble, vectors.mean(axis=(0, 1)))
    np.testing.assert_allclose(mean.members, vectors.mean(axis=1))
    np.testing.assert_allclose(mean.ensemble.sum(), 1)


@given(sums=SUMS, views=VIEWS)
def test_every_vector_has_the_same_weight_however_many_a_member_has(sums: np.ndarray, views: np.ndarray) -> None:
    mean = average(sums, views)

    np.testing.assert_allclose(mean.ensemble, (mean.members * views[:, None]).sum(axis=0) / views.sum(), atol=1e-12)


@given(sums=SUMS, views=VIEWS, order=st.permutations(range(MEMBERS)))
def test_the_order_of_members_does_not_matter(sums: np.ndarray, views: np.ndarray, order: list[int]) -> None:
    np.testing.assert_allclose(
        average(sums[order], views[order]).ensemble, average(sums, views).ensemble, rtol=1e-12, atol=1e-12
    )


@given(
    probabilities=hnp.arrays(
        np.float64, st.sampled_from((1, CLASSES, 250)), elements=st.sampled_from((0.0, 0.1, 0.5)) | st.floats(0, 1)
    ),
    count=st.integers(1, 300),
)
def test_top_is_sorted_and_of_equals_the_lower_index_comes_first(probabilities: np.ndarray, count: int) -> None:
    ranked = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))

    assert top(probabilities, count) == ranked[:count]


def test_a_member_that_has_seen_no_view_has_no_say() -> None:
    mean = average(np.array([[1.5, 0.5], [0.0, 0.0]]), np.array([2, 0]))

    assert mean.ensemble.tolist() == [0.75, 0.25]
    assert mean.members.tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert uncertainty(mean)[1] == 0


def test_entropy_is_0_for_the_sure_and_the_logarithm_for_the_undecided() -> None:
    np.testing.assert_allclose(entropy(np.array([[0, 1.0, 0, 0], [0.25] * 4])), [0, np.log(4)])


def test_entropy_of_what_rounding_left_a_little_outside_is_a_number() -> None:
    assert entropy(np.array([1 + 1e-7, -1e-9, 0.0])) == 0


@pytest.mark.parametrize(("members", "expected"), [([[1, 0], [0, 1]], np.log(2)), ([[0.5, 0.5], [0.5, 0.5]], 0)])
def test_mutual_information_is_disagreement_not_doubt(members: list[list[float]], expected: float) -> None:
    views = np.array([10, 10])

    assert uncertainty(average(10.0 * np.array(members), views))[1] == pytest.approx(expected)


@given(seed=st.integers(0, 2**32), views=hnp.arrays(np.int64, MEMBERS, elements=st.integers(0, 40)))
def test_mutual_information_is_between_0_and_the_entropy(seed: int, views: np.ndarray) -> None:
    views[0] += 1
    mean = average(softmax((MEMBERS, CLASSES), seed) * views[:, None], views)

    of_mean, mutual_information = uncertainty(mean)

    assert of_mean == entropy(mean.ensemble)
    assert 0 <= mutual_information <= of_mean
