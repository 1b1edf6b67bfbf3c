"""What is guaranteed about `calibrated`, on simulated images whose true rates are known."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_ensemble.server import thresholds
from resnet_ensemble.server.stopping import Calibrated, Exact, StopRule
from resnet_ensemble.server.thresholds import Answers, Drafts, Walks

NEVER = math.inf


def simulated(images: int, seed: int, members: int = 2, views: int = 5, classes: int = 6) -> Answers:
    """Images from easy to hard; members that are wrong in ways of their own; views that differ a little."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 0.8, (images, members, views, classes))
    logits += random.normal(0, 1.0, (images, members, 1, classes))
    logits[..., 0] += 1 + 4 * np.abs(random.normal(size=(images, 1, 1)))
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    vectors = (exponents / exponents.sum(axis=-1, keepdims=True)).astype(np.float32)
    order = np.repeat(np.arange(members), views)
    return Answers(vectors.reshape(images, members * views, classes), order, 1.0 + order)


def sampled(walks: Walks, images: np.ndarray) -> Walks:
    return Walks(
        walks.checkpoints,
        walks.leads[images],
        walks.labels[images],
        walks.proven[images],
        walks.proven_labels[images],
        walks.seconds,
        walks.drafts and Drafts(walks.drafts.drafted[images], walks.drafts.labels[images]),
    )


def with_drafts(walks: Walks, drafted: np.ndarray, changed: np.ndarray) -> Walks:
    """The walks are of drafts where `drafted`, and the whole picture has another label where `changed`."""
    return replace(walks, drafts=Drafts(drafted, np.where(changed, walks.proven_labels + 1, walks.proven_labels)))


def followed(rule: StopRule, answers: Answers, order: np.ndarray, image: int) -> tuple[int, int]:
    """Views and label, as a scheduler that only knows `needed` would come to them."""
    planned = len(order)
    sums, views = np.zeros((answers.members.max() + 1, answers.vectors.shape[2])), np.zeros(2, np.int64)
    while step := rule.needed(sums, views, planned):
        for place in order[views.sum() : views.sum() + step]:
            sums[answers.members[place]] += answers.vectors[image, place]
            views[answers.members[place]] += 1
    return int(views.sum()), int(sums.sum(axis=0).argmax())


THRESHOLDS = st.lists(st.one_of(st.floats(-0.1, 1.1), st.just(NEVER)), min_size=4, max_size=4)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.permutations(range(10)), THRESHOLDS)
def test_the_search_stops_images_where_the_rule_does(seed: int, order: list[int], values: list[float]) -> None:
    answers, places = simulated(12, seed), np.array(order)
    walks = thresholds.walk(answers, places, (1, 2, 4, 8))

    stops = thresholds.follow(walks, np.array(values))

    rule = Calibrated((1, 2, 4, 8), tuple(values))
    assert [followed(rule, answers, places, image) for image in range(12)] == list(
        zip(stops.views.tolist(), stops.labels.tolist(), strict=True)
    )
    np.testing.assert_allclose(stops.seconds, [answers.seconds[places[:views]].sum() for views in stops.views])


@given(st.integers(0, 10**6), THRESHOLDS, THRESHOLDS)
def test_with_lower_thresholds_no_image_takes_more_views(seed: int, some: list[float], others: list[float]) -> None:
    walks = thresholds.walk(simulated(20, seed), np.arange(10), (1, 2, 4, 8))

    higher = thresholds.follow(walks, np.maximum(some, others))
    lower = thresholds.follow(walks, np.minimum(some, others))

    assert (lower.views <= higher.views).all()
    assert (lower.seconds <= higher.seconds).all()


def test_thresholds_that_are_never_reached_are_the_exact_rule() -> None:
    answers, order = simulated(60, seed=3), np.arange(10)[::-1]
    walks = thresholds.walk(answers, order, (1, 2, 4, 8))

    stops = thresholds.follow(walks, np.full(4, NEVER))

    assert stops.views.tolist() == [followed(Exact(), answers, order, image)[0] for image in range(60)]
    assert stops.labels.tolist() == answers.vectors.sum(axis=1, dtype=np.float64).argmax(axis=1).tolist()
    assert stops.views.min() < 10  # so that there is something to compare


@cache
def population() -> tuple[Walks, np.ndarray]:
    """20,000 images, which stand for all there are, and candidates that were found on 400 others."""
    found = thresholds.search(simulated(400, seed=1), disagreement=0.03)
    return thresholds.walk(simulated(20_000, seed=2), found.order, found.checkpoints), found.thresholds


def disagreement(walks: Walks, row: np.ndarray) -> float:
    return float((thresholds.follow(walks, row).labels != walks.proven_labels).mean())


