"""The stop rules are right for every input that an engine may give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resnet_ensemble.server.stopping import RULES, SLACK, Calibrated, decided, equal_weights, lead, steps_until_decided

# Values that make ties, sure votes and the worst that an engine may answer likely.
PROBABILITY = st.one_of(
    st.floats(-SLACK, 1 + SLACK, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0, -SLACK, 1 + SLACK])
)
WEIGHT = st.one_of(st.just(1.0), st.floats(0, 10), st.sampled_from([0.0, 0.5, 2.0]))


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 (N, classes) in any order, and their weights (N,)."""
    count, classes = draw(st.integers(1, 14)), draw(st.integers(2, 7))
    if draw(st.booleans()):
        vectors = draw(hnp.arrays(np.float32, (count, classes), elements=PROBABILITY))
    else:  # softmax vectors, from unsure to nearly one-hot
        scale = draw(st.floats(0.1, 30))
        logits = scale * np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=(count, classes))
        logits[:, 0] += draw(st.floats(0, 30))  # the vectors agree more or less
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        vectors = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
    weights = np.array([draw(WEIGHT) for _ in range(count)]) if draw(st.booleans()) else np.ones(count)
    return vectors, weights


def partial_sums(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N + 1, classes): after 0, 1, ... N vectors."""
    weighted = weights[:, None] * vectors.astype(np.float64)
    return np.concatenate([np.zeros((1, vectors.shape[1])), np.cumsum(weighted, axis=0)])


def largest(sums: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-sums, kind="stable")[:count].tolist())


@settings(max_examples=400)
@given(ensembles(), st.integers(1, 6))
def test_what_is_decided_never_changes(ensemble: tuple[np.ndarray, np.ndarray], top: int) -> None:
    vectors, weights = ensemble
    sums = partial_sums(vectors, weights)

    for done in range(len(sums)):
        if decided(sums[done], weights, done, top):
            assert largest(sums[done], top) == largest(sums[-1], top)


@given(ensembles())
def test_steps_are_never_too_many(ensemble: tuple[np.ndarray, np.ndarray]) -> None:
    """Following the steps, the rule fires exactly where it first could, if it were asked after every vector."""
    vectors, weights = ensemble
    sums = partial_sums(vectors, weights)
    first = next(done for done in range(len(sums)) if decided(sums[done], weights, done))

    done = 0
    while step := steps_until_decided(sums[done], weights, done):
        done += step

    assert done == first


@given(ensembles())
def test_a_step_is_never_zero_before_it_is_decided_and_never_beyond_the_end(
    ensemble: tuple[np.ndarray, np.ndarray],
) -> None:
    vectors, weights = ensemble
    sums = partial_sums(vectors, weights)

    for done in range(len(sums)):
        step = steps_until_decided(sums[done], weights, done)
        assert (step == 0) == decided(sums[done], weights, done)
        assert done + step <= len(weights)


def test_the_worst_vectors_that_are_allowed_can_not_overturn_a_decision() -> None:
    """An adversary who knows the decision gives the runner-up all, and a little more than all."""
    sums = np.zeros(3)
    for done in range(1, 41):
        sums = sums + [1.0, 0.0, 0.0]
        if decided(sums, np.ones(40), done):
            break
    remaining = 40 - done

    assert remaining == 19  # the first at which the rest is less than a half, and the guard is not wide
    assert (sums + remaining * np.array([-SLACK, 1 + SLACK, 0])).argmax() == 0


def test_one_view_less_than_the_guard_needs_is_not_enough() -> None:
    assert not decided(np.array([10.0, 0.0]), np.ones(20), 10)
    assert decided(np.array([11.0, 0.0]), np.ones(20), 11)
    assert not decided(np.array([11.0, 2.0 - 9 * 2 * SLACK]), np.ones(20), 11)  # exactly the guard


def test_sure_networks_stop_just_after_the_half() -> None:
    assert steps_until_decided(np.zeros(10), np.ones(20), 0) == 11
    assert steps_until_decided(np.array([10.9, 0.1]), np.ones(20), 11) == 0


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_known_by_its_name_and_ends_with_the_plan(name: str) -> None:
    sums, views = np.full((2, 5), 2.0), np.array([10, 10])

    assert RULES[name].name == name
    assert RULES[name].needed(sums, views, planned=20) == 0
    assert 0 < RULES[name].needed(np.zeros((2, 5)), np.array([0, 0]), planned=20) <= 20


def test_full_wants_all_and_exact_only_what_can_matter() -> None:
    sums, views = np.array([[9.9, 0.1], [1.0, 0.0]]), np.array([10, 1])

    assert RULES["full"].needed(sums, views, planned=20) == 9
    assert RULES["exact"].needed(sums, views, planned=20) == 0
    assert RULES["exact"].needed(0.8 * sums, views, planned=20) == 1
    assert equal_weights(20).sum() == 20


def test_the_calibrated_rule_looks_at_its_checkpoints_only() -> None:
    rule = Calibrated((2, 4), (0.8, 0.5))
    sure = np.array([[1.0, 0.0]])

    assert rule.name == "calibrated"
    assert rule.needed(0 * sure, np.array([0]), planned=20) == 2
    assert rule.needed(1 * sure, np.array([1]), planned=20) == 1
    assert rule.needed(2 * sure, np.array([2]), planned=20) == 0
    assert rule.needed(np.array([[1.7, 0.3]]), np.array([2]), planned=20) == 2
    assert rule.needed(np.array([[3.1, 0.9]]), np.array([4]), planned=20) == 0
    assert rule.needed(np.array([[2.9, 1.1]]), np.array([4]), planned=20) == RULES["exact"].needed(
        np.array([[2.9, 1.1]]), np.array([4]), planned=20
    )


def test_the_calibrated_rule_also_stops_where_the_class_is_proven() -> None:
    rule = Calibrated((8,), (2.0,))

    assert rule.needed(np.array([[6.0, 0.0]]), np.array([6]), planned=11) == 0
    assert rule.needed(np.array([[5.5, 0.5]]), np.array([6]), planned=11) == 1  # before the checkpoint


def test_in_the_lead_every_member_weighs_the_same() -> None:
    """Nine views of one member are for class 0 with 0.6, one of another for class 1 with 0.9."""
    sums = np.array([[5.4, 3.6], [0.1, 0.9]])

    assert lead(sums, np.array([9, 1])) == pytest.approx((0.6 - 0.4 + 0.1 - 0.9) / 2)  # the answer is class 0
    assert lead(np.array([[5.4, 3.6], [0.0, 0.0]]), np.array([9, 0])) == pytest.approx(0.2)
    many = np.stack([sums, sums[:, ::-1]])
    assert lead(many, np.array([9, 1])).tolist() == pytest.approx([-0.3, -0.3])
