"""What a request can ask for depends on what stopping.json has for the very engines that run."""

import asyncio
import gc
import io
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export.bundle import Bundle, BundleError
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import calibration, evaluate, images
from resnet_ensemble.server.calibration import Draft, NotCalibrated, Temperature
from resnet_ensemble.server.classifier import load
from resnet_ensemble.server.costs import Cost
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options, Prediction
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.server.strategies import Strategies
from resnet_ensemble.training.views import make_views
from tests.server.test_calibration import found
from tests.server.test_predictions import Constant
from tests.server.test_refusals import assert_problem

Png = Callable[..., bytes]
FAKE = FakeEngine(10).info
COSTS = [Cost(0.002, 10), Cost(0.001, 10)]  # the first member is the dearer one


def temperature(value: float, error: float, loss: float = 0.9) -> Temperature:
    """Fitted; the calibration error was 0.1 before, the loss 1."""
    after = {"error_after": error, "loss_after": loss}
    return Temperature(temperature=value, images=9, folds=5, bins=15, error_before=0.1, loss_before=1, **after)


@pytest.fixture
def calibrated(pair: Bundle, tmp_path: Path) -> Bundle:
    """Of `flip`: one view of the first member is enough where it leads by 0.5. `full` has a temperature that helps."""
    copy = Bundle.open(Path(shutil.copytree(pair.path, tmp_path / "cifar10")))
    temperatures = {
        "full": temperature(2.0, 0.01),
        "exact": temperature(2.0, 0.2),
        "calibrated": temperature(2.0, 0.01, 1.1),
    }
    calibration.write(copy, found(copy, FAKE, thresholds=(0.5, None), temperatures=temperatures))
    return copy


def test_a_protocol_with_thresholds_has_the_third_rule_in_the_order_found(calibrated: Bundle) -> None:
    strategies = Strategies(calibrated, [FAKE, FAKE], COSTS)

    plan = strategies.of("flip", "calibrated").plan
    assert [(stage.member, stage.start, stage.views, stage.seconds) for stage in plan.stages] == [
        (0, 1, 1, 0.002),
        (1, 0, 2, 0.001),
        (0, 0, 1, 0.002),
    ]
    assert [stage.member for stage in strategies.of("flip", "exact").plan.stages] == [1, 0]
    assert strategies.rules == ("full", "exact", "calibrated")


def test_other_protocols_and_engines_have_not(calibrated: Bundle) -> None:
    other = EngineInfo("fake", "1", "int8", "cpu", threads=1)

    with pytest.raises(NotCalibrated, match="no thresholds for center"):
        Strategies(calibrated, [FAKE, FAKE], COSTS).of("center", "calibrated")
    with pytest.raises(NotCalibrated, match="resnet32 ran on fake fp32, not fake int8"):
        Strategies(calibrated, [FAKE, other], COSTS).of("flip", "calibrated")
    assert Strategies(calibrated, [FAKE, other], COSTS).rules == ("full", "exact")


def test_a_damaged_file_is_not_taken_for_none(calibrated: Bundle) -> None:
    (calibrated.path / "stopping.json").write_text("{")

    with pytest.raises(BundleError, match=r"stopping\.json of cifar10 is not JSON"):
        Strategies(calibrated, [FAKE, FAKE], COSTS)


def test_only_a_temperature_that_helps_is_used(calibrated: Bundle) -> None:
    strategies = Strategies(calibrated, [FAKE, FAKE], COSTS)

    found = {rule: strategies.of("flip", rule).temperature for rule in strategies.rules}
    assert found == {"full": 2.0, "exact": None, "calibrated": None}
    assert strategies.of("center", "full").temperature is None


def test_an_image_is_answered_at_the_first_checkpoint_where_it_leads(
    serve: Callable[..., Any], calibrated: Bundle, png: Png
) -> None:
    with serve(lambda _: Constant(3, 0.1), bundle=calibrated.path) as client:
        body = client.post("/predict?protocol=flip&stop=calibrated", content=png()).json()
        exact = client.post("/predict?protocol=flip&stop=exact", content=png()).json()

    assert (body["index"], body["views_used"], body["views_planned"], body["stop_rule"]) == (3, 1, 4, "calibrated")
    assert (body["certain"], body["confidence"]) == (False, None)
    assert [(vote["member"], vote["views"]) for vote in body["members"]] == [("resnet20", 1)]
    assert (exact["index"], exact["certain"], exact["views_used"]) == (3, True, 3)


def test_a_temperature_gives_confidences_and_changes_nothing_else(
    serve: Callable[..., Any], calibrated: Bundle, pair: Bundle, png: Png
) -> None:
    answers = []
    for bundle in (calibrated, pair):
        with serve(bundle=bundle.path) as client:
            answers.append(client.post("/predict?protocol=flip&top_k=10", content=png(90)).json())
    tempered, plain = answers

    for key in ("label", "probability", "entropy", "mutual_information", "views_used"):
        assert tempered[key] == plain[key]
    assert [entry["probability"] for entry in tempered["top"]] == [entry["probability"] for entry in plain["top"]]
    confidences = [entry["confidence"] for entry in tempered["top"]]
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1)
    # At a temperature of 2 a probability becomes its square root, normalised.
    roots = [entry["probability"] ** 0.5 for entry in plain["top"]]
    assert confidences == pytest.approx([root / sum(roots) for root in roots])
    assert tempered["confidence"] == confidences[0]
    assert {entry["confidence"] for entry in plain["top"]} == {None}