def test_the_guarantee_holds_as_often_as_it_says() -> None:
    """Of 250 calibrations at confidence 0.9, a tenth at most, give or take 3 sd, are beyond the promise."""
    walks, rows = population()
    rows = rows[::5]
    differs = np.array([thresholds.follow(walks, row).labels != walks.proven_labels for row in rows])
    true_shares = differs.mean(axis=1)
    random = np.random.default_rng(0)
    promised, broken, tempted = 0.03, 0, 0
    assert true_shares.max() > 2 * promised  # it can be broken
    for _ in range(250):
        drawn = random.integers(0, 20_000, 300)
        broken += true_shares[thresholds.certify(sampled(walks, drawn), rows, promised, 0.9).chosen] > promised
        tempted += true_shares[np.flatnonzero(differs[:, drawn].mean(axis=1) <= promised)[-1]] > promised

    allowed = 25 + 3 * math.sqrt(250 * 0.1 * 0.9)
    assert broken <= allowed
    assert tempted > allowed  # taking the boldest that looks good enough does not have the guarantee


def test_what_is_certified_is_worth_having() -> None:
    walks, rows = population()
    drawn = sampled(walks, np.random.default_rng(1).integers(0, 20_000, 4000))

    certificate = thresholds.certify(drawn, rows, 0.03, 0.95)

    assert certificate.images == 4000
    assert certificate.disagreements == round(4000 * disagreement(drawn, rows[certificate.chosen]))
    assert 0.01 < disagreement(walks, rows[certificate.chosen]) <= 0.03
    cost = thresholds.follow(walks, rows[certificate.chosen]).seconds.mean()
    assert cost < 0.6 * thresholds.follow(walks, rows[0]).seconds.mean()


@pytest.mark.parametrize(("share", "level"), [(1e-9, 0.95), (0.03, 1 - 1e-15)])
def test_where_nothing_can_be_shown_nothing_but_proofs_stop_an_image(share: float, level: float) -> None:
    walks, rows = population()

    certificate = thresholds.certify(sampled(walks, np.arange(300)), rows, share, level)

    assert (certificate.chosen, certificate.disagreements) == (0, 0)
    assert np.isinf(rows[0]).all()


def test_what_drafts_change_counts_as_what_thresholds_do() -> None:
    walks, rows = population()
    drawn = sampled(walks, np.arange(3000))
    every, changed = np.ones(3000, bool), np.arange(3000) % 100 == 0

    alone = thresholds.certify(with_drafts(drawn, every, changed), rows[:1], 0.03, 0.95)
    both = thresholds.certify(with_drafts(drawn, every, changed), rows, 0.03, 0.95)

    assert alone == thresholds.Certificate(0, 3000, 30, drafted=3000, drafted_disagreements=30)
    assert both is not None
    assert both.disagreements > 30
    assert both.chosen < thresholds.certify(drawn, rows, 0.03, 0.95).chosen


def test_drafts_that_change_nothing_cost_nothing() -> None:
    walks, rows = population()
    drawn = sampled(walks, np.arange(3000))
    unchanged = with_drafts(drawn, np.ones(3000, bool), np.zeros(3000, bool))

    assert thresholds.certify(unchanged, rows, 0.03, 0.95).chosen == thresholds.certify(drawn, rows, 0.03, 0.95).chosen


def test_where_proofs_on_drafts_are_wrong_too_often_nothing_is_certified() -> None:
    walks, rows = population()
    drawn = with_drafts(sampled(walks, np.arange(3000)), np.ones(3000, bool), np.arange(3000) % 20 == 0)

    assert thresholds.certify(drawn, rows, 0.03, 0.95) is None


def test_images_that_no_draft_changes_do_not_vouch_for_drafts() -> None:
    walks, rows = population()
    drafted = np.arange(3000) % 10 == 0
    drawn = with_drafts(sampled(walks, np.arange(3000)), drafted, np.arange(3000) % 100 == 0)  # a tenth of the drafts

    assert thresholds.certify(drawn, rows[:1], 0.03, 0.95) is None
    assert thresholds.certify(drawn, rows[:1], 0.15, 0.95) == thresholds.Certificate(0, 3000, 30, 300, 30)


def test_without_any_draft_there_is_no_certificate_of_drafts() -> None:
    walks, rows = population()
    none = np.zeros(3000, bool)

    assert thresholds.certify(with_drafts(sampled(walks, np.arange(3000)), none, none), rows, 0.03, 0.95) is None


def test_the_guarantee_holds_for_drafts_as_often_as_it_says() -> None:
    """As above: broken where either all images or the drafted ones alone are beyond the promise."""
    walks, rows = population()
    rows = rows[::5]
    random = np.random.default_rng(0)
    drafted = random.random(20_000) < 0.5
    walks = with_drafts(walks, drafted, drafted & (random.random(20_000) < 0.01))
    differs = np.array([thresholds.follow(walks, row).labels != walks.expected for row in rows])
    worse = np.maximum(differs.mean(axis=1), differs[:, drafted].mean(axis=1))
    promised, broken, given = 0.03, 0, 0
    for _ in range(250):
        certificate = thresholds.certify(sampled(walks, random.integers(0, 20_000, 600)), rows, promised, 0.9)
        given += certificate is not None
        broken += certificate is not None and worse[certificate.chosen] > promised

    assert broken <= 25 + 3 * math.sqrt(250 * 0.1 * 0.9)
    assert given > 200


