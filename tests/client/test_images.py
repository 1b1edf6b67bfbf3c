"""Every kind of image that a client takes, and what it refuses before anything is sent."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_ensemble.client import UnsupportedImageError
from tests.client.conftest import Either, Png, Scripted, ok


def images(tmp_path: Path, content: bytes) -> dict[str, Any]:
    (tmp_path / "cat.png").write_bytes(content)
    picture = Image.open(io.BytesIO(content))
    return {
        "path": tmp_path / "cat.png",
        "string": str(tmp_path / "cat.png"),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "file": (tmp_path / "cat.png").open("rb"),
        "BytesIO": io.BytesIO(content),
        "PIL": picture,
        "PIL CMYK": picture.convert("CMYK"),
        "array": np.asarray(picture),
        "grey array": np.asarray(picture.convert("L")),
        "array of one channel": np.asarray(picture.convert("L"))[..., None],
        "RGBA array": np.asarray(picture.convert("RGBA")),
        "strided array": np.asarray(picture)[::2, ::-1],
    }


KINDS = [
    "path", "string", "bytes", "bytearray", "memoryview", "file", "BytesIO", "PIL", "PIL CMYK",
    "array", "grey array", "array of one channel", "RGBA array", "strided array",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_sent(scripted: Scripted, png: Png, tmp_path: Path, kind: str) -> None:
    client, requests = scripted(ok())
    given = images(tmp_path, png(255))
    try:
        client.classify(given[kind])
    finally:
        given["file"].close()

    assert Image.open(io.BytesIO(requests[0].content)).convert("RGB").getextrema() == ((255, 255),) * 3


def test_an_array_arrives_as_it_is(scripted: Scripted) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    client, requests = scripted(ok(), ok())

    client.classify(array)
    client.classify(array[:, ::-1])

    received = [np.asarray(Image.open(io.BytesIO(request.content))) for request in requests]
    assert (received[0] == array).all()
    assert (received[1] == array[:, ::-1]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_pil_image_is_turned_as_its_file_is(scripted: Scripted, kind: str) -> None:
    picture = Image.new("RGB", (8, 4))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = picture.getexif()
    exif[0x112] = 6
    file = io.BytesIO()
    picture.save(file, kind, exif=exif)
    client, requests = scripted(ok())

    client.classify(Image.open(file))

    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(requests[0].content)))
    assert turned.tobytes() == ImageOps.exif_transpose(Image.open(file)).tobytes()
    assert turned.size == (4, 8)


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "LA", "RGBA", "CMYK", "I;16B", "1"])
def test_pil_images_of_every_mode_are_sent_and_stay_transparent(scripted: Scripted, mode: str) -> None:
    client, requests = scripted(ok())

    client.classify(Image.new(mode, (4, 4)))

    sent = Image.open(io.BytesIO(requests[0].content))
    assert sent.has_transparency_data == mode.upper().endswith("A")


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_arrive_as_sixteen_bits(scripted: Scripted, mode: str) -> None:
    client, requests = scripted(ok())
    values = np.array([[0, 300], [40_000, 65_535]], ">u2" if mode == "I;16B" else "<u2")

    client.classify(Image.frombytes(mode, (2, 2), values.tobytes()))

    assert (np.asarray(Image.open(io.BytesIO(requests[0].content))) == values).all()


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_what_the_server_refuses_as_a_file_it_refuses_as_a_pil_image(connected: Either, mode: str) -> None:
    with pytest.raises(UnsupportedImageError, match="415"):
        connected.classify(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("image", [None, 3, io.StringIO("text"), ["a"]])
def test_what_is_no_image_is_refused_before_anything_is_sent(scripted: Scripted, image: Any) -> None:
    client, requests = scripted()

    with pytest.raises(TypeError, match="an image must be a path, bytes"):
        client.classify(image)
    assert requests == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3)),
        np.zeros((3, 2, 2), np.uint8),
        np.zeros((0, 2), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=["float", "channels first", "empty", "a batch", "a number"],
)
def test_an_array_that_is_no_picture_is_refused(scripted: Scripted, array: Any) -> None:
    client, _ = scripted()

    with pytest.raises(TypeError, match=r"an array must be uint8 of shape \(h, w\).*not "):
        client.classify(array)


def test_a_path_that_does_not_exist_is_an_os_error(scripted: Scripted) -> None:
    client, _ = scripted()

    with pytest.raises(FileNotFoundError, match=r"no\.jpg"):
        client.classify("no.jpg")
