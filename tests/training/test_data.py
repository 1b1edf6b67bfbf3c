from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_ensemble.training import cifar, pixels
from resnet_ensemble.training.data import (
    Batch,
    Cifar,
    Data,
    DataError,
    Folders,
    Key,
    TrainingFiles,
    _decode_fast,
    decode,
    open_data,
    scan_folders,
)
from resnet_ensemble.training.processes import Group
from resnet_ensemble.training.recipes import RECIPES, Augmentation, Recipe
from resnet_ensemble.training.views import mean_colour
from tests.training.small import VALIDATION, cifar_of_two, write_folders

ALONE = Group(0, 1, torch.device("cpu"))
CIFAR = replace(RECIPES["resnet20-cifar10"], batch_size=16, pca_colour=True)
FOLDERS = replace(
    RECIPES["resnet18a-imagenet-paper"], classes=3, batch_size=8, crop=64, scale=(72, 96), test_crop=64, test_resize=72
)
MEAN = torch.zeros(3)


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "read", cifar_of_two)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"), train=8, val=3, size=(90, 80))


def data_of(recipe: Recipe, root: Path, group: Group = ALONE, workers: int = 0) -> Data:
    return open_data(recipe, root, group, workers=workers)


def batches(data: Data, epoch: int = 0, start: int = 0, stop: int = 3) -> list[Batch]:
    crop = 32 if isinstance(data, Cifar) else 64
    return list(data.batches(epoch, crop=crop, mean=MEAN, start=start, stop=stop))


def equal(a: Batch, b: Batch) -> bool:
    shifts = all(torch.equal(x, y) for x, y in zip(a.shifts, b.shifts, strict=True))
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and shifts


BOTH = pytest.mark.parametrize("recipe", [CIFAR, FOLDERS], ids=["cifar", "folders"])


@BOTH
def test_an_epoch_is_the_same_every_time_and_another_epoch_is_not(recipe: Recipe, root: Path) -> None:
    first, again, other = (batches(data_of(recipe, root), epoch) for epoch in (1, 1, 2))

    assert all(map(equal, first, again))
    assert not any(map(equal, first, other))


@BOTH
def test_a_start_in_the_middle_gives_the_rest_of_the_epoch(recipe: Recipe, root: Path) -> None:
    whole, rest = batches(data_of(recipe, root)), batches(data_of(recipe, root), start=1)

    assert len(rest) == 2
    assert all(map(equal, whole[1:], rest))


@BOTH
def test_two_processes_have_the_halves_of_what_one_has(recipe: Recipe, root: Path) -> None:
    one = batches(data_of(recipe, root))
    halves = [batches(data_of(recipe, root, Group(rank, 2, ALONE.device))) for rank in (0, 1)]

    for whole, first, second in zip(one, *halves, strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)
        assert torch.equal(torch.cat([first.labels, second.labels]), whole.labels)
        assert torch.equal(torch.cat([first.shifts[1], second.shifts[1]]), whole.shifts[1])


def test_worker_processes_give_what_the_process_itself_would(root: Path) -> None:
    assert all(map(equal, batches(data_of(FOLDERS, root)), batches(data_of(FOLDERS, root, workers=2))))


def test_an_epoch_has_each_picture_once(root: Path) -> None:
    assert torch.cat([batch.labels for batch in batches(data_of(FOLDERS, root))]).bincount().tolist() == [8, 8, 8]
    seen = torch.cat([batch.labels for batch in batches(data_of(CIFAR, root), stop=6)])
    assert seen.bincount().tolist() == np.bincount(cifar_of_two(root, "train").labels).tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