def test_some_of_the_images_keep_what_they_are_compared_with() -> None:
    answers = simulated(6, seed=0)
    drafts = Drafts(np.arange(6) % 2 == 0, np.arange(6))

    some = replace(answers, drafts=drafts).of(np.array([4, 1]))

    walks = thresholds.walk(some, np.arange(10), (1, 2))
    assert walks.drafts is not None
    assert walks.drafts.drafted.tolist() == [True, False]
    assert walks.expected.tolist() == [4, 1]
    alone = thresholds.walk(answers, np.arange(10), (1, 2))
    assert (alone.expected == alone.proven_labels).all()


def test_more_disagreement_never_makes_the_rule_more_careful() -> None:
    walks, rows = population()
    drawn = sampled(walks, np.arange(3000))

    chosen = [thresholds.certify(drawn, rows, share, 0.95).chosen for share in (0.001, 0.003, 0.01, 0.03, 0.1)]

    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_candidates_go_from_careful_to_bold() -> None:
    walks, rows = population()

    costs = [thresholds.follow(walks, row).seconds.mean() for row in rows]

    assert (rows[1:] <= rows[:-1]).all()
    assert costs == sorted(costs, reverse=True)
    assert len(rows) > 20  # steps small enough that a little less than what is asked can be had


def test_the_order_takes_what_members_disagree_about_before_more_of_the_same() -> None:
    answers = simulated(300, seed=5)

    order = thresholds.herded(answers)

    assert sorted(order) == list(range(10))
    assert set(answers.members[order[:2]]) == {0, 1}
    assert answers.members[order[0]] == 0  # the cheaper one


def test_the_order_that_is_found_costs_less_than_the_cheapest_first() -> None:
    answers = simulated(2000, seed=6)
    found = thresholds.search(answers.of(np.arange(1000)), 0.02)
    held_out = answers.of(np.arange(1000, 2000))

    def cost(order: np.ndarray, rows: np.ndarray) -> float:
        walks = thresholds.walk(held_out, order, found.checkpoints)
        chosen = thresholds.certify(walks, rows, 0.02, 0.95).chosen
        return float(thresholds.follow(walks, rows[chosen]).seconds.mean())

    in_order = np.arange(10)
    rows = thresholds.careful_to_bold(thresholds.walk(answers.of(in_order), in_order, found.checkpoints))
    assert cost(found.order, found.thresholds) < 0.9 * cost(in_order, rows)


def test_images_that_all_agree_are_no_problem_for_the_search() -> None:
    answers = simulated(50, seed=0)
    sure = Answers(np.zeros_like(answers.vectors), answers.members, answers.seconds)
    sure.vectors[..., 2] = 1

    found = thresholds.search(sure, 0.01)

    walks = thresholds.walk(sure, found.order, found.checkpoints)
    assert set(thresholds.follow(walks, found.thresholds[-1]).views) == {1}


def test_means_are_of_the_first_views_of_the_plan() -> None:
    answers, order = simulated(3, seed=0), np.array([9, 0, 1, 2, 3, 4, 5, 6, 7, 8])

    found = thresholds.means(answers, order, np.array([1, 2, 10]))

    np.testing.assert_allclose(found[0], answers.vectors[0, 9])
    np.testing.assert_allclose(found[1], answers.vectors[1, [9, 0]].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found[2], answers.vectors[2].mean(axis=0), rtol=1e-6)


@given(st.floats(1e-4, 0.5), st.floats(0.5, 0.9999))
def test_as_many_images_as_are_asked_for_are_enough_and_one_less_is_not(share: float, level: float) -> None:
    needed = thresholds.images_needed(share, level)

    def shows(images: int) -> bool:
        return (1 - share) ** thresholds.certifying_images(images) <= (1 - level) * (1 + 1e-9)

    assert shows(needed)
    assert needed == 1 or not (1 - share) ** thresholds.certifying_images(needed - 1) < (1 - level) * (1 - 1e-9)


def test_what_so_many_images_can_show_is_what_they_are_asked_for() -> None:
    for images in (10, 897, 5000):
        share = thresholds.smallest_disagreement(images, 0.95)

        assert thresholds.images_needed(share * 1.0001, 0.95) <= images < thresholds.images_needed(share * 0.99, 0.95)


@pytest.mark.parametrize(("wrong", "images", "share"), [(0, 30, 0.1), (3, 50, 0.02), (8, 3334, 0.005), (50, 50, 0.5)])
def test_the_binomial_tail_is_the_sum_of_its_terms(wrong: int, images: int, share: float) -> None:
    terms = (math.comb(images, k) * share**k * (1 - share) ** (images - k) for k in range(wrong + 1))

    assert thresholds.binomial_tail(wrong, images, share) == pytest.approx(math.fsum(terms), rel=1e-9)


def test_no_image_both_searches_and_certifies() -> None:
    searching, certifying = thresholds.split(1000, seed=4)

    assert sorted([*searching, *certifying]) == list(range(1000))
    assert len(certifying) == thresholds.certifying_images(1000) == 667
    assert list(searching) != sorted(searching)
