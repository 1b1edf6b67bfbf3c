"""The sizes of views that a TensorRT plan is built for. A plan takes no others.

A size is (n, h, w), of views uint8 (n, h, w, 3).
"""

import math
from dataclasses import dataclass

from resnet_ensemble.export.engines import BUCKETS, WHOLE_VIEWS
from resnet_ensemble.training.views import LONGEST, SCALES, Preprocessing, shorter_side

Size = tuple[int, int, int]

FEW = 5  # up to here a plan is tuned for the quickest answer, above it for the most views


@dataclass(frozen=True)
class Profile:
    """Sizes from `least` to `most`, each axis on its own, tuned for `best`."""

    least: Size
    best: Size
    most: Size

    @property
    def crops(self) -> bool:
        """Whether only the batch differs."""
        return self.least[1:] == self.most[1:]

    def accepts(self, size: Size) -> bool:
        """Whether a plan with this profile runs views of a size."""
        return all(low <= n <= high for low, n, high in zip(self.least, size, self.most, strict=True))


def profiles(seen: Preprocessing) -> tuple[Profile, ...]:
    """Crops, many and few; whole views that are wide, and those that are tall.

    The first takes every batch of crops, since it is the only one that Triton uses. Wide and tall ones are apart
    because a profile's memory is that of its largest height with its largest width.
    """
    side, quantum = seen.crop, seen.quantum
    dense, *others = (shorter_side(scale, seen) for scale in (None, *SCALES))
    shortest, shorter = min(dense, *others), max(dense, *others)
    usual = quantum * round(dense * 4 / 3 / quantum)  # photographs are mostly 3:4
    longest = quantum * math.ceil(LONGEST * shorter / quantum)  # as whole views are rounded
    n = WHOLE_VIEWS
    return (
        Profile((1, side, side), (BUCKETS[-1], side, side), (BUCKETS[-1], side, side)),
        Profile((1, side, side), (1, side, side), (FEW, side, side)),
        Profile((1, shortest, shortest), (2, dense, usual), (n, shorter, longest)),
        Profile((1, shortest, shortest), (2, usual, dense), (n, longest, shorter)),
    )
