"""Files of ordinary many pieces, which are let through, and of far too many."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from resnet_ensemble.server import pieces
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.images import decode
from resnet_ensemble.server.pieces import (
    MAX_CHUNKS,
    MAX_ENTRIES,
    MAX_EXIF_BYTES,
    MAX_GIF_READS,
    MAX_NUMBERS,
    MAX_PADDING,
    MAX_PIXEL_CHUNKS,
    MAX_RUNS,
    MAX_SCANS,
    MAX_SEGMENTS,
)

END = b"\xff\xd9"
COMMENT = b"\xff\xfe\0\2"
PNG = b"\x89PNG\r\n\x1a\n"


def encode(format: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, format, **options)
    return content.getvalue()


def verdict(content: bytes) -> str | None:
    """The code of the refusal. None: it is let through, and Pillow reads it."""
    try:
        pieces.check(content)
    except ApiError as error:
        return error.code
    assert decode(content, max_pixels=10_000).size == (48, 32)
    return None


@pytest.mark.parametrize("format", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_ordinary_files_are_let_through(format: str) -> None:
    assert verdict(encode(format)) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", PNG, PNG + b"\0"])
def test_what_is_cut_off_is_left_to_decoders(content: bytes) -> None:
    pieces.check(content)


def test_a_progressive_jpeg_has_a_few_scans_and_not_a_thousand() -> None:
    progressive = encode("JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]

    assert verdict(progressive) is None
    assert verdict(progressive + b"\xff\xda" * 1000) is None  # a phone's video after the picture
    assert verdict(progressive[:-2] + last_scan * MAX_SCANS + END) == "too_many_scans"


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd8"])
def test_scans_do_not_hide_behind_a_marker_that_has_no_length(marker: bytes) -> None:
    """What follows it would be taken for the length of a segment, and so much skipped."""
    progressive = encode("JPEG", progressive=True)
    header = progressive[(start := progressive.rindex(b"\xff\xda")) : start + 10]  # of a scan without data

    assert verdict(progressive[:-2] + marker + header * 1000 + END) == "too_many_scans"


def test_a_baseline_jpeg_may_have_its_components_apart_but_not_a_thousand_scans() -> None:
    grey = encode("JPEG", "L")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    one = grey[frame + 11 : frame + 13]  # of a component: sampling and quantization table
    components = b"".join(bytes((number,)) + one for number in (1, 2, 3))
    head = grey[: frame + 2] + b"\0\x11" + grey[frame + 4 : frame + 9] + b"\3" + components + grey[frame + 13 : scan]
    scans = [grey[scan : scan + 5] + bytes((number,)) + grey[scan + 6 : -2] for number in (1, 2, 3)]

    assert verdict(head + b"".join(scans) + END) is None
    assert verdict(head + b"".join(scans) * 1000 + END) == "too_many_scans"


def test_a_jpeg_may_have_hundreds_of_segments_but_not_more_than_the_limit() -> None:
    jpeg = encode("JPEG")
    own = 9  # segments that Pillow writes before the scan, and the scan

    assert verdict(jpeg[:2] + COMMENT * (MAX_SEGMENTS - own) + jpeg[2:]) is None
    assert verdict(jpeg[:2] + COMMENT * MAX_SEGMENTS + jpeg[2:]) == "corrupt_image"


@pytest.mark.parametrize("marker", [END, b"\xff\xd8", b"\xff\x01\xff\xd8", b"\xff\xd0"])
def test_segments_do_not_hide_behind_a_marker_that_pillow_passes(marker: bytes) -> None:
    jpeg = encode("JPEG")

    assert verdict(jpeg[:2] + marker + COMMENT * 20_000 + jpeg[2:]) == "corrupt_image"


def test_segments_between_scans_count_too() -> None:
    progressive = encode("JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")

    assert verdict(progressive[:last] + COMMENT * 100 + progressive[last:]) is None
    assert verdict(progressive[:last] + COMMENT * MAX_SEGMENTS + progressive[last:]) == "corrupt_image"


@pytest.mark.parametrize("byte", [b"\xff", b"\0"])
def test_a_jpeg_may_be_padded_but_not_without_end(byte: bytes) -> None:
    jpeg = encode("JPEG")
    quantization = jpeg.index(b"\xff\xdb")

    assert verdict(jpeg[:quantization] + byte * 1000 + jpeg[quantization:]) is None
    assert verdict(jpeg[:quantization] + byte * 2 * MAX_PADDING + jpeg[quantization:]) == "corrupt_image"
    assert verdict(jpeg[:quantization] + byte * 2 * MAX_PADDING) == "corrupt_image"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_a_png_may_have_hundreds_of_chunks_but_not_more_than_the_limit(place: bytes) -> None:
    png = encode("PNG")
    start = png.index(place) - 4

    assert verdict(png[:start] + chunk(b"prIv") * (MAX_CHUNKS - 1) + png[start:]) is None  # and IHDR
    assert verdict(png[:start] + chunk(b"prIv") * MAX_CHUNKS + png[start:]) == "corrupt_image"


def test_pixels_of_a_png_come_in_as_many_chunks_as_encoders_make() -> None:
    png = encode("PNG")
    end = png.index(b"IEND") - 4

    assert verdict(png[:end] + chunk(b"IDAT") * (MAX_PIXEL_CHUNKS - 1) + png[end:]) is None
    assert verdict(png[:end] + chunk(b"IDAT") * MAX_PIXEL_CHUNKS + png[end:]) == "corrupt_image"


def test_what_follows_the_end_of_a_png_is_not_counted() -> None:
    assert verdict(encode("PNG") + chunk(b"prIv") * 2 * MAX_CHUNKS) is None


def test_texts_in_a_png_are_let_through() -> None:
    texts = PngImagePlugin.PngInfo()
    for number in range(100):
        texts.add_text(f"key {number}", "text")

    assert verdict(encode("PNG", pnginfo=texts)) is None


@pytest.mark.parametrize(
    "block", [b"!\xfe\0", b"!\xfe\1a\0", b"!\xf9\4\0\0\0\0\0", b"?", b"!\xff\x0bNETSCAPE2.0\0\1a\0"]
)
def test_a_gif_may_have_a_hundred_blocks_before_its_pixels_but_not_a_million(block: bytes) -> None:
    gif = encode("GIF")
    start = 13 + 3 * 256  # after the palette

    assert verdict(gif[:start] + block * 100 + gif[start:]) is None
    with pytest.raises(ApiError, match="blocks before its pixels") as refused:
        decode(gif[:start] + block * MAX_GIF_READS + gif[start:], max_pixels=10_000)
    assert refused.value.code == "corrupt_image"


def test_a_gif_of_many_pixels_is_let_through() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "GIF")

    assert len(content.getvalue()) > 2**23  # some 40,000 blocks
    assert decode(content.getvalue(), max_pixels=9_000_000).size == (3000, 3000)


def tiff(*entries: tuple[int, int, int], order: str = "<", large: bool = False, behind: int = 0) -> bytes:
    """A grey TIFF of 48 x 32 pixels with further entries (tag, type, values), which all lie at the same place."""
    usual = [(256, 3, 1), (257, 3, 1), (258, 3, 1), (259, 3, 1), (262, 3, 1), (277, 3, 1), (278, 3, 1)]
    values = {256: 48, 257: 32, 258: 8, 259: 1, 262: 1, 277: 1, 278: 32}
    everything = sorted([*usual, *entries])
    head = {False: struct.pack(order + "2sHI", b"", 42, 8), True: struct.pack(order + "2sHHHQ", b"", 43, 8, 0, 16)}[
        large
    ]
    count, entry = ("Q", "HHQ") if large else ("H", "HHI")
    width = 8 if large else 4
    start = (
        len(head) + struct.calcsize(order + count) + len(everything) * (struct.calcsize(order + entry) + width) + width
    )
    directory = struct.pack(order + count, len(everything))
    for tag, kind, numbers in everything:
        inside = struct.pack(order + "H", values[tag]) if tag in values else struct.pack(order + "QI"[not large], start)
        directory += struct.pack(order + entry, tag, kind, numbers) + inside.ljust(width, b"\0")
    letters = b"II" if order == "<" else b"MM"
    return letters + head[2:] + directory + bytes(width) + bytes(behind)


@pytest.mark.parametrize(("order", "large"), [("<", False), (">", False), ("<", True)])  # Pillow reads no others
def test_a_tiff_of_far_too_many_strips_or_entries_is_refused(order: str, large: bool) -> None:
    def strips(count: int) -> bytes:
        return tiff((273, 3, count), (279, 3, count), order=order, large=large, behind=4 * count + 48 * 32)

    pieces.check(strips(MAX_NUMBERS))
    for content in (
        strips(MAX_NUMBERS + 1),
        tiff(*[(1000 + i, 3, 1) for i in range(MAX_ENTRIES)], order=order, large=large),
        tiff(*[(1000 + i, 1, 50_000) for i in range(20)], order=order, large=large, behind=60_000),
    ):
        with pytest.raises(ApiError, match="the TIFF"):
            pieces.check(content)


def test_tiffs_that_begin_in_an_odd_way_are_looked_at_too() -> None:
    for start in (b"II\0*", b"MM*\0"):
        content = tiff((273, 3, 2 * MAX_NUMBERS), order="<" if start[:2] == b"II" else ">", behind=10**6)
        with pytest.raises(ApiError, match="the TIFF"):
            pieces.check(start + content[4:])


def test_exif_data_are_one_segment_or_two_and_not_megabytes() -> None:
    sound = encode("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 60_000) + b"Exif\0\0" + bytes(59_992)

    assert verdict(sound[:2] + segment * (MAX_EXIF_BYTES // 60_000) + sound[2:]) is None
    assert verdict(sound[:2] + segment * (MAX_EXIF_BYTES // 60_000 + 1) + sound[2:]) == "corrupt_image"


@pytest.mark.parametrize("compression", [1, 2])
def test_a_compressed_bmp_is_small(compression: int) -> None:
    head = b"BM" + bytes(28) + struct.pack("<I", compression)

    pieces.check(head.ljust(MAX_RUNS, b"\0"))
    with pytest.raises(ApiError, match="the BMP is compressed"):
        pieces.check(head.ljust(MAX_RUNS + 1, b"\0"))
    pieces.check((b"BM" + bytes(32)).ljust(MAX_RUNS + 1, b"\0"))  # plain pixels have any size
