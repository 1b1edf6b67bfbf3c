"""Augmentation and normalisation of batches, as functions of what they are given."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

# Eigenvalues and eigenvectors (columns) of the RGB covariance of ImageNet's training pixels, in units of 0 to 1:
# fb.resnet.torch, after AlexNet's section 4.1.
COLOUR_VALUES = (0.2175, 0.0188, 0.0045)
COLOUR_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOUR_DEVIATION = 0.1


def pad(images: Tensor, padding: int, fill: tuple[int, int, int]) -> Tensor:
    """Surround uint8 (n, h, w, 3) by `padding` pixels of the colour `fill`.

    The paper pads after it has subtracted the mean, that is, with the mean colour.
    """
    n, h, w, _ = images.shape
    padded = torch.tensor(fill, dtype=torch.uint8).expand(n, h + 2 * padding, w + 2 * padding, 3).clone()
    padded[:, padding : padding + h, padding : padding + w] = images
    return padded


def random_windows(count: int, size: int, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (count, crop) and columns (count, crop) of random crops of size x size pictures or of their mirrors.

    A mirrored crop reads its columns backwards, so that one gather does both.
    """
    top = torch.randint(size - crop + 1, (count, 1), generator=generator)
    left = torch.randint(size - crop + 1, (count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool)
    steps = torch.arange(crop)
    return top + steps, left + torch.where(mirrored, crop - 1 - steps, steps)


def cut(padded: Tensor, indices: Tensor, windows: tuple[Tensor, Tensor]) -> Tensor:
    """The window of each chosen picture: (len(indices), crop, crop, 3)."""
    rows, columns = windows
    return padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def colour_shift(count: int, generator: torch.Generator) -> Tensor:
    """AlexNet's colour augmentation: what to subtract from the pixels of each of `count` pictures: (count, 1, 1, 3)."""
    strength = torch.randn((count, 3), generator=generator) * COLOUR_DEVIATION
    return ((strength * torch.tensor(COLOUR_VALUES)) @ torch.tensor(COLOUR_VECTORS).T)[:, None, None, :]


@functools.cache
def area_crop(crop: int) -> v2.Transform:
    """A random part of a picture, 8 to 100 % of its area, as a square or its mirror: torchvision's usual training."""
    return v2.Compose([v2.RandomResizedCrop(crop, antialias=True), v2.RandomHorizontalFlip()])


@functools.cache
def scale_crop(crop: int, lowest: int, highest: int) -> v2.Transform:
    """The paper's, after VGG: the shorter side between `lowest` and `highest`, then a random crop or its mirror."""
    resize = v2.RandomResize(lowest, highest + 1, antialias=True)  # RandomShortestSize may be a pixel short
    return v2.Compose([resize, v2.RandomCrop(crop), v2.RandomHorizontalFlip()])


def normalise(images: Tensor, shifts: Sequence[Tensor], std: tuple[float, ...]) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in channels_last order, without a copy to reorder.

    `shifts` are subtracted, in units of 0 to 1: a mean colour (3,), a mean image (h, w, 3), or something for each.
    """
    units = images.float().div_(255)
    for shift in shifts:
        units.sub_(shift.to(images.device, non_blocking=True))
    return units.div_(torch.tensor(std, device=images.device)).permute(0, 3, 1, 2)
