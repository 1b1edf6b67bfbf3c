"""Plans: in which order the views of an image are run. Pure functions.

The order of a plan does not change the mean of all its views, only what it costs until a stop rule fires. The cheapest
views come first, by the measured seconds of a view: a network with fewer parameters is not always the faster one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple


class Step(NamedTuple):
    """One view: `view` is its place in the member's block."""

    member: int
    block: int
    view: int


@dataclass(frozen=True)
class Stage:
    """Views that have one member and one shape, and stand together in a plan.

    - member, block: which of the member's arrays of views (see training/views.py) they are of
    - first: the place of the first of them in the plan
    - views: how many they are
    - seconds: of one view, as measured
    - start: which view of the block is the first of them
    """

    member: int
    block: int
    first: int
    views: int
    seconds: float
    start: int = 0


@dataclass(frozen=True)
class Plan:
    """What is run for an image, in this order. `protocol`: what it is a plan of."""

    protocol: str
    stages: tuple[Stage, ...]

    @cached_property
    def views(self) -> int:
        """Over all members."""
        return sum(stage.views for stage in self.stages)

    @cached_property
    def seconds(self) -> float:
        """Of all views, on one stream."""
        return self.seconds_between(0, self.views)

    def between(self, start: int, stop: int) -> list[tuple[Stage, int, int]]:
        """The stages of places `start` to `stop`, each with the range of its block's views that lies there."""
        found = []
        for stage in self.stages:
            low, high = max(start, stage.first), min(stop, stage.first + stage.views)
            if low < high:
                offset = stage.start - stage.first
                found.append((stage, low + offset, high + offset))
        return found

    def seconds_between(self, start: int, stop: int) -> float:
        """Of the views of places `start` to `stop`, on one stream."""
        return sum(stage.seconds * (high - low) for stage, low, high in self.between(start, stop))


def cheapest_first(protocol: str, seconds: Sequence[Sequence[float]], views: Sequence[int]) -> Plan:
    """The plan of a protocol.

    - seconds: of one view, for each member and block
    - views: in each block

    Of equally expensive ones, the earlier member and block comes first.
    """
    ordered = sorted((cost, member, block) for member, costs in enumerate(seconds) for block, cost in enumerate(costs))
    stages, first = [], 0
    for cost, member, block in ordered:
        stages.append(Stage(member, block, first, views[block], cost))
        first += views[block]
    return Plan(protocol, tuple(stages))


def in_order(protocol: str, seconds: Sequence[Sequence[float]], steps: Sequence[Step]) -> Plan:
    """The plan that runs these views in this order. `seconds`: of one view, for each member and block."""
    stages: list[Stage] = []
    for place, (member, block, view) in enumerate(steps):
        last = stages[-1] if stages else None
        if last and (last.member, last.block, last.start + last.views) == (member, block, view):
            stages[-1] = replace(last, views=last.views + 1)
        else:
            stages.append(Stage(member, block, place, 1, seconds[member][block], view))
    return Plan(protocol, tuple(stages))
