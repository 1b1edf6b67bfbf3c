"""Finding the thresholds of the `calibrated` stop rule, and what is guaranteed about them. Pure functions of arrays.

The images are split at random. On one part, `search` finds the order of the views and a sequence of thresholds, from
the most careful to the boldest. On the other part, `certify` takes the boldest that can be trusted.

Search. As in "Quit When You Can" (Wang, Gupta and You, 2018, https://arxiv.org/abs/1806.11202), order and thresholds
are found for the lowest expected cost under a budget of disagreements with the whole ensemble. Its greedy criterion,
cost per image that can leave within the budget, counts a handful of disagreements; on CIFAR-10 it chose orders that
cost 34 % more than the following (11.9 instead of 8.9 % of all views at 0.5 % disagreement). The order is that of
kernel herding (Chen, Welling and Smola, 2010, https://arxiv.org/abs/1203.3472): the next view is the one with which the
mean so far comes nearest to the mean of all views, for its cost. So members and parts of the picture alternate by
themselves. The cheapest first is tried, too. Thresholds minimise cost + price * disagreements, where a disagreement's
probability is fitted as a function of the lead instead of counted; falling prices give the sequence.

Guarantee. For each row of thresholds, the hypothesis "on more than the share `disagreement` of such images the label is
not that of all views" is tested with the exact binomial tail (Clopper and Pearson, 1934) at level 1 - confidence, in
the order of the sequence, until one can't be rejected. Testing in a fixed order that does not depend on the images of
the test keeps the probability of any false rejection below that level, however many are tested: Learn then Test
(Angelopoulos, Bates, Candes, Jordan and Lei, 2021, https://arxiv.org/abs/2110.01052, fixed sequence testing). It was
chosen over a bound for one preselected rule, which needs a guess at how bold that may be, and over Bonferroni's
correction, which pays for every candidate: the rows are nested, so they are safe up to some point and not after it.

So: with probability `confidence` over the images drawn for the test, the rule that is returned gives another label than
the whole ensemble for at most the share `disagreement` of images that are drawn independently from the same source, run
on the same engines. It says nothing about single images, about images of another source, or about the true label.

Drafts. If some images are decoded smaller (server/images.py), the rule sees views of these, and what it answers is
compared with the label that all views of the image decoded whole have: one certificate covers thresholds and drafts.
A proof is then one about the draft, so the first row can disagree, too, and is tested before the others; if it fails,
nothing on drafts is certified. A row passes only if its hypothesis is rejected for all images and also for those alone
that were made smaller, each at level 1 - confidence. Wherever a row should not pass, one of these two hypotheses is
true, and rejecting that one is as improbable as before, so nothing has to be corrected (an intersection-union test:
Berger, 1982). Without the second, small pictures, which no draft changes, would vouch for drafts. So the promise holds
for the images of the source and for those among them that are made smaller; not for a source with larger ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.server.stopping import equal_weights, guard, lead, margin

# Of the images; the others certify. On CIFAR-10 (5,000 images, 0.5 % disagreement, mean of eight splits) shares of 0.2,
# 1/3, 0.4 and 0.5 cost 10.3, 9.3, 9.1 and 9.9 % of all views, at 0.2 % disagreement 11.9, 10.4, 10.8 and 11.7 %.
SEARCH_SHARE = 1 / 3
# Prices of a disagreement in the seconds of a whole plan: from one at which nothing is risked to one at which it is
# cheaper than the next view.
_PRICES = np.geomspace(1e5, 0.1, 200)
_SWEEPS = 4
_GRID = 1_000_000  # thresholds are multiples of its inverse
# Added to a lead and to what it lacks to 1, so that their logarithms are finite.
_SOFTENING = 1e-4
# Images. Sums of doubles of all of ImageNet's 50,000, of two members, would take 0.8 GB, and what is made of them more.
_WALKED_AT_ONCE = 1000


class TooFewImages(Exception):
    """The images can't show what was asked, whatever they are; the message says how many could."""