@BOTH
def test_all_processes_together_see_each_validation_picture_once(recipe: Recipe, root: Path, world: int) -> None:
    seen = []
    for rank in range(world):
        for images, labels in data_of(recipe, root, Group(rank, world, ALONE.device)).validation():
            seen += [(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]

    assert len(seen) == len(set(seen)) == (9 if recipe is FOLDERS else VALIDATION)


@pytest.mark.parametrize("augmentation", ["area", "scale"])
def test_folders_give_augmented_crops_of_the_asked_size(root: Path, augmentation: Augmentation) -> None:
    recipe = replace(FOLDERS, augmentation=augmentation, per_pixel_mean=False)

    (batch,) = data_of(recipe, root).batches(0, crop=48, mean=MEAN, start=0, stop=1)

    assert (batch.images.shape, batch.images.dtype) == ((8, 48, 48, 3), torch.uint8)
    # Class i is bright in channel i, so labels and pictures belong together.
    assert torch.equal(batch.images.float().mean((1, 2)).argmax(1), batch.labels)


def test_a_mean_image_is_subtracted_from_a_cifar_picture_before_it_is_padded_and_cut() -> None:
    recipe = replace(CIFAR, pca_colour=False)
    colour = torch.tensor(mean_colour(recipe.mean)) / 255
    mean, padded = torch.rand(32, 32, 3), torch.zeros(40, 40, 3) + colour
    padded[4:36, 4:36] = mean

    (batch,) = data_of(recipe, Path()).batches(0, crop=32, mean=mean, start=0, stop=1)

    windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    windows += [window.flip(1) for window in windows]
    found = [next(i for i, window in enumerate(windows) if torch.equal(shift, window)) for shift in batch.shifts[0]]
    assert len(set(found)) > 8  # each picture has its own
    # Padding becomes zero: where the picture's is, the mean's is too.
    difference = batch.images.float() / 255 - batch.shifts[0]
    padding = (batch.shifts[0] == colour).all(-1)
    assert padding.any()
    assert difference[padding].abs().max() < 1e-6


def test_the_mean_image_of_cifar_is_that_of_its_training_pictures() -> None:
    expected = cifar_of_two(Path(), "train").images.astype(np.float64).mean(0) / 255

    np.testing.assert_allclose(data_of(CIFAR, Path()).mean_image().numpy(), expected, atol=1e-6)


def test_the_mean_image_of_folders_is_that_of_center_views(root: Path) -> None:
    mean = data_of(FOLDERS, root).mean_image()

    assert mean.shape == (64, 64, 3)
    assert mean.mean((0, 1)).numpy() == pytest.approx([(50 + 50) / 255] * 3, abs=0.03)


def test_classes_are_numbered_in_the_order_of_their_names_also_where_validation_lacks_one(tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=2, val=1)
    (missing,) = (root / "val" / "n01440764").iterdir()
    missing.unlink()
    missing.parent.rmdir()

    labels, files = scan_folders(root, "val", scan_folders(root, "train")[0])

    assert labels == ("n01440764", "n01443537", "n01484850")
    assert [label for _, label in files] == [1, 2]


def test_the_fingerprint_is_of_the_data(root: Path, tmp_path: Path) -> None:
    other = write_folders(tmp_path, train=9, val=3)

    assert data_of(FOLDERS, root).fingerprint == data_of(FOLDERS, root).fingerprint
    assert data_of(FOLDERS, root).fingerprint != data_of(FOLDERS, other).fingerprint
    assert data_of(CIFAR, root).fingerprint != data_of(FOLDERS, root).fingerprint


def test_the_fingerprint_does_not_depend_on_how_the_path_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = data_of(FOLDERS, root).fingerprint
    monkeypatch.chdir(root)

    assert data_of(FOLDERS, Path()).fingerprint == absolute
    assert data_of(FOLDERS, Path("..") / root.name).fingerprint == absolute


def test_a_picture_that_is_no_jpeg_is_read_too(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for name in ("a.png", "b.bmp", "c.JPEG"):  # ImageNet has a PNG that is called .JPEG
        Image.fromarray(picture).save(tmp_path / name, "BMP" if name == "b.bmp" else "PNG")

    for file in tmp_path.iterdir():
        np.testing.assert_array_equal(_decode_fast(str(file)).permute(1, 2, 0), picture)


def test_a_cmyk_jpeg_has_pillow_s_colours(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 25, 4), np.uint8)
    Image.fromarray(noise, "CMYK").resize((100, 80)).save(tmp_path / "c.jpg")

    fast = _decode_fast(str(tmp_path / "c.jpg")).permute(1, 2, 0)

    np.testing.assert_allclose(fast.float(), np.asarray(decode(str(tmp_path / "c.jpg")), np.float32), atol=4)


def test_what_is_no_jpeg_has_the_same_pixels_as_in_the_server(tmp_path: Path) -> None:
    """More than 8 bits are scaled, and transparency is white: by Pillow's own conversion, all white and all hidden."""
    ramp = np.arange(0, 64 * 1000, 1000, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")

    for name in ("16.png", "clear.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
            served = np.asarray(pixels.to_rgb(image))
        np.testing.assert_array_equal(_decode_fast(str(tmp_path / name)).permute(1, 2, 0), served)
    assert len(np.unique(np.asarray(decode(str(tmp_path / "16.png"))))) == 64
    assert np.asarray(decode(str(tmp_path / "clear.png"))).min() == 255
    with pytest.raises(
        DataError, match=r"float\.tif can't be decoded \(pixels of the type F have no agreed brightness"
    ):
        decode(str(tmp_path / "float.tif"))


def test_a_picture_that_says_it_lies_on_its_side_is_set_upright_by_both_decoders(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "phone.jpg", exif=orientation)

    upright = np.asarray(decode(str(tmp_path / "phone.jpg")), np.float32)

    assert upright.shape == (60, 40, 3)
    np.testing.assert_allclose(_decode_fast(str(tmp_path / "phone.jpg")).permute(1, 2, 0), upright, atol=4)


def test_a_picture_that_is_too_large_to_be_decoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own is 89 million, and it refuses twice as many

    with pytest.raises(DataError, match=r"scan\.png can't be decoded \(Image size"):
        decode(str(tmp_path / "scan.png"))


def test_pictures_are_known_by_the_names_that_the_server_knows(tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=2, val=2)
    before = scan_folders(root, "val")
    (first, label), *_ = before[1]
    Path(first).rename(Path(first).with_suffix(".jfif"))

    assert len(scan_folders(root, "val")[1]) == len(before[1])
    assert (str(Path(first).with_suffix(".jfif")), label) in scan_folders(root, "val")[1]


def test_a_training_class_without_pictures_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=2, val=1)
    (root / "train" / "n00000001").mkdir()

    with pytest.raises(DataError, match="classes without images: n00000001"):
        Folders(FOLDERS, root, ALONE, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(tmp_path: Path, workers: int) -> None:
    root = write_folders(tmp_path, train=4, val=1)
    broken = root / "train" / "n01443537" / "n01443537_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])

    data = data_of(replace(FOLDERS, batch_size=12), root, workers=workers)
    with pytest.raises(DataError, match=r"n01443537_1\.JPEG can't be decoded") as raised:
        list(data.batches(0, crop=64, mean=MEAN, start=0, stop=1))
    assert str(raised.value).startswith(str(root))


@pytest.mark.parametrize("name", ["line.png", "line.jpg"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_picture_that_is_far_too_long_is_named_before_it_is_resized(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    """Its center view, or the crop that it would be trained on, would come from one of 15 million pixels."""
    path = str(tmp_path / name)
    Image.new("RGB", size).save(path)
    assert FOLDERS.augmentation == "scale"

    for key in (0, Key(0, 0, 64)):
        with pytest.raises(DataError, match=rf"{name} is {size[0]} x {size[1]}; one side may be 100 times the other"):
            TrainingFiles([(path, 0)], FOLDERS)[key]
    Image.new("RGB", (300, 3)).save(path)
    assert TrainingFiles([(path, 0)], FOLDERS)[0][0].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1000}, "has 3 classes, the recipe 1000; to train on these: --set classes=3"),
        ({"batch_size": 256}, "24 training images, fewer than a batch of 256"),
    ],
)
def test_a_recipe_that_does_not_fit_the_data_is_refused(root: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_of(replace(FOLDERS, **changes), root)


def test_a_batch_that_the_processes_can_t_share_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="can't be shared equally by 3 processes"):
        data_of(FOLDERS, root, Group(0, 3, ALONE.device))


def test_a_missing_split_a_flat_one_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train/ in .*: expected train/ and val/"):
        scan_folders(tmp_path, "train")
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "1.JPEG")
    with pytest.raises(DataError, match="has no folders, one a class"):
        scan_folders(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"has no images \(\.avif, \.bmp"):
        scan_folders(tmp_path, "train")


def test_a_validation_class_that_was_not_trained_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=2, val=1)
    (root / "val" / "n09999999").mkdir()

    with pytest.raises(DataError, match="classes that are not in train/: n09999999"):
        Folders(FOLDERS, root, ALONE, 0)
