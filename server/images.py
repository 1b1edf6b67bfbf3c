"""Bytes from a stranger to an RGB image, safely.

The format must be on the list, limits are checked on the header before any pixel is decoded, and whatever a decoder
does with hostile bytes ends as an ApiError.

JPEGs are decoded whole unless the caller asks for a draft, which only `calibrated` does, and only where its certificate
covers that (server/thresholds.py): a decoder can make a JPEG 2, 4 or 8 times smaller as it goes. In the server, drafts
at 1/4 for ImageNet networks took 0.47 of the time: 23 instead of 52 ms for photographs that were enlarged to 12 million
pixels, 1 MB each (n = 24, medians of 3 interleaved runs). Noise added to such, 2.4 MB each, made it 0.62 instead of
0.46 (n = 8, processor time): every bit is read at any scale. Views changed by 0.2 of 255 levels on average and by up to
6, and no label of all views did (n = 143, two networks, `dense`). Of 49 photographs of ordinary size, 1 got another
label by the ten crops of the CIFAR-10 ensemble, whose views changed by 0.3 levels on average and by up to 10.

Sides must be multiples of the scale. If they were rounded, so would the shape be: of 141 photographs, 35 had a column
more or less for CIFAR-10's views, views changed by 2.1 levels on average and by up to 149, and 9 labels changed. (Two
Zen 3 cores with AVX2 that had other work, Pillow 13.0.0, 2026-11-25.)
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from resnet_ensemble.server import pieces
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.training.pixels import FORMATS, MAX_ASPECT_RATIO, PixelsUnsupported, is_extreme, to_rgb

# How files of these formats begin: what begins so and can't be opened is damaged, not unsupported.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_SCALES = (8, 4, 2)  # a decoder makes a JPEG so many times smaller for less than the whole costs

# Pillow's own limit only warns, per process; `decode` refuses on the caller's limit, before decoding.
Image.MAX_IMAGE_PIXELS = None


def decode(content: bytes, *, max_pixels: int, draft: int | None = None) -> Image.Image:
    """The first frame, upright (EXIF orientation), as RGB; transparency becomes white. Raises ApiError.

    - draft: pixels that the shorter side of a JPEG must keep, which may be decoded at 1/2, 1/4 or 1/8. None: whole

    Limits are of the whole picture in any case.
    """
    if not content:
        raise ApiError("empty_image", "the image has 0 bytes")
    pieces.check(content)
    image = _open(content)
    _check_size(image.size, max_pixels)
    try:
        if draft is not None:
            _make_draft(image, draft)
        # In one step: between steps, a thread waits for the interpreter, which others may have. Where there are many
        # tiles, as much would be read for each.
        if len(image.tile) == 1:
            image.decodermaxblock = len(content)
        image.load()
        return to_rgb(image)
    except PixelsUnsupported as error:
        raise ApiError("unsupported_pixel_type", str(error)) from None
    except MemoryError:
        raise ApiError("overloaded", "there is no memory to decode the image", retry_after=1, reason="memory") from None
    except Exception as error:  # decoders raise almost anything when fed hostile bytes
        raise ApiError("corrupt_image", f"the {image.format} can't be decoded: {_reason(error)}") from error


def is_drafted(content: bytes, draft: int) -> bool:
    """Whether `decode` makes it smaller with this `draft`. Looks at the header only. Raises ApiError."""
    return _make_draft(_open(content), draft)


def from_pixels(pixels: NDArray[np.uint8], *, max_pixels: int) -> Image.Image:
    """An image from its RGB pixels (h, w, 3). Raises ApiError."""
    height, width, _ = pixels.shape
    _check_size((width, height), max_pixels)
    return Image.fromarray(pixels)


def _open(content: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(pieces.reader(content), formats=FORMATS)
    except UnidentifiedImageError:
        if content.startswith(_SIGNATURES) or content[4:12] == b"ftypavif":
            raise ApiError("corrupt_image", "the image's header is damaged or cut off") from None
        raise ApiError("unsupported_image_format", f"the bytes are none of {', '.join(FORMATS)}") from None
    except Exception as error:  # as above: a header can be hostile too
        raise ApiError("corrupt_image", f"the image's header can't be read: {_reason(error)}") from error


def _make_draft(image: Image.Image, shorter_side: int) -> bool:
    """Have the decoder make a picture smaller that is not loaded yet, if it can. Whether it will."""
    width, height = image.size
    for scale in _SCALES:
        size = width // scale, height // scale
        if (size[0] * scale, size[1] * scale) == image.size and min(size) >= shorter_side:
            image.draft(None, size)  # of the formats here, JPEG and MPO can; others ignore it
            return image.size == size
    return False


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ApiError("corrupt_image", f"the image says that it is {width} x {height} pixels")
    if width * height > max_pixels:
        raise ApiError("too_many_pixels", f"the image has {width} x {height} pixels; at most {max_pixels} are allowed")
    if is_extreme(size):
        raise ApiError(
            "extreme_aspect_ratio",
            f"the image is {width} x {height}; one side may be {MAX_ASPECT_RATIO} times the other",
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
