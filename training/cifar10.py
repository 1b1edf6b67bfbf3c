"""CIFAR-10 from its official files, binary or Python version, each checked by its published MD5. NumPy only.

Unpack `cifar-10-binary.tar.gz` or `cifar-10-python.tar.gz` from https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The paper trains on 45k and validates on 5k of the 50k training images. It does not say which: ours are the
# last 5,000 of the official order.
TRAIN_IMAGES = 45_000

BINARY = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
PYTHON = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
SPLITS = ("train", "val", "test")


class DataError(Exception):
    """The data set is missing, incomplete, or not the published one."""


@dataclass(frozen=True)
class Split:
    """`images`: uint8 (n, 32, 32, 3), RGB. `labels`: int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read(root: Path, split: str) -> Split:
    """Read `train` (45,000 images), `val` (5,000) or `test` (10,000).

    `root` is the folder that holds the official files, or the folder above `cifar-10-batches-bin` or
    `cifar-10-batches-py`. Raises DataError.
    """
    if split not in SPLITS:
        raise DataError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
    folder, files = _find(root)
    wanted = [name for name in files if ("test" in name) == (split == "test")]
    batches = [_read_batch(folder / name, files[name]) for name in wanted]
    images = np.concatenate([rows for rows, _ in batches]).reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # (n, 32, 32, 3)
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    window = {"train": slice(0, TRAIN_IMAGES), "val": slice(TRAIN_IMAGES, None), "test": slice(None)}[split]
    return Split(images[window], labels[window])


def _find(root: Path) -> tuple[Path, dict[str, str]]:
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for files in (BINARY, PYTHON):
            if (folder / next(iter(files))).is_file():
                return folder, files
    raise DataError(
        f"no CIFAR-10 in {root}: expected data_batch_1.bin or data_batch_1 there, or in its folder "
        "cifar-10-batches-bin or cifar-10-batches-py. Get it from https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _read_batch(path: Path, md5: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rows uint8 (10000, 3072), channel first, and labels uint8 (10000,)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; unpack the official archive again") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path} is damaged: its MD5 is not the published {md5}; unpack the official archive again")
    if path.suffix == ".bin":
        rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)  # label, then pixels
        return rows[:, 1:], rows[:, 0]
    batch = pickle.loads(content, encoding="bytes")  # noqa: S301  # the official file, as its MD5 has just shown
    return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.uint8)
