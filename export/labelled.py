"""Pictures in folders, labelled by the names of the folders."""

import re
from dataclasses import dataclass
from pathlib import Path

from resnet_ensemble.training.files import read_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


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
    as many of those as labels, whose order is the labels'.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if files else []
    if len(names) == len(labels) and all(re.fullmatch(r"n\d{8}", name) for name in names):
        labels = tuple(names)
    numbers = {label: number for number, label in reversed([*enumerate(labels)])}  # of equal ones the first
    return [Picture(path, _label(path.relative_to(folder), numbers)) for path in files]


def _label(path: Path, numbers: dict[str, int]) -> int | None:
    return next((numbers[name] for name in reversed(path.parts[:-1]) if name in numbers), None)