@dataclass(frozen=True)
class Drafts:
    """Which images were decoded smaller, (images,), and the labels that all views have when everything is whole."""

    drafted: NDArray[np.bool_]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What every view of a plan gave for some images.

    - vectors: float32 (images, steps, classes), softmax vectors in any fixed order of the plan's views
    - members: int64 (steps,), which member each is of
    - seconds: float64 (steps,), the cost of one
    - drafts: if the views are of drafts
    """

    vectors: NDArray[np.float32]
    members: NDArray[np.int64]
    seconds: NDArray[np.float64]
    drafts: Drafts | None = None

    def of(self, images: NDArray[np.int64]) -> "Answers":
        """Of some of the images."""
        drafts = self.drafts and Drafts(self.drafts.drafted[images], self.drafts.labels[images])
        return Answers(self.vectors[images], self.members, self.seconds, drafts)


@dataclass(frozen=True)
class Walks:
    """What a stop rule can see of images that follow a plan to its end.

    - checkpoints: (checkpoints,), and planned: numbers of views
    - leads: (images, checkpoints); labels: of the sums there
    - proven: (images,), after how many views the winner is proven; proven_labels: that winner
    - seconds: (planned + 1,), of so many views
    - drafts: if the views are of drafts, and so the proofs
    """

    checkpoints: tuple[int, ...]
    leads: NDArray[np.float64]
    labels: NDArray[np.int64]
    proven: NDArray[np.int64]
    proven_labels: NDArray[np.int64]
    seconds: NDArray[np.float64]
    drafts: Drafts | None = None

    @property
    def expected(self) -> NDArray[np.int64]:
        """The labels that answers are compared with, (images,): of all views, of the image decoded whole."""
        return self.drafts.labels if self.drafts else self.proven_labels

    @property
    def disagreements(self) -> NDArray[np.bool_]:
        """Whether an answer at a checkpoint is not the one of all views: (images, checkpoints).

        Of the same views, also where they are of drafts: what drafts change, no threshold can.
        """
        different: NDArray[np.bool_] = self.labels != self.proven_labels[:, None]
        return different


@dataclass(frozen=True)
class Stops:
    """Where images stop under a rule: the views of each, (images,), its label, its seconds."""

    views: NDArray[np.int64]
    labels: NDArray[np.int64]
    seconds: NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """An order of the views, and thresholds for it.

    - order: (steps,), a permutation
    - thresholds: (candidates, checkpoints), each row nowhere above the one before; infinity: never here. The first
      row never stops before the proof.
    """

    order: NDArray[np.int64]
    checkpoints: tuple[int, ...]
    thresholds: NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """What was shown on images that the search has not seen.

    - chosen: which candidate
    - images: how many; disagreements: on how many of them the label was another
    - drafted, drafted_disagreements: the same of those that were decoded smaller
    """

    chosen: int
    images: int
    disagreements: int
    drafted: int = 0
    drafted_disagreements: int = 0


def default_checkpoints(planned: int) -> tuple[int, ...]:
    """After 1, 2, 4, 8, ... views: each time after as many as all before, so batches grow as images get harder.

    On CIFAR-10 these cost less than checkpoints after every view (8.9 and 9.6 %), which have more to overfit.
    """
    return tuple(2**i for i in range(max(0, (planned - 1).bit_length())))


def walk(answers: Answers, order: NDArray[np.int64], checkpoints: Sequence[int]) -> Walks:
    """Follow a plan to its end, adding up as the scheduler does."""
    blocks = [
        _walk(answers.vectors[first : first + _WALKED_AT_ONCE], answers.members, order, checkpoints)
        for first in range(0, len(answers.vectors), _WALKED_AT_ONCE)
    ]
    leads, labels, proven, proven_labels = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    seconds = np.concatenate([[0.0], np.cumsum(answers.seconds[order])])
    return Walks(tuple(checkpoints), leads, labels, proven, proven_labels, seconds, answers.drafts)


def _walk(
    vectors: NDArray[np.float32], members: NDArray[np.int64], order: NDArray[np.int64], checkpoints: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Leads, labels, proven, proven labels of some images, as Walks has them."""
    images, planned, classes = vectors.shape
    weights = equal_weights(planned)
    sums = np.zeros((images, int(members.max()) + 1, classes))
    views = np.zeros(sums.shape[1], np.int64)
    proven = np.full(images, planned)
    leads = np.empty((images, len(checkpoints)))
    labels = np.empty((images, len(checkpoints)), np.int64)
    for done, step in enumerate(order, start=1):
        sums[:, members[step]] += vectors[:, step]
        views[members[step]] += 1
        if 2 * done >= planned:  # not before: each view adds at most 1 to a margin
            total = sums.sum(axis=1)
            proven[(proven == planned) & (margin(total) > guard(weights, done))] = done
        if done in checkpoints:
            column = checkpoints.index(done)
            leads[:, column] = lead(sums, views)
            labels[:, column] = sums.sum(axis=1).argmax(axis=1)
    return leads, labels, proven, sums.sum(axis=1).argmax(axis=1)


