from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export import gate
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import TIMED_BATCHES
from resnet_ensemble.export.engines import Precision
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.export.gate import CalibrationError, Finding
from resnet_ensemble.server import images
from resnet_ensemble.training.views import block_sizes

(WHOLE,) = block_sizes("dense")
FINE = Finding(views=100, agreement=0.99, difference=0.05, correlation=0.96, error=None, reference_error=None)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pictures are enough, and only their centres are compared."""
    monkeypatch.setattr(gate, "FEWEST_IMAGES", 1)
    monkeypatch.setattr(gate, "BATCHES", (1,))


def rows(*top: int) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[list(top)]


def test_agreement_difference_and_errors_are_those_of_the_views() -> None:
    finding = gate.compare(rows(0, 1, 2, 2), rows(0, 1, 2, 1) * 0.5, np.array([0, 1, 1, 2]))

    assert finding == replace(
        FINE, views=4, agreement=0.75, difference=1.0, correlation=finding.correlation, error=25.0, reference_error=50.0
    )
    assert gate.compare(rows(0), rows(0), None).error is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "passed"),
        ({"agreement": 0.94}, "top-1 agreement 94.00% is below 95.0%"),
        ({"difference": 0.4}, "a probability differs by 0.40, more than 0.35"),
        ({"difference": float("nan")}, "a probability differs by nan, more than 0.35"),
        ({"correlation": 0.8}, "a class's scores have a correlation of 0.80, below 0.85"),
        ({"correlation": float("nan")}, "a class's scores have a correlation of nan, below 0.85"),
        ({"error": 8.0, "reference_error": 6.5}, "its error is 1.5 points higher than FP32's, more than 1"),
        ({"error": 7.0, "reference_error": 6.5}, "passed"),
        ({"error": 5.0, "reference_error": 6.5}, "passed"),
    ],
)
def test_the_verdict_says_what_is_wrong(changes: dict[str, float], verdict: str) -> None:
    assert replace(FINE, **changes).verdict(gate.LIMITS["int8"]) == verdict


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def test_two_classes_that_are_exchanged_are_found_although_neither_is_ever_the_first() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(78, 10))
    scores[:, :8] += 9
    reference, noisy = softmax(scores), softmax(scores + generator.normal(scale=0.2, size=scores.shape))
    exchanged = reference[:, [*range(8), 9, 8]]

    finding = gate.compare(exchanged, reference, None)

    assert (finding.agreement, finding.difference < 0.01) == (1, True)
    assert finding.verdict(gate.LIMITS["int8"]).startswith("a class's scores have a correlation of ")
    assert gate.compare(reference, reference, None).correlation == pytest.approx(1)
    assert gate.compare(noisy, reference, None).correlation > 0.9


def test_scores_that_hardly_vary_are_not_told_apart_from_constant_ones() -> None:
    generator = np.random.default_rng(0)
    still = softmax(generator.normal(scale=1e-4, size=(78, 10)))
    moving = softmax(generator.normal(size=(78, 10)))

    assert gate.compare(softmax(generator.normal(scale=1e-4, size=(78, 10))), still, None).correlation > 0.99
    assert gate.compare(moving, still, None).correlation < 0.1


def test_an_answer_that_is_no_number_agrees_with_nothing() -> None:
    reference = np.array([[0.9, 0.1], [0.9, 0.1]], np.float32)
    found = np.array([[0.9, 0.1], [np.nan, np.nan]], np.float32)

    finding = gate.compare(found, reference, None)

    assert (finding.agreement, finding.difference) == (0.5, 1)
    assert finding.verdict(gate.LIMITS["fp16"]) == "top-1 agreement 50.00% is below 99.0%"


def test_lower_precisions_have_wider_limits() -> None:
    assert FINE.verdict(gate.LIMITS["fp32"]) != "passed"
    assert FINE.verdict(gate.LIMITS["bf16"]) == "passed"
    worse = replace(FINE, agreement=0.96)
    assert [worse.verdict(gate.LIMITS[precision]) == "passed" for precision in ("bf16", "fp8", "int8")] == [
        False,
        True,
        True,
    ]
    assert set(gate.LIMITS) == set(get_args(Precision))


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (value, value, value)).save(path)


@pytest.mark.usefixtures("few")
def test_pictures_in_folders_named_like_labels_are_labelled(tmp_path: Path, shipped: Bundle) -> None:
    seen = shipped.manifest.members[0].preprocessing
    picture(tmp_path / "cat" / "a.png", 10)
    picture(tmp_path / "ship" / "b.JPG", 20)

    found = gate.from_folder(tmp_path, seen, shipped.manifest.labels)

    assert found.views.shape == (2, 32, 32, 3)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 8, *[3] * WHOLE, *[8] * WHOLE]
    (tmp_path / "cat").rename(tmp_path / "elsewhere")
    fewer = gate.from_folder(tmp_path, seen, shipped.manifest.labels)
    assert fewer.labels is None
    assert fewer.identity != found.identity


@pytest.mark.usefixtures("few")
def test_of_many_pictures_some_are_chosen_evenly(
    tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_IMAGES", 4)
    for i in range(12):
        picture(tmp_path / f"{i:02}.png", 10 * i)

    found = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, shipped.manifest.labels)

    assert found.views[:, 0, 0, 0].tolist() == [0, 30, 60, 90]
    assert len(found.encoded) == 4


@pytest.mark.usefixtures("few")
def test_the_ensemble_is_compared_on_some_of_them_chosen_evenly_with_their_labels(
    tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "ENSEMBLE_IMAGES", 2)
    labels = shipped.manifest.labels
    for i, label in enumerate(sorted(labels[:4])):
        picture(tmp_path / label / "a.png", 50 * i)

    found = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, labels)

    assert found.labels is not None
    assert found.encoded_labels is not None
    assert found.encoded_labels.tolist() == found.labels[:4:2].tolist()
    assert [gate.upright(content).getpixel((0, 0)) for content in found.encoded] == [(0, 0, 0), (100, 100, 100)]
    assert len(found.views) == 4


@pytest.mark.usefixtures("few")
def test_few_pictures_are_calibrated_on_in_several_views_each_the_centre_first(
    tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CALIBRATION_VIEWS", 7)
    for i in range(3):
        picture(tmp_path / f"{i}.png", 10 * i)

    def found() -> gate.Pictures:
        return gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ())

    two_each = found()
    assert two_each.calibration.shape == (6, 32, 32, 3)
    assert (two_each.calibration[::2] == two_each.views).all()
    assert not (two_each.calibration[1] == two_each.views[0]).all()
    monkeypatch.setattr(gate, "CALIBRATION_VIEWS", 1)
    assert (found().calibration == two_each.views).all()
    assert found().identity != two_each.identity


@pytest.mark.usefixtures("few")
def test_the_identity_is_that_of_the_pictures(tmp_path: Path, shipped: Bundle) -> None:
    def identity() -> str:
        return gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ()).identity

    picture(tmp_path / "a.png", 1)
    first = identity()
    assert identity() == first
    picture(tmp_path / "a.png", 2)
    assert identity() != first


@pytest.mark.usefixtures("few")
def test_photographs_are_turned_upright(tmp_path: Path, shipped: Bundle) -> None:
    drawn = Image.new("RGB", (32, 32))
    drawn.paste((255, 255, 255), (0, 0, 32, 16))  # white above
    lying = Image.Exif()
    lying[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    drawn.rotate(90).save(tmp_path / "a.png", exif=lying)

    (view,) = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ()).views

    assert (view == np.asarray(drawn)).all()


def test_pictures_have_the_pixels_that_the_server_sees(tmp_path: Path) -> None:
    clear, grey = Image.new("RGBA", (8, 8), (10, 20, 30, 0)), Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    for name, image in {"clear.png": clear, "grey.png": grey}.items():
        image.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()

        np.testing.assert_array_equal(gate.upright(content), images.decode(content, max_pixels=100))


@pytest.mark.usefixtures("few")
def test_a_picture_that_is_too_long_is_named(tmp_path: Path, shipped: Bundle) -> None:
    Image.new("RGB", (1, 60_000)).save(tmp_path / "long.png")

    with pytest.raises(CalibrationError, match=r"long\.png can't be decoded \(it is 1 x 60000, too long"):
        gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ())


@pytest.mark.usefixtures("few")
def test_a_folder_without_pictures_and_a_damaged_picture_are_named(tmp_path: Path, shipped: Bundle) -> None:
    seen = shipped.manifest.members[0].preprocessing
    with pytest.raises(CalibrationError, match="no pictures in"):
        gate.from_folder(tmp_path, seen, ())
    with pytest.raises(CalibrationError, match="there is no folder"):
        gate.from_folder(tmp_path / "missing", seen, ())
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(CalibrationError, match=r"bad\.jpg can't be decoded"):
        gate.from_folder(tmp_path, seen, ())
    (tmp_path / "bad.jpg").unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match=r"gone\.jpg can't be read"):
        gate.from_folder(tmp_path, seen, ())


def test_too_few_pictures_are_refused(tmp_path: Path, shipped: Bundle) -> None:
    for i in range(gate.FEWEST_IMAGES - 1):
        picture(tmp_path / f"{i}.png", i)
    seen = shipped.manifest.members[0].preprocessing

    with pytest.raises(CalibrationError, match=r"19 pictures in .* are too few; give 20 or more"):
        gate.from_folder(tmp_path, seen, ())
    picture(tmp_path / "last.png", 100)
    assert gate.from_folder(tmp_path, seen, ()).count == 20


def test_of_few_pictures_there_are_as_many_crops_as_all_batches_have_and_whole_views(
    tmp_path: Path, shipped: Bundle
) -> None:
    labels = shipped.manifest.labels
    for i in range(20):
        picture(tmp_path / labels[i % 10] / f"{i}.png", 10 * i)

    found = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, labels)

    assert len(found.views) == 80 >= sum(gate.BATCHES) > 60
    assert [views.shape for views in found.whole] == [(WHOLE, 32, 36, 3)] * gate.WHOLE_IMAGES
    assert found.labels is not None
    known = np.array([labels.index(path.parent.name) for path in sorted(tmp_path.rglob("*.png"))])
    assert found.labels.tolist() == [*known.repeat(4), *known[: gate.WHOLE_IMAGES].repeat(WHOLE)]


def test_golden_pictures_are_seen_in_all_their_views(shipped: Bundle) -> None:
    found = gate.from_golden(shipped, shipped.manifest.members[0])

    assert len(found.views) == 10 * len(shipped.manifest.golden) == 10 * found.count >= sum(gate.BATCHES)
    assert len(found.whole) == found.count
    assert len({views.shape for views in found.whole}) > 1
    assert found.labels is None


def test_batches_have_every_size_that_engines_are_timed_for() -> None:
    assert set(TIMED_BATCHES) <= set(gate.BATCHES)


def test_answers_are_those_of_all_views_in_order(shipped: Bundle) -> None:
    engine, other = FakeEngine(4), FakeEngine(4)
    views = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), np.uint8)
    whole = tuple(np.random.default_rng(i).integers(0, 256, (2, 8, 9 + i, 3), np.uint8) for i in range(2))
    seen = replace(gate.from_golden(shipped, shipped.manifest.members[0]), views=views, whole=whole)

    expected = np.concatenate([other.run(block) for block in (views, *whole)])
    np.testing.assert_array_equal(gate.answers(engine, seen), expected)
    assert engine.batches == [1, 2, 5, 10, 20, 40, 1, 2, 5, 4, 2, 2]


def test_an_engine_that_is_wrong_at_one_batch_size_or_with_whole_views_is_found(shipped: Bundle) -> None:
    seen = gate.from_golden(shipped, shipped.manifest.members[0])
    reference = gate.answers(FakeEngine(10), seen)

    class Sometimes(FakeEngine):
        def run(self, views: np.ndarray) -> np.ndarray:
            found = super().run(views)
            return np.roll(found, 1, axis=1) if wrong(views) else found

    def verdict() -> str:
        return gate.examine(Sometimes(10), seen, reference).verdict(gate.LIMITS["int8"])

    for size in gate.BATCHES:
        wrong = lambda views, size=size: views.shape[:2] == (size, 32)  # noqa: E731
        assert verdict() != "passed"
    wrong = lambda views: len(views) == 1  # noqa: E731
    assert "a probability depends on the batch by 0.28, more than 0.05" in verdict()
    wrong = lambda views: views.shape[1:3] != (32, 32)  # noqa: E731
    assert verdict() != "passed"
    wrong = lambda views: False  # noqa: E731
    assert verdict() == "passed"


def test_calibration_is_in_batches_of_sixteen() -> None:
    assert [len(batch) for batch in gate.calibration_batches(np.zeros((37, 8, 8, 3), np.uint8))] == [16, 16, 5]
