import pytest

from resnet_ensemble.training.accuracy import wilson


@pytest.mark.parametrize(
    ("error", "images", "interval"), [(0, 100, (0, 3.70)), (50, 100, (40.38, 59.62)), (8.75, 10_000, (8.21, 9.32))]
)
def test_wilson_intervals(error: float, images: int, interval: tuple[float, float]) -> None:
    assert wilson(error, images) == pytest.approx(interval, abs=0.01)
