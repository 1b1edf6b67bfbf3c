"""Averaging, and how much the members agree. Pure functions of arrays.

The ensemble's answer is the mean of all members' softmax vectors over all views, as in section 4.3 of the paper.

The arrays are small, and there is one image at a time: ufuncs' methods are called without the functions around them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FEW = 100  # classes that are all sorted sooner than the largest are found


class Average(NamedTuple):
    """Means of softmax vectors.

    - ensemble: float64 (classes,)
    - members: float64 (members, classes), each member's own mean; zeros for one that has seen no view
    - shares: of each member, how much of the ensemble's mean is its
    """

    ensemble: NDArray[np.float64]
    members: NDArray[np.float64]
    shares: list[float]


def average(sums: NDArray[np.float64], views: NDArray[np.int64]) -> Average:
    """Means from the sums of softmax vectors, float64 (members, classes), and how many were summed, (members,).

    Every softmax vector has the same weight, whichever member and view it is of.
    """
    seen = views.tolist()
    total = sum(seen)
    return Average(
        ensemble=np.add.reduce(sums) / total,
        members=sums / np.maximum(views, 1)[:, None],
        shares=[count / total for count in seen],
    )


def entropy(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """In nats, over the last axis. 0 log 0 is 0, and so is what rounding has put below 0."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    result: NDArray[np.float64] = np.maximum(-np.add.reduce(positive * np.log(positive), axis=-1), 0.0)
    return result


def uncertainty(mean: Average) -> tuple[float, float]:
    """The entropy of the mean, and the mutual information, both in nats.

    The mutual information is how much the members disagree: the entropy of the mean minus the mean of the members'
    entropies. It is what an ensemble knows and one network does not: 0 where all members give the same probabilities,
    however unsure they are, and log(members) where each is sure of another class.
    """
    of_mean, *of_members = entropy(np.concatenate((mean.ensemble[None], mean.members))).tolist()
    expected = sum(share * own for share, own in zip(mean.shares, of_members, strict=True))
    return of_mean, max(0.0, of_mean - expected)


def top(probabilities: NDArray[np.float64], count: int) -> list[int]:
    """Indices of the `count` largest, largest first; of equals the lower first, so that answers are repeatable."""
    if not count < len(probabilities) > _FEW:
        few: list[int] = (-probabilities).argsort(kind="stable")[:count].tolist()
        return few
    candidates = np.flatnonzero(probabilities >= np.partition(probabilities, -count)[-count])
    order = (-probabilities[candidates]).argsort(kind="stable")
    found: list[int] = candidates[order[:count]].tolist()
    return found
