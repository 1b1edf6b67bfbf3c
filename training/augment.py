"""The paper's CIFAR augmentation and the one-cycle schedule, as functions of what they are given."""

import torch
from torch import Tensor


def pad(images: Tensor, padding: int, fill: tuple[int, int, int]) -> Tensor:
    """Surround uint8 (n, h, w, 3) by `padding` pixels of the colour `fill`.

    The paper pads after it has subtracted the mean, that is, with the mean colour.
    """
    n, h, w, _ = images.shape
    padded = torch.tensor(fill, dtype=torch.uint8).expand(n, h + 2 * padding, w + 2 * padding, 3).clone()
    padded[:, padding : padding + h, padding : padding + w] = images
    return padded


def random_crops(padded: Tensor, indices: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A random crop of each chosen image or of its mirror: uint8 (len(indices), crop, crop, 3).

    One gather does it: a mirrored crop reads its columns backwards.
    """
    n = len(indices)
    top = torch.randint(padded.shape[1] - crop + 1, (n, 1), generator=generator)
    left = torch.randint(padded.shape[2] - crop + 1, (n, 1), generator=generator)
    mirrored = torch.randint(2, (n, 1), generator=generator, dtype=torch.bool)
    steps = torch.arange(crop)
    rows = top + steps  # (n, crop)
    columns = left + torch.where(mirrored, crop - 1 - steps, steps)  # (n, crop)
    return padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in channels_last order, without a copy to reorder."""
    mean_, std_ = torch.tensor(mean, device=images.device), torch.tensor(std, device=images.device)
    return images.float().div_(255).sub_(mean_).div_(std_).permute(0, 3, 1, 2)


def one_cycle(step: int, *, steps: int, peak: float, warm_up: float) -> float:
    """Learning rate at `step` of `steps`: linear to `peak` over the share `warm_up`, then linear to zero."""
    rising = warm_up * steps
    return peak * min(1.0, (step + 1) / rising, (steps - step) / (steps - rising))
