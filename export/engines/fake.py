"""An engine without weights: the whole product runs with it, quickly, and a test can read its answers off the pixels.

Serve it with RESNET_BACKEND=fake.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.engines import EngineInfo


class FakeEngine:
    """Class probabilities from the brightness of a view's central quarter: black is class 0, white the last.

    - seconds_per_view: how long a view takes
    - fails: called with each view (h, w, 3); where it returns true the whole run raises RuntimeError
    """

    def __init__(
        self,
        classes: int,
        *,
        seconds_per_view: float = 0.0,
        fails: Callable[[NDArray[np.uint8]], bool] | None = None,
    ) -> None:
        self.info = EngineInfo("fake", "1", "fp32", "cpu", threads=1)
        self.batches: list[int] = []  # the size of every batch, in the order of arrival
        self._classes = classes
        self._seconds_per_view = seconds_per_view
        self._fails = fails
        self._killed = False

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3)."""
        self.batches.append(len(views))
        if self._killed:
            raise RuntimeError("the fake engine was killed")
        if self._fails and any(self._fails(view) for view in views):
            raise RuntimeError("the fake engine was told to fail on this view")
        if self._seconds_per_view:
            time.sleep(self._seconds_per_view * len(views))
        _, height, width, _ = views.shape
        centre = views[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
        brightness = centre.mean(axis=(1, 2, 3)) / 255  # (n,)
        position = brightness * (self._classes - 1)
        distance = np.abs(position[:, None] - np.arange(self._classes))  # (n, classes)
        weights = np.exp(-distance)
        probabilities: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        return probabilities

    def kill(self) -> None:
        """From now on every run raises RuntimeError, as if its device were gone: what a server must survive."""
        self._killed = True

    def close(self) -> None:
        """Nothing to free."""