def test_what_has_no_thresholds_is_refused_and_info_tells_what_has(
    serve: Callable[..., Any], calibrated: Bundle, png: Png
) -> None:
    with serve(bundle=calibrated.path) as client:
        detail = assert_problem(
            client.post("/predict?protocol=center&stop=calibrated", content=png()), "not_calibrated"
        )
        info = client.get("/info").json()

    assert "no thresholds for center" in detail["detail"]
    assert str(calibrated.path.parent) not in detail["detail"]
    assert info["stop_rules"] == ["full", "exact", "calibrated"]
    assert info["calibrated"] == {
        "flip": {
            "disagreement": 0.01,
            "confidence": 0.95,
            "images": 300,
            "disagreements": 0,
            "views": 2.0,
            "cost": 0.4,
            "draft": None,
        }
    }


class Watching(FakeEngine):
    """Keeps the views that it is shown."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.shown: list[np.ndarray] = []

    def run(self, views: np.ndarray) -> np.ndarray:
        self.shown.extend(views)
        return super().run(views)


def noisy(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (160, 256, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


@pytest.mark.parametrize(
    ("drafts", "stop", "format", "drafted"),
    [
        (True, "calibrated", "JPEG", True),
        (True, "calibrated", "PNG", False),
        (True, "exact", "JPEG", False),
        (True, "full", "JPEG", False),
        (False, "calibrated", "JPEG", False),
    ],
)
def test_only_calibrated_sees_drafts_and_only_where_they_are_certified(
    calibrated: Bundle, drafts: bool, stop: str, format: str, drafted: bool
) -> None:
    certified = Draft(shorter_side=64, images=200, disagreements=1) if drafts else None
    calibration.write(calibrated, found(calibrated, FAKE, thresholds=(None, None), draft=certified))
    content = noisy(format)
    engines: list[Watching] = []

    def opener(*_: object) -> Watching:
        engines.append(Watching(10))
        return engines[-1]

    classifier = load(Settings(bundle=calibrated.path), Metrics(), opener)
    for engine in engines:
        engine.shown.clear()
    (answer,) = asyncio.run(classifier.classify([content], Options(protocol="flip", stop=stop)))
    asyncio.run(evaluate.evaluate(classifier, [evaluate.Example(lambda: content, 0)], "flip", stop))
    classifier.close()

    image = images.decode(content, max_pixels=10**6, draft=64 if drafted else None)
    views = make_views(image, calibrated.manifest.members[0].preprocessing, "flip")
    assert image.size == ((128, 80) if drafted else (256, 160))
    assert {view.tobytes() for engine in engines for view in engine.shown} == {view.tobytes() for view in views}
    # Nothing is proven about the whole picture by views of a smaller one.
    assert isinstance(answer, Prediction)
    assert answer.views_used == answer.views_planned
    assert answer.certain == answer.certain_top5 == (not drafted)


def test_info_tells_of_drafts(serve: Callable[..., Any], calibrated: Bundle) -> None:
    calibration.write(calibrated, found(calibrated, FAKE, draft=Draft(shorter_side=64, images=200, disagreements=1)))

    with serve(bundle=calibrated.path) as client:
        info = client.get("/info").json()

    assert info["calibrated"]["flip"]["draft"] == 64


def test_what_was_refused_for_want_of_thresholds_is_not_kept(calibrated: Bundle) -> None:
    classifier = load(Settings(bundle=calibrated.path), Metrics(), lambda *_: FakeEngine(10))
    pixels = np.zeros((8, 8, 3), np.uint8)
    known = weakref.ref(pixels)
    try:
        with pytest.raises(ApiError, match="no thresholds for center"):
            asyncio.run(classifier.classify([pixels], Options(protocol="center", stop="calibrated")))
        del pixels
        gc.collect()
        assert known() is None
    finally:
        classifier.close()


def test_a_server_does_not_start_with_a_default_that_it_has_not(pair: Bundle) -> None:
    settings = Settings(bundle=pair.path, stop="calibrated")

    with pytest.raises(BundleError, match="stop rule can't be calibrated: no thresholds for 10crop"):
        load(settings, Metrics(), lambda *_: FakeEngine(10))


def test_an_engine_of_another_kind_takes_the_thresholds_away(calibrated: Bundle, png: Png) -> None:
    kinds = iter(["fp32", "fp32", "int8"])  # the third is opened when the first has died
    opened: list[FakeEngine] = []

    def opener(*_: object) -> FakeEngine:
        engine = FakeEngine(10)
        engine.info = EngineInfo("fake", "1", next(kinds), "cpu", threads=1)  # type: ignore[arg-type]
        opened.append(engine)
        return engine

    classifier = load(Settings(bundle=calibrated.path), Metrics(), opener)
    options = Options(protocol="flip", stop="calibrated")
    (before,) = asyncio.run(classifier.classify([png()], options))
    opened[0].kill()
    (during,) = asyncio.run(classifier.classify([png()], Options(protocol="flip")))
    with pytest.raises(ApiError, match="resnet20 ran on fake fp32, not fake int8"):
        asyncio.run(classifier.classify([png()], options))
    classifier.close()

    assert isinstance(before, Prediction)
    assert isinstance(during, Prediction)


def test_evaluation_has_the_rule_where_there_are_thresholds(calibrated: Bundle, png: Png) -> None:
    classifier = load(Settings(bundle=calibrated.path), Metrics(), lambda *_: Constant(0, 0.1))
    scores = asyncio.run(
        evaluate.evaluate_all(classifier, [evaluate.Example(png, 0)], ["center", "flip"], list(evaluate.STOPS))
    )
    classifier.close()

    assert [(score.protocol, score.stop, score.views_used, score.agreement) for score in scores] == [
        ("center", "full", 2.0, None),
        ("center", "exact", 2.0, 100.0),
        ("flip", "full", 4.0, None),
        ("flip", "exact", 3.0, 100.0),
        ("flip", "calibrated", 1.0, 100.0),
    ]
