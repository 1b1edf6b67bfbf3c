"""Pictures in folders, labelled by the names of the folders."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_ensemble.training.files import read_regular
from resnet_ensemble.training.pixels import SUFFIXES

IMAGENET_CLASSES = 1000


class PictureUnreadable(Exception):
    """A file that is named like a picture can't be read."""


@dataclass(frozen=True)
class Picture:
    """A file, and its class; None if no folder that it is in is named like one."""

    path: Path
    label: int | None

    def read(self) -> bytes:
        """Its content, still encoded. Raises PictureUnreadable."""
        try:
            return read_regular(self.path)
        except OSError as error:
            raise PictureUnreadable(f"{self.path} can't be read ({error.strerror}); remove it") from None


def find(folder: Path, labels: tuple[str, ...]) -> list[Picture]:
    """Every picture in a folder and the folders in it, by name.

    The nearest folder that is named like a label tells a picture's; or like ImageNet's (n01440764, ...) where there are
    a thousand of those and as many labels, whose order is theirs. Links to folders are followed.
    """
    files = sorted(_walk(folder))
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if files else []
    if len(names) == len(labels) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", name) for name in names):
        labels = tuple(names)
    numbers = {label: number for number, label in reversed([*enumerate(labels)])}  # of equal ones the first
    return [Picture(path, _label(path.relative_to(folder), numbers)) for path in files]


def name_of(folder: Path) -> str:
    """What results name a folder of pictures by: a name that any file can hold, whatever bytes the folder's has."""
    return os.fsencode(folder.resolve().name).decode(errors="replace")


def _walk(root: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()  # a link may lead back
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        identity = (folder.stat().st_dev, folder.stat().st_ino)
        if identity in seen:
            folders.clear()
        else:
            seen.add(identity)
            yield from (folder / file for file in files if Path(file).suffix.lower() in SUFFIXES)


def _label(path: Path, numbers: dict[str, int]) -> int | None:
    return next((numbers[name] for name in reversed(path.parts[:-1]) if name in numbers), None)
