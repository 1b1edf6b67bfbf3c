import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resnet_ensemble.training import augment


def crops_of(padded: Tensor, indices: Tensor, crop: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    windows = augment.random_windows(len(indices), padded.shape[1], crop, generator)
    return augment.cut(padded, indices, windows)


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

    crops = crops_of(padded, torch.zeros(200, dtype=torch.long), 4, seed=0)

    seen = {next(i for i, window in enumerate(allowed) if torch.equal(window, crop)) for crop in crops}
    assert seen == set(range(18))  # every window and every mirror turns up


def test_the_same_seed_gives_the_same_crops() -> None:
    padded = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    indices = torch.arange(5)

    first, second = (crops_of(padded, indices, 6, seed=3) for _ in range(2))

    assert torch.equal(first, second)


def test_normalising_gives_zero_mean_and_unit_deviation_in_channels_last_order() -> None:
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    units = images.float() / 255
    mean, std = units.mean((0, 1, 2)), units.std((0, 1, 2))

    normalised = augment.normalise(images, (mean,), tuple(std.tolist()))

    assert normalised.shape == (50, 3, 8, 8)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-4
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_everything_in_shifts_is_subtracted() -> None:
    images = torch.full((2, 3, 3, 3), 255, dtype=torch.uint8)
    mean_image, for_each = torch.full((3, 3, 3), 0.25), torch.tensor([0.25, -0.25]).view(2, 1, 1, 1)

    normalised = augment.normalise(images, (mean_image, for_each), (0.5, 0.5, 0.5))

    assert normalised[0].unique().tolist() == [1.0]
    assert normalised[1].unique().tolist() == [2.0]


def test_the_colour_shift_has_the_covariance_of_alexnet_s() -> None:
    shifts = augment.colour_shift(200_000, torch.Generator().manual_seed(0))

    vectors, values = torch.tensor(augment.COLOUR_VECTORS), torch.tensor(augment.COLOUR_VALUES)
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    assert shifts.shape == (200_000, 1, 1, 3)
    assert torch.allclose(shifts.view(-1, 3).T.cov(), expected, atol=5e-6)


def test_the_colour_vectors_are_a_rotation() -> None:
    vectors = torch.tensor(augment.COLOUR_VECTORS)

    assert torch.allclose(vectors @ vectors.T, torch.eye(3), atol=2e-3)


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (40, 700)])
def test_a_scale_crop_sees_a_shorter_side_from_lowest_to_highest(size: tuple[int, int]) -> None:
    # Columns are numbered, so that the crop's own step tells by how much the picture was resized.
    width, height = size
    ramp = np.linspace(0, 255, width, dtype=np.float32)[None, :, None].repeat(height, 0).repeat(3, 2)
    picture = Image.fromarray(ramp.astype(np.uint8))
    transform = augment.scale_crop(224, 256, 480)

    shorter_sides = []
    for seed in range(20):
        torch.manual_seed(seed)
        row = np.asarray(transform(picture), np.float32)[112, :, 0]
        resized_width = 255 * (len(row) - 1) / abs(row[-1] - row[0])
        shorter_sides.append(resized_width * min(size) / width)

    assert 240 < min(shorter_sides) < 300
    assert 400 < max(shorter_sides) < 500


def test_a_scale_crop_fits_into_the_smallest_picture_that_it_may_be_cut_from() -> None:
    """Of a side of 103 pixels, torchvision's RandomShortestSize makes 31 where 32 are asked for."""
    picture, transform = Image.new("RGB", (130, 103)), augment.scale_crop(32, 32, 34)
    for seed in range(20):
        torch.manual_seed(seed)
        assert transform(picture).size == (32, 32)


def test_an_area_crop_is_a_square_of_the_asked_size() -> None:
    assert augment.area_crop(160)(Image.new("RGB", (500, 375))).size == (160, 160)
