"""The views against torchvision's own transforms, to the pixel."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resnet_ensemble.training.views import (
    ALL_PROTOCOLS,
    DENSE_PROTOCOLS,
    POSITIONS,
    PROTOCOLS,
    SCALES,
    Preprocessing,
    block_pixels,
    block_sizes,
    can_be_view,
    largest_side,
    make_blocks,
    make_views,
    make_whole_views,
    mean_colour,
    shorter_side,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))


def picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def preprocessing(resize: int = 40, crop: int = 32, padding: int = 0) -> Preprocessing:
    return Preprocessing(resize=resize, crop=crop, padding=padding, mean=MEAN, std=STD)


def reference(image: Image.Image, how: Preprocessing, crops: v2.Transform) -> np.ndarray:
    steps = v2.Compose([v2.Resize(how.resize), v2.Pad(how.padding, fill=mean_colour(how.mean)), crops])
    made = steps(image)
    return np.stack([np.asarray(crop) for crop in (made if isinstance(made, tuple) else (made,))])


@settings(max_examples=150, deadline=None)
@given(size=SIZES, resize=st.integers(24, 45), padding=st.sampled_from([0, 2, 4]))
def test_ten_crops_are_torchvisions_ten_crop(size: tuple[int, int], resize: int, padding: int) -> None:
    how = preprocessing(resize=resize, crop=24, padding=padding)

    views = make_views(picture(size), how, "10crop")

    np.testing.assert_array_equal(views, reference(picture(size), how, v2.TenCrop(24)))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (257, 333), (333, 257), (224, 224), (60, 501), (31, 17)])
def test_ten_crops_at_imagenet_sizes_are_torchvisions(size: tuple[int, int]) -> None:
    how = preprocessing(resize=256, crop=224)

    views = make_views(picture(size), how, "10crop")

    np.testing.assert_array_equal(views, reference(picture(size), how, v2.TenCrop(224)))


@settings(max_examples=150, deadline=None)
@given(size=SIZES, resize=st.integers(22, 45), padding=st.integers(1, 4))
def test_center_is_torchvisions_center_crop(size: tuple[int, int], resize: int, padding: int) -> None:
    how = preprocessing(resize=resize, crop=24, padding=padding)

    views = make_views(picture(size), how, "center")

    np.testing.assert_array_equal(views, reference(picture(size), how, v2.CenterCrop(24)))


@given(size=SIZES, protocol=st.sampled_from(list(PROTOCOLS)))
@settings(max_examples=50, deadline=None)
def test_every_protocol_starts_with_or_contains_the_center(size: tuple[int, int], protocol: str) -> None:
    center = make_views(picture(size), preprocessing(), "center")[0]

    assert any(np.array_equal(view, center) for view in make_views(picture(size), preprocessing(), protocol))


def test_flip_is_the_center_of_the_image_and_of_its_mirror() -> None:
    image, how = picture((45, 40)), preprocessing()

    first, second = make_views(image, how, "flip")

    np.testing.assert_array_equal(first, make_views(image, how, "center")[0])
    np.testing.assert_array_equal(
        second, make_views(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), how, "center")[0]
    )


def test_protocols_have_the_paper_s_numbers_of_views() -> None:
    assert {name: len(views) for name, views in PROTOCOLS.items()} == {"center": 1, "flip": 2, "10crop": 10}
    assert [view.position for view in PROTOCOLS["10crop"][:5]] == list(POSITIONS)


def test_a_cifar_image_is_seen_whole_by_the_center_view() -> None:
    image, how = picture((32, 32)), preprocessing(resize=32, crop=32, padding=4)

    np.testing.assert_array_equal(make_views(image, how, "center")[0], np.asarray(image))


def test_padding_has_the_mean_colour() -> None:
    how = preprocessing(resize=32, crop=32, padding=4)

    corner = make_views(picture((32, 32)), how, "10crop")[0]

    assert tuple(corner[0, 0]) == mean_colour(MEAN) == (124, 116, 104)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": 31}, "does not fit"),
        ({"crop": 0}, "positive"),
        ({"padding": -1}, "positive"),
    ],
)
def test_geometry_that_contradicts_itself_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing(**({"resize": 40, "crop": 32} | changes))


def test_mean_in_bytes_instead_of_units_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        Preprocessing(resize=32, crop=32, mean=(123.7, 116.3, 103.5), std=STD)


def test_dense_protocols_have_the_paper_s_shorter_sides_and_mirrors() -> None:
    how = Preprocessing(resize=256, crop=224, mean=MEAN, std=STD)

    sides = [min(view.shape[:2]) for view in make_whole_views(picture((500, 375)), how, "multiscale")]

    assert sides == [224, 224, 256, 256, 384, 384, 480, 480, 640, 640]
    assert [view.shape for view in make_whole_views(picture((500, 375)), how, "dense")] == [(256, 352, 3)] * 2


def test_for_another_crop_the_shorter_sides_have_the_paper_s_ratios_in_quanta() -> None:
    how = Preprocessing(resize=32, crop=32, mean=MEAN, std=STD, padding=2)

    sides = [min(view.shape[:2]) for view in make_whole_views(picture((40, 32)), how, "multiscale")]

    assert sides[::2] == [32, 36, 56, 68, 92]  # 32, 36.6, 54.9, 68.6, 91.4


@given(crop=st.integers(1, 300), resize=st.integers(1, 300))
def test_no_whole_view_is_smaller_than_a_crop(crop: int, resize: int) -> None:
    how = Preprocessing(resize=resize, crop=crop, mean=MEAN, std=STD, padding=max(0, crop - resize))

    assert min(shorter_side(scale, how) for scale in (None, *SCALES)) >= crop


@settings(max_examples=100, deadline=None)
@given(size=SIZES, protocol=st.sampled_from(list(DENSE_PROTOCOLS)))
def test_whole_views_have_few_shapes_and_come_with_their_mirrors(size: tuple[int, int], protocol: str) -> None:
    how = preprocessing(resize=32, crop=32, padding=2)

    views = make_whole_views(picture(size), how, protocol)

    for view, mirror in zip(views[::2], views[1::2], strict=True):
        shorter, longer = sorted(view.shape[:2])
        assert longer % how.quantum == 0
        assert shorter <= longer <= 2 * shorter
        np.testing.assert_array_equal(mirror, view[:, ::-1])
        assert view.shape[0] >= view.shape[1] or size[0] >= size[1]  # portrait stays portrait


def test_a_cifar_image_is_its_own_dense_view() -> None:
    image, how = picture((32, 32)), preprocessing(resize=32, crop=32, padding=2)

    np.testing.assert_array_equal(make_whole_views(image, how, "dense")[0], np.asarray(image))


def test_of_a_very_long_image_the_middle_is_seen() -> None:
    pixels = np.zeros((64, 640, 3), np.uint8)
    pixels[:, 256:384] = 200  # the middle, as wide as twice the height

    view, _ = make_whole_views(Image.fromarray(pixels), preprocessing(resize=32, crop=32), "dense")

    assert view.shape == (32, 64, 3)
    assert view.min() >= 150  # the filter reaches a little beyond the middle


@pytest.mark.parametrize("protocol", ALL_PROTOCOLS)
@pytest.mark.parametrize("size", [(40, 40), (61, 40), (30, 77)])
def test_blocks_are_the_views_in_their_order_one_array_a_shape(protocol: str, size: tuple[int, int]) -> None:
    how = preprocessing()
    made = make_views if protocol in PROTOCOLS else make_whole_views

    blocks = make_blocks(picture(size), how, protocol)

    for view, expected in zip((v for block in blocks for v in block), made(picture(size), how, protocol), strict=True):
        np.testing.assert_array_equal(view, expected)
    assert tuple(len(block) for block in blocks) == block_sizes(protocol)


@given(SIZES, st.sampled_from(ALL_PROTOCOLS), st.sampled_from([(40, 32), (32, 32), (30, 20), (256, 224)]))
@settings(max_examples=50)
def test_what_a_protocol_makes_can_be_a_view(size: tuple[int, int], protocol: str, sides: tuple[int, int]) -> None:
    how = preprocessing(*sides)
    blocks = make_blocks(picture(size), how, protocol)

    assert tuple(block.shape[1] * block.shape[2] for block in blocks) == block_pixels(how, protocol, size)
    for block in blocks:
        assert can_be_view(*block.shape[1:3], how)


@pytest.mark.parametrize("size", [(223, 224), (256, 289), (256, 544), (225, 225), (1, 1), (1280, 1280)], ids=str)
def test_what_no_protocol_makes_can_not(size: tuple[int, int]) -> None:
    how = preprocessing(256, 224)
    assert not can_be_view(*size, how)
    assert not can_be_view(*size[::-1], how)


@pytest.mark.parametrize("protocol", ALL_PROTOCOLS)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (600, 224), (40, 32)])
def test_the_largest_side_is_that_of_the_largest_picture_that_views_are_cut_from(
    monkeypatch: pytest.MonkeyPatch, protocol: str, resize: int, crop: int
) -> None:
    made: list[int] = []
    original = Image.Image.resize

    def resized(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        made.append(min(size))
        return original(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resized)
    how = preprocessing(resize=resize, crop=crop)
    make_blocks(picture((700, 701)), how, protocol)

    assert largest_side(how, protocol) == max(made)
