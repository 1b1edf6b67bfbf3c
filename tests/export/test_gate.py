from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export import gate
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import Precision
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.export.gate import CalibrationError, Finding

FINE = Finding(views=100, agreement=0.99, difference=0.05, error=None, reference_error=None)


def rows(*top: int) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[list(top)]


def test_agreement_difference_and_errors_are_those_of_the_views() -> None:
    finding = gate.compare(rows(0, 1, 2, 2), rows(0, 1, 2, 1) * 0.5, np.array([0, 1, 1, 2]))

    assert finding == Finding(4, agreement=0.75, difference=1.0, error=25.0, reference_error=50.0)
    assert gate.compare(rows(0), rows(0), None).error is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "passed"),
        ({"agreement": 0.94}, "top-1 agreement 94.0% is below 95.0%"),
        ({"difference": 0.4}, "a probability differs by 0.40, more than 0.35"),
        ({"difference": float("nan")}, "a probability differs by nan, more than 0.35"),
        ({"error": 8.0, "reference_error": 6.5}, "its error is 1.5 points higher than FP32's, more than 1"),
        ({"error": 7.0, "reference_error": 6.5}, "passed"),
        ({"error": 5.0, "reference_error": 6.5}, "passed"),
    ],
)
def test_the_verdict_says_what_is_wrong(changes: dict[str, float], verdict: str) -> None:
    assert replace(FINE, **changes).verdict(gate.LIMITS["int8"]) == verdict


def test_an_answer_that_is_no_number_agrees_with_nothing() -> None:
    reference = np.array([[0.9, 0.1], [0.9, 0.1]], np.float32)
    found = np.array([[0.9, 0.1], [np.nan, np.nan]], np.float32)

    finding = gate.compare(found, reference, None)

    assert (finding.agreement, finding.difference) == (0.5, 1)
    assert finding.verdict(gate.LIMITS["fp16"]) == "top-1 agreement 50.0% is below 99.0%"


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


def test_pictures_in_folders_named_like_labels_are_labelled(tmp_path: Path, shipped: Bundle) -> None:
    seen = shipped.manifest.members[0].preprocessing
    picture(tmp_path / "cat" / "a.png", 10)
    picture(tmp_path / "ship" / "b.JPG", 20)

    found = gate.from_folder(tmp_path, seen, shipped.manifest.labels)

    assert found.views.shape == (2, 32, 32, 3)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 8]
    (tmp_path / "cat").rename(tmp_path / "elsewhere")
    fewer = gate.from_folder(tmp_path, seen, shipped.manifest.labels)
    assert fewer.labels is None
    assert fewer.identity != found.identity


def test_of_many_pictures_some_are_chosen_evenly(
    tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_IMAGES", 4)
    for i in range(12):
        picture(tmp_path / f"{i:02}.png", 10 * i)

    found = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, shipped.manifest.labels)

    assert found.views[:, 0, 0, 0].tolist() == [0, 30, 60, 90]
    assert len(found.encoded) == 4


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
    assert found.encoded_labels.tolist() == found.labels[::2].tolist()
    assert [gate.upright(content).getpixel((0, 0)) for content in found.encoded] == [(0, 0, 0), (100, 100, 100)]
    assert len(found.views) == 4


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


def test_the_identity_is_that_of_the_pictures(tmp_path: Path, shipped: Bundle) -> None:
    def identity() -> str:
        return gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ()).identity

    picture(tmp_path / "a.png", 1)
    first = identity()
    assert identity() == first
    picture(tmp_path / "a.png", 2)
    assert identity() != first


def test_photographs_are_turned_upright(tmp_path: Path, shipped: Bundle) -> None:
    drawn = Image.new("RGB", (32, 32))
    drawn.paste((255, 255, 255), (0, 0, 32, 16))  # white above
    lying = Image.Exif()
    lying[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    drawn.rotate(90).save(tmp_path / "a.png", exif=lying)

    (view,) = gate.from_folder(tmp_path, shipped.manifest.members[0].preprocessing, ()).views

    assert (view == np.asarray(drawn)).all()


def test_a_folder_without_pictures_and_a_damaged_picture_are_named(tmp_path: Path, shipped: Bundle) -> None:
    seen = shipped.manifest.members[0].preprocessing
    with pytest.raises(CalibrationError, match="no pictures in"):
        gate.from_folder(tmp_path, seen, ())
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(CalibrationError, match=r"bad\.jpg can't be decoded"):
        gate.from_folder(tmp_path, seen, ())
    (tmp_path / "bad.jpg").unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match=r"gone\.jpg can't be read"):
        gate.from_folder(tmp_path, seen, ())


def test_golden_pictures_are_seen_in_all_their_views(shipped: Bundle) -> None:
    found = gate.from_golden(shipped, shipped.manifest.members[0])

    assert len(found.views) == 10 * len(shipped.manifest.golden)
    assert found.labels is None


def test_answers_are_those_of_all_views_in_order() -> None:
    engine = FakeEngine(4)
    views = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3), np.uint8)

    np.testing.assert_array_equal(gate.answers(engine, views), FakeEngine(4).run(views))
    assert engine.batches == [16, 16, 5]
