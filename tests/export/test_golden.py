import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_ensemble.export import engines, golden
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine


class Shifted:
    """An engine whose answers are a little off."""

    def __init__(self, engine: engines.Engine, shift: float) -> None:
        self.engine, self.shift, self.info = engine, shift, engine.info

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.engine.run(views) + np.float32(self.shift)

    def close(self) -> None:
        self.engine.close()


def opened(bundle: Bundle) -> engines.Engine:
    implementation = engines.backend("onnxruntime")
    member = bundle.manifest.members[0]
    return implementation.load(implementation.compile(bundle.read(member), "fp32", member.preprocessing), "fp32")


def test_the_shipped_members_pass_far_within_the_tolerance(shipped: Bundle) -> None:
    assert golden.check(opened(shipped), shipped, shipped.manifest.members[0], allowed=1e-4) < 1e-5


def test_a_difference_above_the_tolerance_is_refused(shipped: Bundle) -> None:
    with pytest.raises(golden.GoldenMismatch, match=r"by 0\.0002; allowed: 0\.0001"):
        golden.check(Shifted(opened(shipped), 2e-4), shipped, shipped.manifest.members[0], allowed=1e-4)


def test_not_a_number_is_refused(shipped: Bundle) -> None:
    with pytest.raises(golden.GoldenMismatch, match="by 1; allowed"):
        golden.check(Shifted(opened(shipped), float("nan")), shipped, shipped.manifest.members[0], allowed=1e-4)


def test_another_classifier_is_refused(shipped: Bundle) -> None:
    with pytest.raises(golden.GoldenMismatch, match="fake"):
        golden.check(FakeEngine(10), shipped, shipped.manifest.members[0], allowed=1e-4)


def test_golden_probabilities_tell_members_and_pictures_apart(shipped: Bundle) -> None:
    """A check against near-certain or equal values would pass for the wrong network."""
    rows = [row for picture in shipped.manifest.golden for row in picture.probabilities.values()]

    assert len(set(rows)) == len(rows)
    assert sum(max(row) < 0.99 for row in rows) >= len(shipped.manifest.members)
