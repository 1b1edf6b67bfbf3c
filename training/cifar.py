"""CIFAR-10 and CIFAR-100 from their official files, each checked by its published MD5. NumPy only.

A folder may hold an archive of https://www.cs.toronto.edu/~kriz/cifar.html as it was downloaded, binary or Python
version, or what was unpacked from it. (The binary files of CIFAR-100 have no published MD5 of their own: keep their
archive.)
"""

import hashlib
import http.client
import io
import pickle
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.training.files import write_atomically

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SOURCE = "https://www.cs.toronto.edu/~kriz/"
# The paper trains on 45k and validates on 5k of the 50k training images. It does not say which: ours are the
# last 5,000 of the official order.
TRAIN_IMAGES = 45_000
PIXELS = 3 * 32 * 32


class DataError(Exception):
    """The data set is missing, incomplete, or not the published one."""

    def __init__(self, message: str) -> None:
        # What a loader's worker raised comes with the worker's traceback before it.
        super().__init__(message.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True)
class Version:
    """One published form of a data set: a folder of files in an archive. MD5 by name; "" where none is published."""

    archive: str
    archive_md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]


@dataclass(frozen=True)
class Dataset:
    """A data set in its published versions; the first is what is downloaded."""

    title: str
    labels: tuple[str, ...]
    label_bytes: int  # before the pixels of a binary record; the last one is the label
    label_key: bytes
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Images:
    """`images`: uint8 (n, 32, 32, 3), RGB. `labels`: int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


CIFAR10 = Dataset(
    title="CIFAR-10",
    labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    label_bytes=1,
    label_key=b"labels",
    versions=(
        Version(
            archive="cifar-10-binary.tar.gz",
            archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train={
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        ),
        Version(
            archive="cifar-10-python.tar.gz",
            archive_md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        ),
    ),
)
# fmt: off
CIFAR100 = Dataset(
    title="CIFAR-100",
    labels=(
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    ),
    label_bytes=2,  # the coarse label, then the fine one
    label_key=b"fine_labels",
    versions=(
        Version(
            archive="cifar-100-binary.tar.gz",
            archive_md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train={"train.bin": ""},
            test={"test.bin": ""},
        ),
        Version(
            archive="cifar-100-python.tar.gz",
            archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
    ),
)
# fmt: on
DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def read(root: Path, split: Split, dataset: Dataset = CIFAR10) -> Images:
    """Read `train` (45,000 images), `val` (5,000) or `test` (10,000).

    `root` is the folder that holds the official files or their archive, or the folder above. Raises DataError.
    """
    if split not in SPLITS:
        raise DataError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
    version, open_file = _find(root, dataset)
    names = version.test if split == "test" else version.train
    batches = [_records(dataset, name, open_file(name)) for name in names]
    images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # (n, 32, 32, 3)
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    window = {"train": slice(0, TRAIN_IMAGES), "val": slice(TRAIN_IMAGES, None), "test": slice(None)}[split]
    return Images(images[window], labels[window])


def download(root: Path, dataset: Dataset) -> None:
    """Put the binary archive into `root`, unless the data set is there in some form. Raises DataError."""
    version = dataset.versions[0]
    try:
        _find(root, dataset)
    except DataError:
        url = SOURCE + version.archive
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  # SOURCE is https
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # the latter: the connection broke off
            raise DataError(f"can't download {url} ({error}); put {version.archive} into {root} yourself") from None
        _check(content, version.archive_md5, url, "try again later")
        write_atomically(root / version.archive, content)


def _find(root: Path, dataset: Dataset) -> tuple[Version, Callable[[str], bytes]]:
    """The version that is there, and how to read its files, checked."""
    for version in dataset.versions:
        for folder in (root / version.folder, root):
            first, md5 = next(iter(version.train.items()))
            if md5 and (folder / first).is_file():
                return version, _Unpacked(folder, version)
        if (root / version.archive).is_file():
            return version, _Archive(root / version.archive, version)
    unchecked = [v for v in dataset.versions if not all(v.train.values())]  # of whose files no MD5 is published
    known = ", ".join(v.archive if v in unchecked else f"{v.archive}, {v.folder}/" for v in dataset.versions)
    there = [v for v in unchecked if (root / v.folder).is_dir()]
    told = "".join(f" {v.folder}/ is there, but its files can't be checked: put {v.archive} beside it." for v in there)
    raise DataError(f"no {dataset.title} in {root}: looked for {known}.{told} Get it from {SOURCE}cifar.html")


class _Unpacked:
    def __init__(self, folder: Path, version: Version) -> None:
        self._folder = folder
        self._md5 = version.train | version.test

    def __call__(self, name: str) -> bytes:
        path = self._folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path} is missing; unpack the official archive again") from None
        _check(content, self._md5[name], str(path), "unpack the official archive again")
        return content


class _Archive:
    def __init__(self, path: Path, version: Version) -> None:
        self._content = path.read_bytes()  # what is unpickled is what was checked, whoever writes into the folder
        _check(self._content, version.archive_md5, str(path), "download it again")
        self._folder = version.folder

    def __call__(self, name: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(self._content)) as archive:
            file = archive.extractfile(f"{self._folder}/{name}")
            assert file is not None  # the archive has just been found to be the published one
            return file.read()


def _check(content: bytes, md5: str, what: str, remedy: str) -> None:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{what} is damaged: its MD5 is not the published {md5}; {remedy}")


def _records(dataset: Dataset, name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rows uint8 (n, 3072), channel first, and labels uint8 (n,)."""
    if name.endswith(".bin"):
        rows = np.frombuffer(content, np.uint8).reshape(-1, dataset.label_bytes + PIXELS)
        return rows[:, dataset.label_bytes :], rows[:, dataset.label_bytes - 1]
    batch = pickle.loads(content, encoding="bytes")  # noqa: S301  # the official file, as its MD5 has just shown
    return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[dataset.label_key], np.uint8)
