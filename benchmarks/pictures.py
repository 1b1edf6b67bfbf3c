"""Pictures to send: JPEGs of the size of ImageNet's usual photograph, made by code, the same on every machine.

The golden drawings of export/drawings.py are enlarged and covered with noise of every scale, as photographs have it, so
that decoding costs what it does with photographs: 500 x 375 pixels, and about as many bytes as ImageNet's mean, 110 kB.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet_ensemble.export.drawings import pictures
from resnet_ensemble.training.pixels import SUFFIXES

WIDTH, HEIGHT = 500, 375
_DRAWN = ("ship", "airplane", "truck", "frog")
_OCTAVES = (2, 4, 8, 16, 32, 64, 128, 256)  # cells of noise across the picture
_FINEST = 14  # brightness levels of the noise of single pixels, to either side
_QUALITY = 96
MOST = 64  # files of a folder that are sent in turn


def draw(count: int) -> list[bytes]:
    """So many JPEGs, no two alike."""
    drawings = pictures()
    return [_photograph(drawings[_DRAWN[i % len(_DRAWN)]], seed=i) for i in range(count)]


def read(folder: Path) -> list[bytes]:
    """The first files of a folder of pictures, by name. Raises SystemExit if there are none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)[:MOST]
    if not files:
        raise SystemExit(f"no pictures in {folder} ({', '.join(SUFFIXES)})")
    return [file.read_bytes() for file in files]


def _photograph(drawing: bytes, seed: int) -> bytes:
    image = Image.open(io.BytesIO(drawing)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    random = np.random.default_rng(seed)
    pixels = np.asarray(image, np.float32) + _noise(random)
    pixels += random.integers(-_FINEST, _FINEST + 1, pixels.shape)
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()


def _noise(random: np.random.Generator) -> NDArray[np.float32]:
    """(h, w, 3): coarse structure is strong and fine structure weak, as in photographs."""
    total = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells in _OCTAVES:
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        fine = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        total += (fine - 127.5) / 255 * 40 / cells**0.3
    return total
