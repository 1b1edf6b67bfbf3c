"""A picture's pixels, however it is stored: RGB and upright, the same for calibration as in the server."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

# JPEG includes MPO, which many phones write: a JPEG that holds more than one picture.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# What files of these formats are named.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Resizing the shorter side of a 1 x 60,000 image to 256 pixels would make a 15 million pixel wide one.
MAX_ASPECT_RATIO = 100
_BACKGROUND = (255, 255, 255)


class PixelsUnsupported(Exception):
    """The pixels can't be read as colours; the message says why."""


def is_extreme(size: tuple[int, int]) -> bool:
    """Whether a picture of this width and height is too long for what it is wide."""
    return max(size) > MAX_ASPECT_RATIO * min(size)


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture, upright (EXIF orientation), as RGB; transparency becomes white. Raises PixelsUnsupported."""
    with suppress(Exception):  # damaged EXIF data around a sound picture: show it as it lies
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise PixelsUnsupported(
            f"pixels of the type {image.mode} have no agreed brightness; convert them to 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        opaque = Image.new("RGBA", rgba.size, _BACKGROUND)
        return Image.alpha_composite(opaque, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy would cost 4 % of decoding


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Of grey with more. Pillow's own conversion clips it to white.

    In a TIFF it may have 12 bits, and white may be 0, which Pillow looks after with 8 bits only.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    white_is_0 = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return Image.fromarray(255 - grey if white_is_0 else grey)
