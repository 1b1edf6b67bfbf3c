"""Averaging. Pure functions of arrays.

The ensemble's answer is the mean of all members' softmax vectors over all views, as in section 4.3 of the paper.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Average:
    """`ensemble`: float64 (classes,). `members`: float64 (members, classes), each member's own mean."""

    ensemble: NDArray[np.float64]
    members: NDArray[np.float64]


def average(sums: NDArray[np.float64], views: NDArray[np.int64]) -> Average:
    """Means from the sums of softmax vectors, float64 (members, classes), and how many were summed, (members,).

    Every softmax vector has the same weight, whichever member and view it is of.
    """
    return Average(ensemble=sums.sum(axis=0) / views.sum(), members=sums / views[:, None])


def top(probabilities: NDArray[np.float64], count: int) -> list[int]:
    """Indices of the `count` largest, largest first; of equals the lower first, so that answers are repeatable."""
    order = np.argsort(-probabilities, kind="stable")
    return [int(index) for index in order[:count]]
