import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from resnet_ensemble.export.bundle import Bundle, BundleInvalid
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.server import calibration
from resnet_ensemble.server.calibration import Calibration, Draft, NotCalibrated, RuleCost
from resnet_ensemble.server.stopping import Calibrated

FP32 = EngineInfo("onnxruntime", "1", "fp32", "cpu", threads=1)
INT8 = EngineInfo("onnxruntime", "1", "int8", "cpu", threads=1)


@pytest.fixture
def bundle(pair: Bundle, tmp_path: Path) -> Bundle:
    copy = Bundle.open(Path(shutil.copytree(pair.path, tmp_path / "bundle")))
    (copy.path / calibration.FILE).unlink(missing_ok=True)
    return copy


def found(bundle: Bundle, engine: EngineInfo = FP32, **changed: Any) -> Calibration:
    content: dict[str, Any] = {
        "protocol": "flip",
        "engines": calibration.kinds(bundle, [engine] * len(bundle.manifest.members)),
        "plan": [(0, 0, 1), (1, 0, 0), (1, 0, 1), (0, 0, 0)],
        "checkpoints": (1, 2),
        "thresholds": (0.9, None),
        "disagreement": 0.01,
        "confidence": 0.95,
        "images": "here",
        "images_searched": 100,
        "images_certified": 300,
        "disagreements": 0,
        "planned": 4,
        "seconds": [[1.0], [2.0]],
        "costs": {"exact": RuleCost(views=3, cost=0.8), "calibrated": RuleCost(views=2, cost=0.4)},
        "errors": None,
        "temperatures": None,
    }
    return Calibration.model_validate(content | changed)


def test_what_was_written_is_found(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))

    assert calibration.find(bundle, "flip", [FP32, FP32]) == found(bundle)


def test_drafts_are_found_as_they_were_written(bundle: Bundle) -> None:
    drafts = Draft(shorter_side=64, images=200, disagreements=1)
    calibration.write(bundle, found(bundle, draft=drafts))

    kept = calibration.find(bundle, "flip", [FP32, FP32])
    assert (kept.draft, kept.draft_side) == (drafts, 64)


def test_a_file_from_before_there_were_drafts_has_none(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))
    file = bundle.path / calibration.FILE
    written = json.loads(file.read_text())
    assert written["calibrations"][0].pop("draft") is None
    del written["sha256"]  # nor had it one
    file.write_text(json.dumps(written))

    kept = calibration.find(bundle, "flip", [FP32, FP32])
    assert kept == found(bundle)
    assert kept.draft_side is None


def test_a_checkpoint_where_nothing_stops_is_none_of_the_rules(bundle: Bundle) -> None:
    assert found(bundle).rule == Calibrated((1,), (0.9,))
    assert found(bundle, thresholds=(None, None)).rule == Calibrated((), ())


def test_the_plan_has_the_order_found_and_the_costs_of_this_host(bundle: Bundle) -> None:
    plan = found(bundle).ordered_plan([[0.5], [0.7]])

    assert (plan.protocol, plan.views) == ("flip", 4)
    places = [(stage.member, stage.start, stage.views, stage.seconds) for stage in plan.stages]
    assert places == [(0, 1, 1, 0.5), (1, 0, 2, 0.7), (0, 0, 1, 0.5)]


def test_without_thresholds_the_message_says_how_to_find_them(bundle: Bundle) -> None:
    with pytest.raises(NotCalibrated, match=r"no thresholds for flip.*server\.calibrate .* --protocol flip"):
        calibration.find(bundle, "flip", [FP32, FP32])
    calibration.write(bundle, found(bundle))
    with pytest.raises(NotCalibrated, match="no thresholds for center"):
        calibration.find(bundle, "center", [FP32, FP32])


def test_thresholds_of_other_engines_are_refused(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))

    with pytest.raises(NotCalibrated, match="resnet32 ran on onnxruntime fp32, not onnxruntime int8; run python"):
        calibration.find(bundle, "flip", [FP32, INT8])


def test_thresholds_of_an_engine_that_was_quantized_with_other_pictures_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"resnet20": "these", "resnet32": "these"}
    monkeypatch.setattr(
        calibration.EngineStore, "current", lambda _self, member, *_: SimpleNamespace(calibration=used[member.name])
    )
    calibration.write(bundle, found(bundle, INT8))
    assert calibration.find(bundle, "flip", [INT8, INT8])

    used["resnet32"] = "others"
    with pytest.raises(NotCalibrated, match="the int8 of resnet32 was calibrated on other pictures; run python"):
        calibration.find(bundle, "flip", [INT8, INT8])


def test_thresholds_of_views_that_are_made_in_another_way_are_refused(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))
    first, other = bundle.manifest.members
    wider = other.model_copy(update={"preprocessing": replace(other.preprocessing, padding=4)})
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"members": (first, wider)}))

    with pytest.raises(NotCalibrated, match="resnet32 saw other views; run python"):
        calibration.find(changed, "flip", [FP32, FP32])