def follow(walks: Walks, thresholds: NDArray[np.float64]) -> Stops:
    """Where the rule `calibrated` with these thresholds stops each image."""
    views, labels = walks.proven.copy(), walks.proven_labels.copy()
    for column in reversed(range(len(walks.checkpoints))):
        fires = (walks.leads[:, column] >= thresholds[column]) & (walks.proven > walks.checkpoints[column])
        views[fires] = walks.checkpoints[column]
        labels[fires] = walks.labels[fires, column]
    return Stops(views, labels, walks.seconds[views])


def means(answers: Answers, order: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float64]:
    """The answers of images that stop after so many views of the plan: float64 (images, classes)."""
    sums = np.zeros((len(views), answers.vectors.shape[2]))
    for done, step in enumerate(order):
        going = views > done
        sums[going] += answers.vectors[going, step]
    return sums / views[:, None]


def search(answers: Answers, disagreement: float) -> Candidates:
    """The order and the sequence of thresholds with the lowest cost at this share of disagreements."""
    checkpoints = default_checkpoints(answers.vectors.shape[1])
    found: list[tuple[float, int, Candidates]] = []
    for order in (herded(answers), cheapest_first(answers.seconds)):
        walks = walk(answers, order, checkpoints)
        thresholds = careful_to_bold(walks)
        found.append((_cost(walks, thresholds, disagreement), len(found), Candidates(order, checkpoints, thresholds)))
    return min(found)[-1]


def cheapest_first(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """As plan.cheapest_first: the order of `exact`."""
    return np.argsort(seconds, kind="stable")


def herded(answers: Answers) -> NDArray[np.int64]:
    """Next is always the view with the smallest (distance of the mean so far to the mean of all)^2 * seconds so far.

    For independent views that product would stay the same, so neither cheap nor precise views are favoured as such.
    """
    planned = len(answers.seconds)
    products = np.zeros((planned, planned))  # of deviations from the mean over views, summed over images and classes
    for vectors in answers.vectors:
        deviations = vectors - vectors.mean(axis=0, dtype=np.float64)
        products += deviations @ deviations.T
    order: list[int] = []
    left = list(range(planned))
    seconds = squared = 0.0
    while left:
        costs = seconds + answers.seconds[left]
        distances = squared + 2 * products[np.ix_(left, order)].sum(axis=1) + products[left, left]
        best = int((costs * distances).argmin())
        seconds, squared = float(costs[best]), float(distances[best])
        order.append(left.pop(best))
    return np.array(order)


def careful_to_bold(walks: Walks) -> NDArray[np.float64]:
    """Thresholds (candidates, checkpoints) for falling prices of a disagreement, by coordinate descent."""
    risks = np.stack([_risk(walks, column) for column in range(len(walks.checkpoints))], axis=1)
    columns = np.minimum(walks.proven[:, None], walks.checkpoints)
    seconds = walks.seconds[columns]  # (images, checkpoints), if stopped there or proven before
    thresholds = np.full(len(walks.checkpoints), np.inf)
    rows = [thresholds.copy()]
    for price in _PRICES * walks.seconds[-1]:
        losses = seconds + price * risks
        for _ in range(_SWEEPS):
            before = thresholds.copy()
            for column in reversed(range(len(thresholds))):
                better = _threshold(walks, thresholds, losses, column)
                thresholds[column] = min(thresholds[column], better)
            if (thresholds == before).all():
                break
        if (thresholds < rows[-1]).any():
            rows.append(thresholds.copy())
    return np.array(rows)


def _threshold(walks: Walks, thresholds: NDArray[np.float64], losses: NDArray[np.float64], column: int) -> float:
    """The best threshold of one checkpoint, the others kept."""
    reached = (walks.leads[:, :column] < thresholds[:column]).all(axis=1)
    reached &= walks.proven > walks.checkpoints[column]
    continued = walks.seconds[walks.proven]
    for later in reversed(range(column + 1, len(thresholds))):
        fires = walks.leads[:, later] >= thresholds[later]
        continued = np.where(fires, losses[:, later], continued)
    gains = (continued - losses[:, column])[reached]
    leads = walks.leads[reached, column]
    order = np.argsort(-leads, kind="stable")
    total = np.cumsum(gains[order])
    if not len(total) or total.max() <= 0:
        return math.inf
    lowest = float(leads[order[total.argmax()]])
    return math.floor(lowest * _GRID) / _GRID


def _risk(walks: Walks, column: int) -> NDArray[np.float64]:
    """The probability of a disagreement at a checkpoint by the lead: a logistic curve, with Platt's targets.

    https://en.wikipedia.org/wiki/Platt_scaling: no target is 0 or 1, so the curve is finite where no image disagrees.
    """
    open_images = walks.proven > walks.checkpoints[column]
    risks = np.zeros(len(open_images))
    wrong = walks.disagreements[open_images, column]
    if not len(wrong):
        return risks
    sure = np.clip(walks.leads[open_images, column], 0, 1)
    x = np.stack([np.ones(len(sure)), np.log((sure + _SOFTENING) / (1 - sure + _SOFTENING))], axis=1)
    targets = np.where(wrong, 1 - 1 / (wrong.sum() + 2), 1 / ((~wrong).sum() + 2))
    weights = np.zeros(2)
    for _ in range(50):  # Newton's method; the ridge keeps a constant lead from being singular
        fitted = _sigmoid(x @ weights)
        gradient = x.T @ (fitted - targets) + 1e-6 * weights
        curvature = (x * (fitted * (1 - fitted))[:, None]).T @ x + 1e-6 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    weights[1] = min(weights[1], 0.0)  # a larger lead is never more risk
    risks[open_images] = _sigmoid(x @ weights)
    return risks


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(x, -500, 500)))
    return result


