"""What a file of an image consists of: hostile ones have far too many pieces.

Pillow walks the segments of a JPEG, the chunks of a PNG and the blocks of a GIF one by one, in Python, and unpacks what
is in them; meanwhile the threads that answer others wait for the interpreter. 20 MiB of empty comments kept a thread
busy for 16 s in a JPEG and 3 s in a GIF, as much padding in a JPEG for 15 s, and empty chunks in a PNG for 10 s; now
that takes 0.3 s at most (Pillow 13.0.0, two Zen 3 cores, 2026-11-26). A TIFF of 1 MB that lists 500,000 strips had
not ended after 110 s, 18 MiB of EXIF data took 30 s or 3 GB, 20 MiB of runs in a BMP 10 s (2026-11-28).
"""

import io
import re
import struct

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.training.pixels import MAX_EXIF_BYTES

# A progressive JPEG of few bytes can make a decoder pass over all its pixels thousands of times. Encoders write ten
# scans or so.
MAX_SCANS = 64
# Colour profiles, depth maps and the like come in segments of 64 KiB: an image of 20 MiB has no more than 320 of them.
MAX_SEGMENTS = 1000
MAX_PADDING = 2**16  # bytes between segments
MAX_CHUNKS = 1000  # of a PNG, without those of pixels
MAX_PIXEL_CHUNKS = 2**14  # libpng's have 8 KiB each
MAX_RUNS = 2**20  # bytes of a BMP that is compressed: Pillow unpacks those in Python
MAX_ENTRIES = 1000  # of a TIFF's directory
MAX_NUMBERS = 2**14  # that one entry has, such as where each strip begins
MAX_GIF_READS = 2**16  # before the pixels; two for each block, which has 255 bytes at most

_JPEG, _PNG, _GIF, _BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM"
# As Pillow takes them, which reads those with 64 bits as such only where 43 is the third byte.
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTES = (1, 2, 7)  # types of a TIFF's entries that are not read one by one: bytes, text, undefined
_EXIF, _APP1 = b"Exif\0\0", 0xE1
# What has a length, or ends the image. In a scan's data, 0xff is followed by 0x00 or a restart marker; TEM (0x01) and
# another SOI (0xd8) have no length, either: what follows them would be taken for one, and hide so many bytes.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # frames that are not progressive: baseline, extended, with arithmetic coding
_PIXELS, _END = (b"IDAT", b"fdAT", b"fcTL"), b"IEND"


def check(content: bytes) -> None:
    """Raise ApiError if a JPEG, PNG, TIFF or BMP has too many pieces; GIFs are counted as they are read.

    What else it is, and whether it is sound, decoders say.
    """
    if content.startswith(_JPEG):
        _check_jpeg(content)
    elif content.startswith(_PNG):
        _check_png(content)
    elif content[:4] in _TIFF:
        _check_tiff(content)
    elif content.startswith(_BMP) and len(content) > MAX_RUNS and content[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise ApiError("corrupt_image", f"the BMP is compressed, and has more than {MAX_RUNS} bytes")


def reader(content: bytes) -> io.BytesIO:
    """For Pillow. Of a GIF it raises OSError after too many reads: where its blocks end depends on who reads them."""
    return _Counting(content) if content.startswith(_GIF) else io.BytesIO(content)


class _Counting(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._left = MAX_GIF_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise OSError(f"the GIF has more than {MAX_GIF_READS // 2} blocks before its pixels")
        return super().read(size)


def _check_jpeg(jpeg: bytes) -> None:
    """The first picture. Segments are walked by their lengths, scans' data by their markers."""
    position, segments, padding, scans, exif = 2, 0, 0, 0, 0
    sequential, components = False, b""
    while marker := _MARKER.search(jpeg, position):
        kind, start = marker[1][0], marker.end()
        if kind == _END_OF_IMAGE and scans:
            return
        segments += 1
        padding += 0 if scans else marker.start() - position
        if segments > MAX_SEGMENTS or padding > MAX_PADDING or exif > MAX_EXIF_BYTES:
            raise ApiError(
                "corrupt_image",
                f"the JPEG has more than {MAX_SEGMENTS} segments or {MAX_EXIF_BYTES} bytes of EXIF data, or is mostly "
                "padding",
            )
        exif += _size_of_exif(jpeg, kind, start)
        if kind in _SEQUENTIAL:
            sequential, components = True, jpeg[start + 7 : start + 8]
        if kind == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ApiError("too_many_scans", f"the JPEG has more than {MAX_SCANS} scans, which is the limit")
            if sequential and jpeg[start + 2 : start + 3] == components:
                return  # this scan has everything, as in most files, and decoders look at nothing after it
        # The end of an image that has not begun has no length, and Pillow goes on after it.
        position = start if kind == _END_OF_IMAGE else start + int.from_bytes(jpeg[start : start + 2])
    if not scans and len(jpeg) - position > MAX_PADDING:
        raise ApiError("corrupt_image", "the JPEG has no picture")


def _size_of_exif(jpeg: bytes, kind: int, start: int) -> int:
    if kind != _APP1 or jpeg[start + 2 : start + 2 + len(_EXIF)] != _EXIF:
        return 0
    return int.from_bytes(jpeg[start : start + 2])


def _check_png(png: bytes) -> None:
    position, chunks, of_pixels = len(_PNG), 0, 0
    while position < len(png) and (kind := png[position + 4 : position + 8]) != _END:
        if kind in _PIXELS:
            of_pixels += 1
        else:
            chunks += 1
        if chunks > MAX_CHUNKS or of_pixels > MAX_PIXEL_CHUNKS:
            raise ApiError(
                "corrupt_image", f"the PNG has more than {MAX_CHUNKS} chunks, or {MAX_PIXEL_CHUNKS} chunks of pixels"
            )
        position += 12 + int.from_bytes(png[position : position + 4])


def _check_tiff(tiff: bytes) -> None:
    """The first directory, which the first picture has. Pillow makes a step of each strip, and reads all values."""
    order, large = "<" if tiff.startswith(b"II") else ">", tiff[2:3] == b"+"
    place, count, entry = ("Q", "Q", "HHQQ") if large else ("I", "H", "HHII")
    try:
        (start,) = struct.unpack_from(order + place, tiff, 8 if large else 4)
        (entries,) = struct.unpack_from(order + count, tiff, start)
        if entries > MAX_ENTRIES:
            raise ApiError("corrupt_image", f"the TIFF has more than {MAX_ENTRIES} entries")
        first, size = start + struct.calcsize(order + count), struct.calcsize(order + entry)
        total = 0
        for i in range(entries):
            _, kind, numbers, _ = struct.unpack_from(order + entry, tiff, first + i * size)
            total += numbers * _WIDTHS.get(kind, 0)
            if (kind not in _BYTES and numbers > MAX_NUMBERS) or total > len(tiff):
                raise ApiError("corrupt_image", f"an entry of the TIFF has more than {MAX_NUMBERS} values or overlaps")
    except struct.error:
        return  # it is cut off, as Pillow will say
