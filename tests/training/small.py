"""Data sets that a test can train on in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from resnet_ensemble.training import cifar

VALIDATION = 33  # odd, so that two processes can't have equal parts


def cifar_of_two(_root: Path, split: str, _dataset: cifar.Dataset = cifar.CIFAR10) -> cifar.Images:
    """In CIFAR-10's shape. Class 0 is dark and class 1 is bright, so that three epochs are enough to learn it."""
    generator = np.random.default_rng(split == "train")
    labels = generator.integers(0, 2, 96 if split == "train" else VALIDATION)
    images = generator.integers(0, 90, (len(labels), 32, 32, 3)) + 160 * labels[:, None, None, None]
    return cifar.Images(images.astype(np.uint8), labels)


def write_folders(root: Path, *, train: int, val: int, size: tuple[int, int] = (300, 280)) -> Path:
    """In ImageNet's layout: three classes of JPEGs, of one colour each and noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i, name in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (size[1], size[0], 3), np.uint8)
                pixels[..., i] += 150
                Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG")
    return root
