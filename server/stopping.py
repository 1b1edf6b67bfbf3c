"""Stop rules: how many of an image's planned views must be run before its answer can be given. Pure functions.

A rule answers one question: given the sums so far, how many more views of the plan must be run, whatever they say,
before the rule could fire? 0 is "stop". So nothing is ever run on speculation: between two looks, only views that
every way of following the plan would run, and an image stops after exactly the first view after which its rule fires.
That number, and so the answer, depends neither on batches nor on load.

    full         all of them
    exact        until no remaining view can change the most probable class
    calibrated   as `exact`, and earlier where the lead reaches a threshold at one of a few declared checkpoints

Why `exact` is right. Let v_1 .. v_N be the softmax vectors in the plan's order, w_i >= 0 their weights, S_K the sum of
w_i v_i over i <= K, and R = w_{K+1} + ... + w_N. Let a be the class with the largest S_K, and b any other. Then

    S_N[a] - S_N[b] = S_K[a] - S_K[b] + sum over i > K of w_i (v_i[a] - v_i[b])

The scheduler refuses answers of engines that are not within [-SLACK, 1 + SLACK], so v_i[a] - v_i[b] >= -(1 + 2 SLACK):

    S_N[a] - S_N[b] >= S_K[a] - S_K[b] - (1 + 2 SLACK) R

If leader minus runner-up is more than (1 + 2 SLACK) R, the right side is positive for every b: a wins alone, and no
rule for ties matters. Floating point: v is float32, sums are float64. A computed sum of up to N terms is off by at most
N 2^-53 times the sum of the terms' sizes, which is at most (1 + SLACK) W for the total weight W; the margins now and at
the end involve four such sums and R a fifth, so 5 N 2^-53 (1 + SLACK) W in all, less than ROUNDING W for N < 10^6.
Hence the guard: (1 + 2 SLACK) R + ROUNDING W.

The same with the k-th and the (k+1)-th largest shows that the set of the top k can't change.

What is proven is about these vectors. An engine whose answer for a view depends on what shares its batch (INT8 and BF16
can, in the last digits) may give others another time.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# A softmax is within 0 to 1, its float32 within a few units of the last place of that, and a BF16 engine's may be the
# next number above 1, which is 1 + 2^-7.
SLACK = 2.0**-7
ROUNDING = 1e-9


def decided(sums: NDArray[np.float64], weights: NDArray[np.float64], done: int, top: int = 1) -> bool:
    """Whether the set of the `top` classes with the largest sums can't change any more.

    - sums: (classes,), the weighted sum of the first `done` vectors
    - weights: (N,), of all vectors in the plan's order
    """
    if done == len(weights) or top >= len(sums):
        return True
    return bool(margin(sums, top) > guard(weights, done))


def steps_until_decided(sums: NDArray[np.float64], weights: NDArray[np.float64], done: int) -> int:
    """How many more vectors must be added before `decided` can be true; 0 if it is.

    Each vector widens the margin by (1 + 2 SLACK) w_i at most, and lowers what remains by w_i, so the first j with
    margin + (1 + 2 SLACK) (w_{K+1} + ... + w_{K+j}) above the guard of what is left then.
    """
    if decided(sums, weights, done):
        return 0
    added = np.cumsum(weights[done:])
    lacking = guard(weights, done) - margin(sums)
    first = int(np.searchsorted(added, lacking / (2 * (1 + 2 * SLACK)), side="right"))
    return min(first + 1, len(added))


def margin(sums: NDArray[np.float64], top: int = 1) -> NDArray[np.float64]:
    """Between the top-th largest and the next: (...) of (..., classes)."""
    ordered = np.partition(sums, (-top - 1, -top))
    between: NDArray[np.float64] = ordered[..., -top] - ordered[..., -top - 1]
    return between


def guard(weights: NDArray[np.float64], done: int) -> float:
    """The margin above which the remaining vectors can't change the winner."""
    return float((1 + 2 * SLACK) * weights[done:].sum() + ROUNDING * weights.sum())


class StopRule(Protocol):
    """When an image is done."""

    @property
    def name(self) -> str:
        """What a request asks for and an answer says."""

    def needed(self, sums: NDArray[np.float64], views: NDArray[np.int64], planned: int) -> int:
        """How many more views of the plan must be run before this rule can fire; 0 to stop.

        - sums: (members, classes), softmax vectors summed over the views so far, which are the plan's first
        - views: (members,), how many were summed
        - planned: views in the plan
        """


class Full:
    """Every planned view."""

    name = "full"

    def needed(self, sums: NDArray[np.float64], views: NDArray[np.int64], planned: int) -> int:  # noqa: ARG002
        """All that remain."""
        return planned - int(views.sum())


class Exact:
    """Until the most probable class is proven to be the one of all planned views."""

    name = "exact"

    def needed(self, sums: NDArray[np.float64], views: NDArray[np.int64], planned: int) -> int:
        """See the module's docstring."""
        return steps_until_decided(sums.sum(axis=0), equal_weights(planned), int(views.sum()))


@dataclass(frozen=True)
class Calibrated:
    """As `exact`, and also at the first checkpoint where `lead` reaches its threshold.

    - checkpoints: so many views of the plan that they were found for, ascending
    - thresholds: one a checkpoint, found by server/thresholds.py

    It looks at the lead at its checkpoints only, so that what is run between two of them makes large batches.
    """

    checkpoints: tuple[int, ...]
    thresholds: tuple[float, ...]
    name: str = field(default="calibrated", init=False)

    def needed(self, sums: NDArray[np.float64], views: NDArray[np.int64], planned: int) -> int:
        """To the next checkpoint, or to where the class can be proven, whichever comes first."""
        done = int(views.sum())
        undecided = steps_until_decided(sums.sum(axis=0), equal_weights(planned), done)
        for checkpoint, threshold in zip(self.checkpoints, self.thresholds, strict=True):
            if checkpoint == done and lead(sums, views) >= threshold:
                return 0
            if checkpoint > done:
                return min(undecided, checkpoint - done)
        return undecided


def lead(sums: NDArray[np.float64], views: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the answer so far leads in the mean of the members' means, (...), within -1 and 1 and rounding.

    - sums: (..., members, classes), softmax vectors summed over views
    - views: (members,), how many were summed

    The answer is the class with the largest sum over all views. In the margin, every member that has been seen weighs
    the same, as in the end, however many of its views came first. Of the scores that were tried on 5,000 CIFAR-10
    images (two members, ten crops; cost certified at 0.5 % disagreement, mean of six splits) this one cost 8.9 % of all
    views, the largest probability 10.8, the margin plus the least of the members' own margins 10.3, the entropy 14.1,
    and a logistic regression on all of them 9.0. Where members have had different numbers of views, it cost 4 % less
    than the margin of the plain mean (simulated, three members).
    """
    seen = views > 0
    means = (sums[..., seen, :] / views[seen, None]).mean(axis=-2)  # (..., classes)
    answer = sums.sum(axis=-2).argmax(axis=-1)[..., None]
    leading = np.take_along_axis(means, answer, axis=-1)[..., 0]
    np.put_along_axis(means, answer, -np.inf, axis=-1)
    ahead: NDArray[np.float64] = leading - means.max(axis=-1)
    return ahead


@cache
def equal_weights(planned: int) -> NDArray[np.float64]:
    """Every view of the plan weighs 1, whichever member it is of."""
    return np.ones(planned)


RULES: dict[str, StopRule] = {rule.name: rule for rule in (Full(), Exact())}  # for every bundle; with no parameters
CALIBRATED = Calibrated.name