def test_thresholds_of_other_weights_are_refused(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))
    first, *others = bundle.manifest.members
    changed = bundle.manifest.model_copy(update={"members": (first.model_copy(update={"sha256": "0" * 64}), *others)})

    with pytest.raises(NotCalibrated, match="resnet20 has other weights; run python"):
        calibration.find(Bundle(bundle.path, changed), "flip", [FP32, FP32])
    fewer = Bundle(bundle.path, bundle.manifest.model_copy(update={"members": (first,)}))
    with pytest.raises(NotCalibrated, match="of members resnet20, resnet32, not resnet20"):
        calibration.find(fewer, "flip", [FP32])


def test_other_engines_are_kept_beside_and_the_same_are_replaced(bundle: Bundle) -> None:
    for engine, disagreements in ((FP32, 0), (INT8, 1), (FP32, 2)):
        calibration.write(bundle, found(bundle, engine, disagreements=disagreements))

    kept = [(known.engines[0].precision, known.disagreements) for known in calibration.read(bundle)]
    assert kept == [("int8", 1), ("fp32", 2)]


def test_what_belongs_to_older_weights_is_dropped_when_new_ones_are_written(bundle: Bundle) -> None:
    older = [kind.model_copy(update={"sha256": "0" * 64}) for kind in found(bundle).engines]
    calibration.write(bundle, found(bundle, protocol="flip", engines=older))

    calibration.write(bundle, found(bundle))

    assert calibration.read(bundle) == (found(bundle),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is not JSON"), ('{"format": 2}', "format: Input should be 1"), ("[]", "is not valid")],
)
def test_a_damaged_file_is_refused_and_not_written_over(bundle: Bundle, content: str, reason: str) -> None:
    file = bundle.path / calibration.FILE
    file.write_text(content)

    with pytest.raises(BundleInvalid, match=f"{reason}.*remove it and run"):
        calibration.find(bundle, "flip", [FP32, FP32])
    with pytest.raises(BundleInvalid, match=reason):
        calibration.write(bundle, found(bundle))
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"checkpoints": (2, 1)}, "must ascend"),
        ({"checkpoints": (1, 4)}, "less than 4"),
        ({"thresholds": (0.9,)}, "2 checkpoints have 1 thresholds"),
        ({"thresholds": (0.9, float("nan"))}, "finite"),
        ({"plan": [(0, 0, 1), (1, 0, 0), (1, 0, 1), (0, 0, 1)]}, "each of the 4 views of flip once"),
        ({"protocol": "10crop"}, "each of the 20 views"),
        ({"disagreement": 0.0}, "greater than 0"),
        ({"draft": {"shorter_side": 0, "images": 9, "disagreements": 0}}, "greater than 0"),
    ],
)
def test_what_contradicts_itself_is_refused(bundle: Bundle, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        found(bundle, **changed)


def test_the_file_is_plain_json_with_everything_that_was_found(bundle: Bundle) -> None:
    calibration.write(bundle, found(bundle))

    (written,) = json.loads((bundle.path / calibration.FILE).read_text())["calibrations"]
    assert written["thresholds"] == [0.9, None]
    assert written["engines"][0] == {
        "member": "resnet20",
        "sha256": bundle.manifest.members[0].sha256,
        "preprocessing": json.loads((bundle.path / "bundle.json").read_text())["members"][0]["preprocessing"],
        "backend": "onnxruntime",
        "precision": "fp32",
        "calibration": "",
    }


def test_the_shipped_thresholds_belong_to_the_shipped_weights(shipped: Bundle) -> None:
    """After a change of the weights: python -m resnet_ensemble.server.calibrate bundles/cifar10 DATA."""
    found = calibration.find(shipped, "10crop", [FP32] * len(shipped.manifest.members))

    assert (found.images, found.images_searched + found.images_certified) == ("CIFAR-10 val", 5000)
    assert found.costs["calibrated"].cost < found.costs["exact"].cost < 1


def test_the_readme_says_what_the_shipped_thresholds_do(shipped: Bundle, root: Path) -> None:
    readme = (root / "README.md").read_text()
    found = calibration.find(shipped, "10crop", [FP32] * len(shipped.manifest.members))
    assert found.errors is not None
    assert found.temperatures is not None
    exact, calibrated = found.costs["exact"], found.costs["calibrated"]

    rows = [
        f"| `exact` | {exact.views:.2f} | {exact.cost:.3f} | 0 | {found.errors['full']:.2f} % |",
        f"| `calibrated`, {100 * found.disagreement:g} % at {100 * found.confidence:g} % |",
        f"| {calibrated.views:.2f} | {calibrated.cost:.3f} | {found.disagreements} |",
        f"| {found.disagreements} | {found.errors['calibrated']:.2f} % |",
        *(f"from {fit.error_before:.4f} to {fit.error_after:.4f}" for fit in found.temperatures.values()),
    ]
    assert [row for row in rows if row not in readme] == []
