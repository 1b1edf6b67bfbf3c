import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.training import augment


def test_padding_surrounds_with_the_colour() -> None:
    images = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)

    padded = augment.pad(images, 2, (1, 2, 3))

    assert padded.shape == (2, 8, 8, 3)
    assert torch.equal(padded[:, 2:6, 2:6], images)
    assert padded[0, 0, 0].tolist() == [1, 2, 3]


def test_a_random_crop_is_a_window_of_the_image_or_of_its_mirror() -> None:
    padded = torch.arange(1 * 6 * 6 * 3, dtype=torch.uint8).reshape(1, 6, 6, 3)
    windows = [padded[0, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    allowed = windows + [window.flip(1) for window in windows]

    crops = augment.random_crops(padded, torch.zeros(200, dtype=torch.long), 4, torch.Generator().manual_seed(0))

    seen = {next(i for i, window in enumerate(allowed) if torch.equal(window, crop)) for crop in crops}
    assert seen == set(range(18))  # every window and every mirror turns up


def test_the_same_seed_gives_the_same_crops() -> None:
    padded = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    indices = torch.arange(5)

    first, second = (augment.random_crops(padded, indices, 6, torch.Generator().manual_seed(3)) for _ in range(2))

    assert torch.equal(first, second)


def test_normalising_gives_zero_mean_and_unit_deviation_in_channels_last_order() -> None:
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    units = images.float() / 255
    mean, std = units.mean((0, 1, 2)), units.std((0, 1, 2))

    normalised = augment.normalise(images, tuple(mean.tolist()), tuple(std.tolist()))

    assert normalised.shape == (50, 3, 8, 8)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-4
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-3


@given(steps=st.integers(2, 5000), warm_up=st.floats(0.01, 0.9))
def test_the_one_cycle_rate_rises_to_its_peak_once_and_falls_towards_zero(steps: int, warm_up: float) -> None:
    rates = [augment.one_cycle(step, steps=steps, peak=0.2, warm_up=warm_up) for step in range(steps)]

    top = rates.index(max(rates))
    assert all(0 < rate <= 0.2 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_one_cycle_corners() -> None:
    def rate(step: int) -> float:
        return augment.one_cycle(step, steps=100, peak=1.0, warm_up=0.2)

    assert [rate(0), rate(19), rate(20), rate(60)] == pytest.approx([0.05, 1.0, 1.0, 0.5])
    assert rate(99) == pytest.approx(0.0125)
