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
# A segment of a JPEG has half as much. With more, the picture is shown as it lies: Pillow reads values one by one, in
# Python, and for 18 MiB of them it took 30 s, or 3 GB.
MAX_EXIF_BYTES = 2**17
_OF_EXIF = ("exif", "Raw profile type exif")
_OF_XMP = ("XML:com.adobe.xmp", "xmp")
_BACKGROUND = (255, 255, 255)
_BAND = 2**20  # pixels that are laid on the background at a time: with all, 50 million took 1 GB


class PixelsUnsupported(Exception):
    """The pixels can't be read as colours; the message says why."""


def is_extreme(size: tuple[int, int]) -> bool:
    """Whether a picture of this width and height is too long for what it is wide."""
    return max(size) > MAX_ASPECT_RATIO * min(size)


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture, upright (EXIF orientation), as RGB; transparency becomes white. Raises PixelsUnsupported."""
    with suppress(Exception):  # damaged EXIF data around a sound picture: show it as it lies
        _turn_upright(image)
    if image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise PixelsUnsupported(
            f"pixels of the type {image.mode} have no agreed brightness; convert them to 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        return _on_background(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy would cost 4 % of decoding


def _turn_upright(image: Image.Image) -> None:
    for key in _OF_EXIF:
        if len(image.info.get(key, b"")) > MAX_EXIF_BYTES:
            del image.info[key]
    image.getexif()  # reads the orientation, and keeps it
    for key in (*_OF_EXIF, *_OF_XMP):
        image.info.pop(key, None)  # or they would be written anew, without the orientation
    ImageOps.exif_transpose(image, in_place=True)


def _on_background(image: Image.Image) -> Image.Image:
    width, height = image.size
    rows = max(1, _BAND // width)
    opaque = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        behind = Image.new("RGBA", band.size, _BACKGROUND)
        opaque.paste(Image.alpha_composite(behind, band).convert("RGB"), (0, top))
    return opaque


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Of grey with more. Pillow's own conversion clips it to white.

    In a TIFF it may have 12 bits, and white may be 0, which Pillow looks after with 8 bits only.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    white_is_0 = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return Image.fromarray(255 - grey if white_is_0 else grey)
