"""From what a caller has to the encoded bytes that are sent. Neither NumPy nor Pillow is imported."""

import io
import os
import struct
import sys
import zlib
from typing import IO, Any, Protocol, TypeAlias

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
_TIFF_MODES = ("I", "F", "LAB", "I;16L")  # neither in PNG nor in 8 bits: the server decides, as for their files
_TRANSPARENT_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # and what PNG has for them
_ORIENTATION = 0x112  # the tag of EXIF
_PNG_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # by channels: grey, RGB, RGBA


class BinaryFile(Protocol):
    """A file opened in binary mode, or anything else that gives bytes when it is read."""

    def read(self) -> bytes: ...


class PilImage(Protocol):
    """What is used of a PIL image."""

    @property
    def mode(self) -> str: ...
    def convert(self, mode: str, /) -> "PilImage": ...
    def getexif(self) -> Any: ...
    def save(self, fp: IO[bytes], kind: str, /, *, exif: Any) -> None: ...


class Array(Protocol):
    """What is used of a NumPy array: uint8 (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


Image: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | PilImage | Array
"""A path, encoded bytes, a file opened in binary mode, a PIL image, or a NumPy array of uint8."""


def encoded(image: Image) -> bytes:
    """The bytes to send for an image. Raises TypeError for what is none, and OSError for what can't be read."""
    try:
        return _encoded(image)
    except (OSError, TypeError, MemoryError):
        raise
    except Exception as error:  # Pillow raises almost anything of a damaged file, and a closed one ValueError
        raise OSError(f"the image can't be read: {type(error).__name__}: {error}") from error


def _encoded(image: Image) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return file.read()
    if _is_a(image, "PIL.Image", "Image"):
        return _encoded_pil(image)
    if _is_a(image, "numpy", "ndarray"):
        return _encoded_array(image)
    read = getattr(image, "read", None)
    content = read() if callable(read) else None
    if not isinstance(content, bytes):
        raise TypeError(
            "an image must be a path, bytes, a file opened in binary mode, a PIL image or a NumPy array, "
            f"not {type(image).__name__}"
        )
    return content


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether it is an instance of a library's class: who has one has imported the library already."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))


def _encoded_pil(image: Any) -> bytes:
    """A PNG, or a TIFF of what PNG has not, to be turned as its EXIF says: the same picture as its file."""
    image.load()  # which turns a TIFF
    exif = image.getexif()
    turned = type(exif)()
    if _ORIENTATION in exif:
        turned[_ORIENTATION] = exif[_ORIENTATION]
    kept = image.mode in _PNG_MODES + _TIFF_MODES
    plain = image if kept else image.convert(_TRANSPARENT_MODES.get(image.mode, "RGB"))
    content = io.BytesIO()
    plain.save(content, "TIFF" if image.mode in _TIFF_MODES else "PNG", exif=turned)
    return content.getvalue()


def _encoded_array(array: Any) -> bytes:
    """A PNG of an array, lossless."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype.str != "|u1" or array.ndim not in (2, 3) or channels not in _PNG_COLOUR_TYPES or not array.size:
        raise TypeError(
            "an array must be uint8 of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), with at least one pixel, "
            f"not {array.dtype} {tuple(array.shape)}"
        )
    height, width = array.shape[:2]
    pixels, stride = array.tobytes(), width * channels
    # each row begins with its filter: 0, none
    rows = b"".join(b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride))
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
