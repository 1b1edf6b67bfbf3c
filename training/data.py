"""What the loop reads: batches of bytes whose order and augmentation follow from the seed, the epoch and the step.

So there is nothing to save for an exact resume, and several processes draw what one alone would draw. CIFAR lies in
memory; a tree of folders is decoded and augmented by worker processes.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]  # its __init__ has no __all__
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from resnet_ensemble.training import augment, cifar
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.pixels import MAX_ASPECT_RATIO, SUFFIXES, PixelsUnsupported, is_extreme, to_rgb
from resnet_ensemble.training.processes import Group
from resnet_ensemble.training.recipes import Recipe
from resnet_ensemble.training.views import make_views, mean_colour

EVALUATION_BATCH = 500
_EXTENSIONS = tuple(sorted({*IMG_EXTENSIONS, *SUFFIXES}))  # what the server reads, and torchvision
# The mean image is that of so many training pictures, of all if there are fewer.
MEAN_IMAGES = 10_000


class Batch(NamedTuple):
    """`images` uint8 (n, h, w, 3), `shifts` to subtract from them (augment.normalise), `labels` int64 (n,)."""

    images: Tensor
    shifts: tuple[Tensor, ...]
    labels: Tensor


class Data(Protocol):
    """A training and a validation set."""

    labels: tuple[str, ...]
    train_images: int
    fingerprint: str  # SHA-256

    def mean_image(self) -> Tensor:
        """The mean of the training pictures: float (h, w, 3), 0 to 1."""

    def batches(self, epoch: int, *, crop: int, mean: Tensor, start: int, stop: int) -> Iterator[Batch]:
        """The process's share of the epoch's batches number `start` to `stop`."""

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The process's share of the validation set, each picture once: center views uint8 (n, h, w, 3), labels."""


def open_data(recipe: Recipe, root: Path, group: Group, *, workers: int) -> Data:
    """The recipe's data set in `root`. Raises DataError."""
    data = Folders(recipe, root, group, workers) if recipe.dataset == "imagenet" else Cifar(recipe, root, group)
    if len(data.labels) != recipe.classes:
        raise DataError(
            f"{root} has {len(data.labels)} classes, the recipe {recipe.classes}; "
            f"to train on these: --set classes={len(data.labels)}"
        )
    if data.train_images < recipe.batch_size:
        raise DataError(
            f"{root} has {data.train_images} training images, fewer than a batch of {recipe.batch_size}; "
            "give a smaller one: --set batch_size=N"
        )
    if recipe.batch_size % group.world:
        raise DataError(f"a batch of {recipe.batch_size} can't be shared equally by {group.world} processes")
    return data


