"""Hostile, odd and ordinary images, made here."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_ensemble.server import images
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.images import decode, is_drafted
from resnet_ensemble.training import pixels
from resnet_ensemble.training.pixels import FORMATS, MAX_ASPECT_RATIO, MAX_EXIF_BYTES, SUFFIXES

LIMIT = 1_000_000
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def picture(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def decoded(content: bytes) -> np.ndarray:
    image = decode(content, max_pixels=LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(content: bytes, max_pixels: int = LIMIT, draft: int | None = None) -> ApiError:
    with pytest.raises(ApiError) as error:
        decode(content, max_pixels=max_pixels, draft=draft)
    return error.value


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    np.testing.assert_array_equal(decoded(encode(picture(), format)), np.asarray(picture()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_lossy_formats_are_read(format: str) -> None:
    assert decoded(encode(picture(), format)).shape == (30, 40, 3)


def test_every_allowed_format_has_a_decoder_here() -> None:
    Image.init()

    assert set(FORMATS) <= set(Image.OPEN)
    assert {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == set(FORMATS)


def test_a_jpeg_with_several_pictures_gives_the_first() -> None:
    content = encode(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])

    np.testing.assert_allclose(decoded(content)[4, 4], RED, atol=2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    format = "PNG" if mode in ("1", "L", "P") else "TIFF"

    np.testing.assert_array_equal(
        decoded(encode(picture(mode=mode), format)), np.asarray(picture(mode=mode).convert("RGB"))
    )


def test_a_cmyk_jpeg_is_read() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))

    np.testing.assert_allclose(decoded(encode(cyan, "JPEG"))[4, 4], (0, 255, 255), atol=3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 0x8042, np.uint16))

    assert decoded(encode(grey, format))[0, 0].tolist() == [0x80] * 3


@pytest.mark.parametrize(("bits", "photometric", "expected"), [(12, 1, 0x80), (16, 1, 0x80), (16, 0, 0x7F)])
def test_grey_of_a_tiff_has_its_own_depth_and_white(bits: int, photometric: int, expected: int) -> None:
    row = {12: bytes.fromhex("804804"), 16: bytes.fromhex("0480 0480")}[bits]  # two pixels, each of 0x804 or 0x8004
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(row)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels are
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + row

    assert decoded(content).tolist() == [[[expected] * 3] * 2]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_an_agreed_brightness_are_refused(mode: str) -> None:
    content = encode(Image.new(mode, (8, 8)), "TIFF")

    assert refusal(content).code == "unsupported_pixel_type"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)

    assert decoded(encode(transparent))[0, 0].tolist() == list(WHITE)


def test_half_transparent_colours_are_blended_with_white() -> None:
    assert decoded(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128))))[0, 0].tolist() == [255, 127, 127]


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])

    assert decoded(encode(image, transparency=1))[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    content = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )

    assert decoded(content)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(format: str, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), GREEN)
    upright.paste(RED, (0, 0, 24, 16))  # the top left quarter is red
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    pixels = decoded(encode(stored, format, exif=exif))

    assert pixels.shape == (32, 48, 3)
    np.testing.assert_allclose(pixels[4, 4], RED, atol=12)
    np.testing.assert_allclose(pixels[28, 44], GREEN, atol=12)


def test_damaged_exif_does_not_hide_a_sound_picture() -> None:
    content = encode(picture(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")

    np.testing.assert_array_equal(decoded(content), np.asarray(picture()))


def test_no_bytes_are_refused() -> None:
    assert refusal(b"").code == "empty_image"


@pytest.mark.parametrize(
    "content", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\0" * 1000, b"PK\3\4"]
)
def test_what_is_no_image_is_refused(content: bytes) -> None:
    assert refusal(content).code == "unsupported_image_format"


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "JPEG2000", "DDS", "PDF", "EPS"])
def test_formats_that_are_not_on_the_list_are_refused(format: str) -> None:
    assert refusal(encode(picture((32, 32)), format)).code == "unsupported_image_format"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_a_cut_off_image_is_refused(format: str) -> None:
    content = encode(picture((200, 200)), format)

    for length in (16, 40, len(content) // 2):
        assert refusal(content[:length]).code == "corrupt_image"


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_from_its_header_alone() -> None:
    error = refusal(png_header(40_000, 40_000), max_pixels=50_000_000)

    assert (error.code, error.kind.status) == ("too_many_pixels", 413)
    assert "40000 x 40000" in error.detail


def test_the_pixel_limit_is_exact() -> None:
    content = encode(picture((40, 30)))

    assert decode(content, max_pixels=1200).size == (40, 30)
    assert refusal(content, max_pixels=1199).code == "too_many_pixels"


def test_a_line_is_refused_before_resizing_makes_it_huge() -> None:
    allowed = encode(Image.new("RGB", (MAX_ASPECT_RATIO, 1)))

    assert decoded(allowed).shape == (1, MAX_ASPECT_RATIO, 3)
    assert refusal(encode(Image.new("RGB", (MAX_ASPECT_RATIO + 1, 1)))).code == "extreme_aspect_ratio"


@settings(max_examples=150)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    multiple=st.sampled_from([1, 2, 4, 8, 16]),
    draft=st.integers(1, 300),
    format=st.sampled_from(["JPEG", "MPO"]),
    progressive=st.booleans(),
)
def test_a_draft_keeps_as_many_pixels_as_it_must_and_the_very_shape(
    width: int, height: int, multiple: int, draft: int, format: str, progressive: bool
) -> None:
    width, height = width * multiple, height * multiple
    content = encode(Image.new("RGB", (width, height), RED), format, progressive=progressive)

    found = decode(content, max_pixels=2**30, draft=draft)

    scale = width // found.size[0]
    assert found.size == (width / scale, height / scale)
    assert scale in (1, 2, 4, 8)
    assert min(found.size) >= min(draft, width, height)
    assert is_drafted(content, draft) == (scale > 1)
    larger = [s for s in (2, 4, 8) if s > scale and width % s == height % s == 0]
    assert all(min(width, height) / s < draft for s in larger)  # as small as it may be


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_draft_shows_what_the_whole_picture_does(mode: str) -> None:
    smooth = picture((6, 4)).resize((600, 400), Image.Resampling.BICUBIC).convert(mode)
    content = encode(smooth, "JPEG", quality=95)

    draft = decode(content, max_pixels=LIMIT, draft=100)

    assert (draft.mode, draft.size) == ("RGB", (150, 100))
    whole = decode(content, max_pixels=LIMIT).resize((150, 100), Image.Resampling.BOX)
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(draft)).mean() < 2


@pytest.mark.parametrize("format", sorted({*FORMATS} - {"JPEG"}))
def test_no_other_format_has_drafts(format: str) -> None:
    content = encode(picture((200, 160)), format)

    np.testing.assert_array_equal(decode(content, max_pixels=LIMIT, draft=10), decoded(content))
    assert not is_drafted(content, 10)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_turned_upright(orientation: int) -> None:
    stored = Image.new("RGB", (480, 320), GREEN)
    stored.paste(RED, (0, 0, 240, 160))  # the top left quarter as it is stored, the top right one when it is upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    pixels = np.asarray(decode(encode(stored, "JPEG", exif=exif), max_pixels=LIMIT, draft=80))

    assert pixels.shape == ((80, 120, 3) if orientation == 1 else (120, 80, 3))
    np.testing.assert_allclose(pixels[4, 4 if orientation == 1 else -4], RED, atol=12)
    np.testing.assert_allclose(pixels[-4, 4], GREEN, atol=12)


def test_limits_are_of_the_whole_picture_when_it_is_drafted() -> None:
    large, line = encode(picture((200, 160)), "JPEG"), encode(Image.new("RGB", (4040, 40)), "JPEG")
    progressive = encode(picture((200, 160)), "JPEG", progressive=True)
    scans = progressive[:-2] + progressive[progressive.rindex(b"\xff\xda") : -2] * 1000 + b"\xff\xd9"

    assert decode(large, max_pixels=32_000, draft=20).size == (25, 20)
    assert refusal(large, max_pixels=31_999, draft=20).code == "too_many_pixels"
    assert refusal(line, draft=4).code == "extreme_aspect_ratio"
    assert refusal(scans, draft=20).code == "too_many_scans"


def test_a_cut_off_jpeg_is_refused_when_it_is_drafted() -> None:
    content = encode(picture((900, 600)), "JPEG")

    for length in (len(content) // 10, len(content) // 2, len(content) - 100):
        assert refusal(content[:length], draft=75).code == "corrupt_image"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_the_answer_is_an_image_or_a_typed_refusal(data: st.DataObject) -> None:
    content = bytearray(
        encode(picture((16, 12)), data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]

    try:
        draft = data.draw(st.sampled_from([None, 1, 4]))
        assert decode(bytes(content), max_pixels=LIMIT, draft=draft).mode == "RGB"
    except ApiError as error:
        assert error.kind.status in (400, 413, 415, 422)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_data_of_megabytes_are_left_unread(format: str) -> None:
    """Pillow reads their values one by one, and writes them anew: 18 MiB took 30 s, or 3 GB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = b"x" * MAX_EXIF_BYTES

    assert decode(encode(picture(), format, exif=exif), max_pixels=LIMIT).size == picture().size
    exif[0x9286] = b"x" * (MAX_EXIF_BYTES - 1000)
    assert decode(encode(picture(), format, exif=exif), max_pixels=LIMIT).size == picture().size[::-1]


def test_what_is_laid_on_white_in_bands_is_as_it_is_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 4), np.uint8))
    whole = decoded(encode(noise))

    monkeypatch.setattr(pixels, "_BAND", 100)
    np.testing.assert_array_equal(decoded(encode(noise)), whole)


def test_a_picture_for_which_there_is_no_memory_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", fail)
    error = refusal(encode(picture()))
    assert (error.code, error.retry_after) == ("overloaded", 1)
