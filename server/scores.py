"""What an evaluation finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One protocol and stop rule.

    - ensemble: top-1 error in %
    - members: of each member alone in %, where it was given all its views
    - agreement: images in % with the label of all views; None where those were not evaluated
    - views_used, views_planned: of an image, on average
    - cost: seconds of the views used by those planned, by the measured seconds of a view
    - multiply_adds: of an image, on average, as the paper counts them; None where the bundle does not say them
    """

    protocol: str
    stop: str
    images: int
    ensemble: float
    members: dict[str, float] | None
    agreement: float | None
    views_used: float
    views_planned: int
    cost: float
    images_per_second: float
    multiply_adds: float | None