def _cost(walks: Walks, thresholds: NDArray[np.float64], disagreement: float) -> float:
    """Mean seconds of the boldest thresholds with so many disagreements on these images."""
    cost = math.inf
    for row in thresholds:
        stops = follow(walks, row)
        if (stops.labels != walks.expected).mean() > disagreement:
            break
        cost = float(stops.seconds.mean())
    return cost


def certify(
    walks: Walks, thresholds: NDArray[np.float64], disagreement: float, confidence: float
) -> Certificate | None:
    """The last of the thresholds, tested in their order, of which the guarantee holds; see the module's docstring.

    Without drafts the first row is not tested: it stops at proofs only and can't disagree. With them, None is answered
    where not even that row passes.
    """
    images = len(walks.proven)
    every = np.ones(images, np.bool_)
    drafted = walks.drafts.drafted if walks.drafts else ~every
    tested = (every, drafted) if walks.drafts else (every,)
    chosen = None if walks.drafts else Certificate(0, images, 0)
    for row in range(0 if walks.drafts else 1, len(thresholds)):
        wrong = follow(walks, thresholds[row]).labels != walks.expected
        tails = [binomial_tail(int(wrong[some].sum()), int(some.sum()), disagreement) for some in tested]
        if max(tails) > 1 - confidence:
            break
        chosen = Certificate(row, images, int(wrong.sum()), int(drafted.sum()), int(wrong[drafted].sum()))
    return chosen


def split(images: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images search, and which certify."""
    order = np.random.default_rng(seed).permutation(images)
    searching = images - certifying_images(images)
    return order[:searching], order[searching:]


def certifying_needed(disagreement: float, confidence: float) -> int:
    """Of so many images that certify, no disagreement shows what is asked: (1 - disagreement)^m <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-disagreement))


def images_needed(disagreement: float, confidence: float) -> int:
    """With so many images, split as above, no disagreement shows what is asked."""
    certifying = certifying_needed(disagreement, confidence)
    images = math.ceil(certifying / (1 - SEARCH_SHARE)) - 1
    while certifying_images(images) < certifying:
        images += 1
    return images


def smallest_disagreement(images: int, confidence: float) -> float:
    """What so many images, split as above, can show if not one disagrees."""
    return -math.expm1(math.log(1 - confidence) / certifying_images(images))


def certifying_images(images: int) -> int:
    """How many of so many images certify."""
    return images - int(SEARCH_SHARE * images)


def binomial_tail(wrong: int, images: int, share: float) -> float:
    """The probability of at most `wrong` of so many images if each is wrong with probability `share`, within (0, 1)."""
    k = np.arange(wrong)
    ratios = np.log(images - k) - np.log(k + 1) + math.log(share) - math.log1p(-share)
    logarithms = images * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(1.0, float(np.exp(logarithms).sum()))
