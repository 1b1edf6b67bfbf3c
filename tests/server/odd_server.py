"""The server with fake engines that fail as real ones do: for tests that need a process. Run as a module.

A white view hangs its engine; SIGUSR1 kills every engine that is open, as a lost device would.
"""

import signal
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import __main__, classifier

SECONDS_PER_VIEW = 0.0005
engines: "list[OddEngine]" = []


class OddEngine(FakeEngine):
    def __init__(self, classes: int, **options: Any) -> None:
        super().__init__(classes, seconds_per_view=SECONDS_PER_VIEW, **options)
        engines.append(self)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        if (views == 255).all(axis=(1, 2, 3)).any():
            threading.Event().wait()
        return super().run(views)


def kill(*_: object) -> None:
    for engine in engines:
        engine.kill()


if __name__ == "__main__":
    classifier.FakeEngine = OddEngine  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, kill)
    sys.exit(__main__.main())
