"""What one test-time view is, and the protocols. NumPy and Pillow, no torch: training and serving both use it.

A picture becomes views in three steps: resize its shorter side, pad it with the mean colour, cut windows out of it
and out of its mirror. The geometry is torchvision's `Resize` on a PIL image, `Pad`, `FiveCrop` and `TenCrop`, to the
pixel (tests/training/test_views.py compares them), which is also what the paper's ten crops are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Position = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]
POSITIONS: tuple[Position, ...] = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


@dataclass(frozen=True)
class View:
    """One test-time input: a window on the resized image, or on its mirror.

    The window of a mirrored view is placed on the mirrored image, as in torchvision's `TenCrop`: when the margin is
    odd, the mirrored centre is not quite the mirror of the centre.
    """

    position: Position
    mirrored: bool = False


PROTOCOLS: dict[str, tuple[View, ...]] = {
    "center": (View("center"),),
    "flip": (View("center"), View("center", mirrored=True)),
    "10crop": tuple(View(position, mirrored) for mirrored in (False, True) for position in POSITIONS),
}


@dataclass(frozen=True)
class WholeView:
    """One test-time input for the fully convolutional network: the whole resized image, or its mirror.

    `scale` is the shorter side in sevenths of a crop; None: the member's own `resize`.
    """

    scale: int | None = None
    mirrored: bool = False


# The paper's Table 4: shorter side 224, 256, 384, 480, 640 for a crop of 224.
SCALES = (7, 8, 12, 15, 20)
DENSE_PROTOCOLS: dict[str, tuple[WholeView, ...]] = {
    "dense": tuple(WholeView(None, mirrored) for mirrored in (False, True)),
    "multiscale": tuple(WholeView(scale, mirrored) for scale in SCALES for mirrored in (False, True)),
}
LONGEST = 2  # times the shorter side; of an even longer image, the middle is seen
ALL_PROTOCOLS = (*PROTOCOLS, *DENSE_PROTOCOLS)


@dataclass(frozen=True)
class Preprocessing:
    """How a member wants to see a picture; it belongs to each checkpoint, never to the server.

    - resize: pixels of the shorter side after resizing (bilinear, antialiased, the longer side rounded down)
    - crop: pixels of a view's side
    - padding: pixels of the mean colour added on each side of the resized image
    - mean, std: per channel, red green blue, in units of 0 to 1; applied inside the exported graph
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.resize, self.crop) < 1 or self.padding < 0:
            raise ValueError(f"resize {self.resize}, crop {self.crop} and padding {self.padding} must be positive")
        if self.crop > self.resize + 2 * self.padding:
            raise ValueError(f"a crop of {self.crop} does not fit into {self.resize} + 2 * {self.padding} pixels")
        if not all(0 <= channel <= 1 for channel in self.mean) or not all(channel > 0 for channel in self.std):
            raise ValueError(f"mean {self.mean} must lie in 0 to 1 and std {self.std} above 0")

    @property
    def quantum(self) -> int:
        """Sides of whole views are multiples of it, so that few shapes share batches: 32 for a crop of 224."""
        return max(1, self.crop // 7)


def make_views(image: Image.Image, preprocessing: Preprocessing, protocol: str) -> NDArray[np.uint8]:
    """The views of an RGB image under a protocol: uint8 (views, crop, crop, 3), in the protocol's order.

    The border is made only if a view shows some of it: without it, a server has 1.03 times the images/s (CIFAR-10
    center, one member, 1, 8 and 32 clients, 30 rounds; two Zen 4 cores, 2026-11-26).
    """
    resized = resize(image, preprocessing.resize)
    seen = {False: resized}
    if any(view.mirrored for view in PROTOCOLS[protocol]):
        seen[True] = mirror(resized)
    pixels = {mirrored: np.asarray(picture) for mirrored, picture in seen.items()}  # (h, w, 3)
    crop, border = preprocessing.crop, preprocessing.padding
    height, width, _ = pixels[False].shape
    windows = [corner(view.position, height + 2 * border, width + 2 * border, crop) for view in PROTOCOLS[protocol]]
    windows = [(top - border, left - border) for top, left in windows]
    if not all(0 <= top <= height - crop and 0 <= left <= width - crop for top, left in windows):
        colour = mean_colour(preprocessing.mean)
        pixels = {mirrored: pad(one, border, colour) for mirrored, one in pixels.items()}
        windows = [(top + border, left + border) for top, left in windows]
    views = np.empty((len(windows), crop, crop, 3), np.uint8)
    for out, view, (top, left) in zip(views, PROTOCOLS[protocol], windows, strict=True):
        out[:] = pixels[view.mirrored][top : top + crop, left : left + crop]
    return views


def make_whole_views(image: Image.Image, preprocessing: Preprocessing, protocol: str) -> list[NDArray[np.uint8]]:
    """The views of an RGB image under a dense protocol, each uint8 (h, w, 3), in the protocol's order.

    The longer side is rounded to a multiple of the quantum, from the shorter side to twice of it.
    """
    resized: dict[int, Image.Image] = {}
    made: list[NDArray[np.uint8]] = []
    for view in DENSE_PROTOCOLS[protocol]:
        shorter = shorter_side(view.scale, preprocessing)
        if shorter not in resized:
            resized[shorter] = _resize_whole(image, shorter, preprocessing.quantum)
        picture = resized[shorter]
        made.append(np.asarray(mirror(picture) if view.mirrored else picture))
    return made


def shorter_side(scale: int | None, preprocessing: Preprocessing) -> int:
    """Pixels of the shorter side of a whole view of this scale: of a crop or more, so that its network has a score."""
    crop, quantum = preprocessing.crop, preprocessing.quantum
    side = preprocessing.resize if scale is None else quantum * round(crop * scale / SCALES[0] / quantum)
    return max(side, crop)


def block_sizes(protocol: str) -> tuple[int, ...]:
    """How many views each block of `make_blocks` has: all crops are one block, each scale of whole views another."""
    if protocol in PROTOCOLS:
        return (len(PROTOCOLS[protocol]),)
    scales = [view.scale for view in DENSE_PROTOCOLS[protocol]]
    return tuple(scales.count(scale) for scale in dict.fromkeys(scales))


def block_pixels(preprocessing: Preprocessing, protocol: str, size: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
    """Pixels of one view of each block. `size`: the image's width and height, whose ratio whole views have."""
    if protocol in PROTOCOLS:
        return (preprocessing.crop**2,)
    sides = (
        shorter_side(scale, preprocessing) for scale in dict.fromkeys(view.scale for view in DENSE_PROTOCOLS[protocol])
    )
    return tuple(math.prod(_whole_size(size, side, preprocessing.quantum)) for side in sides)


def largest_side(preprocessing: Preprocessing, protocol: str) -> int:
    """Pixels of the shorter side of the largest picture that a protocol's views are cut from."""
    if protocol in PROTOCOLS:
        return preprocessing.resize
    return max(shorter_side(view.scale, preprocessing) for view in DENSE_PROTOCOLS[protocol])


def can_be_view(height: int, width: int, preprocessing: Preprocessing) -> bool:
    """Whether some protocol makes views of this size, from some image."""
    if height == width == preprocessing.crop:
        return True
    shorter, longer = min(height, width), max(height, width)
    sides = {shorter_side(scale, preprocessing) for scale in (None, *SCALES)}
    quantum = preprocessing.quantum
    return shorter in sides and (
        longer == shorter or (longer % quantum == 0 and longer <= quantum * round(LONGEST * shorter / quantum))
    )


def make_blocks(image: Image.Image, preprocessing: Preprocessing, protocol: str) -> list[NDArray[np.uint8]]:
    """The views of an RGB image under any protocol, as arrays (views, h, w, 3) of one shape each, in its order."""
    if protocol in PROTOCOLS:
        return [make_views(image, preprocessing, protocol)]
    whole = iter(make_whole_views(image, preprocessing, protocol))
    return [np.stack([next(whole) for _ in range(size)]) for size in block_sizes(protocol)]


def _whole_size(size: tuple[int, int], shorter: int, quantum: int) -> tuple[int, int]:
    """Width and height of the whole view of an image of this size."""
    width, height = size
    aspect = min(max(size) / min(size), LONGEST)
    longer = max(shorter, quantum * round(shorter * aspect / quantum))
    return (shorter, longer) if width <= height else (longer, shorter)


def _resize_whole(image: Image.Image, shorter: int, quantum: int) -> Image.Image:
    width, height = image.size
    # The middle of the image, if one side is more than LONGEST times the other: left, top, right, bottom.
    seen_width, seen_height = min(width, LONGEST * height), min(height, LONGEST * width)
    left, top = (width - seen_width) // 2, (height - seen_height) // 2
    size = _whole_size(image.size, shorter, quantum)
    box = (left, top, left + seen_width, top + seen_height)
    if size == image.size and (seen_width, seen_height) == image.size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def resize(image: Image.Image, shorter_side: int) -> Image.Image:
    """Resize so that the shorter side has that many pixels, as torchvision's `Resize` does."""
    width, height = image.size
    if width <= height:
        size = (shorter_side, int(shorter_side * height / width))
    else:
        size = (int(shorter_side * width / height), shorter_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def mirror(image: Image.Image) -> Image.Image:
    """Left and right exchanged: by Pillow, since ten crops of a photograph take 2.6 ms so, and 5.8 with NumPy."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def pad(pixels: NDArray[np.uint8], padding: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Surround (h, w, 3) by `padding` pixels of one colour."""
    height, width, _ = pixels.shape
    padded = np.empty((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[:] = colour
    padded[padding : padding + height, padding : padding + width] = pixels
    return padded


def corner(position: Position, height: int, width: int, crop: int) -> tuple[int, int]:
    """Top and left of a window. Halves round to even, as in torchvision's `center_crop`."""
    if position == "center":
        return round((height - crop) / 2), round((width - crop) / 2)
    vertical, horizontal = position.split("-")
    return (0 if vertical == "top" else height - crop), (0 if horizontal == "left" else width - crop)


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The byte colour nearest to a mean given in units of 0 to 1."""
    red, green, blue = (round(255 * channel) for channel in mean)
    return red, green, blue
