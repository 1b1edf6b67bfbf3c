"""Stop rules: how many of an image's planned views must be run before its answer can be given. Pure functions.

A rule answers one question: given the sums so far, how many more views of the plan must be run, whatever they say,
before the rule could fire? 0 is "stop". So nothing is ever run on speculation: between two looks, only views that
every way of following the plan would run, and an image stops after exactly the first view after which its rule fires.
That number, and so the answer, depends neither on batches nor on load.

    full    all of them
    exact   until no remaining view can change the most probable class

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
    return _margin(sums, top) > _guard(weights, done)


def steps_until_decided(sums: NDArray[np.float64], weights: NDArray[np.float64], done: int) -> int:
    """How many more vectors must be added before `decided` can be true; 0 if it is.

    Each vector widens the margin by (1 + 2 SLACK) w_i at most, and lowers what remains by w_i, so the first j with
    margin + (1 + 2 SLACK) (w_{K+1} + ... + w_{K+j}) above the guard of what is left then.
    """
    if decided(sums, weights, done):
        return 0
    added = np.cumsum(weights[done:])
    lacking = _guard(weights, done) - _margin(sums, 1)
    first = int(np.searchsorted(added, lacking / (2 * (1 + 2 * SLACK)), side="right"))
    return min(first + 1, len(added))


def _margin(sums: NDArray[np.float64], top: int) -> float:
    """Between the top-th largest and the next."""
    ordered = np.partition(sums, (-top - 1, -top))
    return float(ordered[-top] - ordered[-top - 1])


def _guard(weights: NDArray[np.float64], done: int) -> float:
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


@cache
def equal_weights(planned: int) -> NDArray[np.float64]:
    """Every view of the plan weighs 1, whichever member it is of."""
    return np.ones(planned)


RULES: dict[str, StopRule] = {rule.name: rule for rule in (Full(), Exact())}