class Cifar:
    """CIFAR-10 or CIFAR-100 in memory, augmented by the batch."""

    def __init__(self, recipe: Recipe, root: Path, group: Group) -> None:
        dataset = cifar.DATASETS[recipe.dataset]
        training, self._validation = (cifar.read(root, split, dataset) for split in ("train", "val"))
        self._recipe = recipe
        self._group = group
        self._images = torch.from_numpy(training.images)
        self._labels = torch.from_numpy(training.labels)
        self._colour = mean_colour(recipe.mean)
        self._padded = augment.pad(self._images, recipe.padding, self._colour)
        self.labels = dataset.labels
        self.train_images = len(self._labels)
        digest = hashlib.sha256()
        for part in (training, self._validation):
            digest.update(part.images.tobytes())
            digest.update(part.labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def mean_image(self) -> Tensor:
        return self._images.double().mean(0).float() / 255

    def batches(self, epoch: int, *, crop: int, mean: Tensor, start: int, stop: int) -> Iterator[Batch]:
        generator = _generator(self._recipe, epoch)
        size = self._recipe.batch_size
        order = torch.randperm(self.train_images, generator=generator)
        share = self._group.share
        for step in range(stop):
            windows = augment.random_windows(size, self._padded.shape[1], crop, generator)
            colours = _colours(self._recipe, size, generator)
            if step < start:
                continue
            indices = share(order[step * size : (step + 1) * size])
            mine = (share(windows[0]), share(windows[1]))
            shifts = (self._mean(mean, mine), *map(share, colours))
            yield Batch(augment.cut(self._padded, indices, mine), shifts, self._labels[indices])

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = slice(self._group.rank, None, self._group.world)
        images, labels = self._validation.images[chosen], self._validation.labels[chosen]
        for start in range(0, len(labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            yield torch.from_numpy(images[part]), torch.from_numpy(labels[part])

    def _mean(self, mean: Tensor, windows: tuple[Tensor, Tensor]) -> Tensor:
        """A mean image is subtracted before the padding, so it is padded and cut like the pictures."""
        if mean.ndim == 1:
            return mean
        colour = torch.tensor(self._colour) / 255
        padding, (h, w, _) = self._recipe.padding, mean.shape
        padded = colour.expand(1, h + 2 * padding, w + 2 * padding, 3).clone()
        padded[0, padding : padding + h, padding : padding + w] = mean
        return augment.cut(padded, torch.zeros(len(windows[0]), dtype=torch.long), windows)


class Key(NamedTuple):
    """One training example: which picture, the seed of its augmentation, the side of its crop."""

    picture: int
    seed: int
    crop: int


class TrainingFiles(Dataset[tuple[Tensor, int]]):
    """Decoded pictures: augmented for a Key, the center view for a plain index."""

    def __init__(self, files: list[tuple[str, int]], recipe: Recipe) -> None:
        self.files = files
        self._recipe = recipe
        self._preprocessing = recipe.preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        if isinstance(key, int):
            path, label = self.files[key]
            return torch.from_numpy(make_views(decode(path), self._preprocessing, "center")[0]), label
        path, label = self.files[key.picture]
        if self._recipe.augmentation == "area":
            transform = augment.area_crop(key.crop)
        else:
            transform = augment.scale_crop(key.crop, *self._recipe.scale)
        # torchvision's transforms draw from the global generator; torch.manual_seed would take 0.14 ms for all devices.
        torch.default_generator.manual_seed(key.seed)
        crop: Tensor = transform(_decode_fast(path))  # (3, crop, crop)
        return crop.permute(1, 2, 0).contiguous(), label


class EpochBatches(Sampler[list[Key]]):
    """The keys of each batch of the coming epoch; set before the loader is iterated, so that its workers persist."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Folders:
    """`train/` and `val/`, each with one folder of pictures a class, as in torchvision's ImageNet.

    Classes are numbered in the order of their folders' names: for ImageNet's WordNet ids, the usual numbers.
    """

    def __init__(self, recipe: Recipe, root: Path, group: Group, workers: int) -> None:
        self._recipe = recipe
        self._group = group
        self.labels, training = scan_folders(root, "train")
        if empty := set(range(len(self.labels))) - {label for _, label in training}:
            some = ", ".join(self.labels[label] for label in sorted(empty)[:5])
            raise DataError(
                f"{root / 'train'} has classes without images: {some}; unpack them, or remove their folders"
            )
        _, validation = scan_folders(root, "val", self.labels)
        self._training = TrainingFiles(training, recipe)
        self.train_images = len(self._training.files)
        # Below ".", paths do not begin with it.
        names = [f"/{path.removeprefix(f'{root}/')}" for path, _ in (*self._training.files, *validation)]
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()
        mine = TrainingFiles(validation[group.rank :: group.world], recipe)
        gpu = group.device.type == "cuda"
        self._keys = EpochBatches()
        self._loader = DataLoader(
            self._training,
            batch_sampler=cast("Sampler[list[int]]", self._keys),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=gpu,
            worker_init_fn=_stand_alone,
        )
        # These persist, too: Python 3.11 may hang in a fork, if another thread begins or ends at that moment.
        self._validation_loader = DataLoader(
            mine,
            batch_size=64,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=gpu,
            worker_init_fn=_stand_alone,
        )

    def mean_image(self) -> Tensor:
        step = max(1, self.train_images // MEAN_IMAGES)
        chosen = range(0, self.train_images, step)[self._group.rank :: self._group.world]
        loader = DataLoader(
            self._training,
            batch_size=64,
            sampler=cast("Sampler[int]", chosen),
            num_workers=self._loader.num_workers,
            worker_init_fn=_stand_alone,
        )
        total = torch.zeros(self._recipe.test_crop, self._recipe.test_crop, 3, dtype=torch.float64)
        for images, _ in loader:
            total += images.sum(0, dtype=torch.float64)
        count = self._group.sum(torch.tensor([len(chosen)], dtype=torch.float64)).cpu()
        return (self._group.sum(total).cpu() / count / 255).float()

    def batches(self, epoch: int, *, crop: int, mean: Tensor, start: int, stop: int) -> Iterator[Batch]:
        generator = _generator(self._recipe, epoch)
        size = self._recipe.batch_size
        order = torch.randperm(self.train_images, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.train_images,), generator=generator).tolist()
        colours = [_colours(self._recipe, size, generator) for _ in range(stop)][start:]
        share = self._group.share
        self._keys.batches = [
            [Key(order[i], seeds[i], crop) for i in share(torch.arange(first, first + size)).tolist()]
            for first in range(start * size, stop * size, size)
        ]
        for (images, labels), colour in zip(self._loader, colours, strict=True):
            yield Batch(images, (mean, *map(share, colour)), labels)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._validation_loader


def _generator(recipe: Recipe, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)


def _colours(recipe: Recipe, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """How the colours of a batch are shifted, (size, 1, 1, 3), if they are."""
    return (augment.colour_shift(size, generator),) if recipe.pca_colour else ()


def decode(path: str) -> Image.Image:
    """The picture in a file as RGB, the same pixels as in the server. Raises DataError, which names it."""
    try:
        with Image.open(path) as image:
            _check_aspect(path, image.size)
            image.load()
            return to_rgb(image)
    # Pillow has the first three for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, PixelsUnsupported) as error:
        raise DataError(f"{path} can't be decoded ({error}); restore or remove it") from None


def _decode_fast(path: str) -> Tensor:
    """The picture in a file: uint8 (3, h, w).

    With TorchCodec's decoder and torchvision's transforms of tensors, one Zen 5 core makes 608 crops of 160 a second
    from photographs of ImageNet, the usual pipeline through Pillow to floats 420 (benchmarks/loading.py).
    """
    try:
        pixels = cast("Tensor", decode_jpeg(path))
    except (RuntimeError, ValueError):  # another format, or a fault, which Pillow names
        return torch.from_numpy(np.array(decode(path))).permute(2, 0, 1)
    _check_aspect(path, (pixels.shape[2], pixels.shape[1]))
    return pixels


def _check_aspect(path: str, size: tuple[int, int]) -> None:
    if is_extreme(size):
        raise DataError(
            f"{path} is {size[0]} x {size[1]}; one side may be {MAX_ASPECT_RATIO} times the other: crop or remove it"
        )


def _stand_alone(_worker: int) -> None:
    """A signal to the whole group is for the process that trains, which ends its workers when it has saved."""
    os.setpgid(0, 0)


def scan_folders(
    root: Path, split: str, labels: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes of a split, or `labels` if they are given, and its files with their class. Raises DataError."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"no {split}/ in {root}: expected train/ and val/, each with one folder of images a class "
            "(ImageNet: https://image-net.org/download)"
        )
    found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not found:
        raise DataError(f"{folder} has no folders, one a class; ImageNet's validation images must be sorted into them")
    labels = labels or found
    if unknown := set(found) - set(labels):
        raise DataError(f"{folder} has classes that are not in train/: {', '.join(sorted(unknown)[:5])}")
    numbers = {label: i for i, label in enumerate(labels) if label in found}
    files: list[tuple[str, int]] = make_dataset(str(folder), numbers, extensions=_EXTENSIONS, allow_empty=True)
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(_EXTENSIONS)})")
    return labels, files
