"""The run from pictures to stopping.json, on engines that answer by brightness."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_ensemble.export import engine_store, host
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import calibrate, calibration, thresholds
from resnet_ensemble.server.calibrate import Pictures
from resnet_ensemble.server.calibration import Draft
from resnet_ensemble.server.thresholds import TooFewImages
from resnet_ensemble.training import cifar
from resnet_ensemble.training.views import Preprocessing, make_blocks


class Sharp(FakeEngine):
    """Surer than the fake engine, as networks are."""

    def run(self, views: np.ndarray) -> np.ndarray:
        sharper = super().run(views).astype(np.float64) ** 4
        return (sharper / sharper.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def bundle(pair: Bundle, tmp_path: Path) -> Bundle:
    copy = Bundle.open(Path(shutil.copytree(pair.path, tmp_path / "bundle")))
    (copy.path / calibration.FILE).unlink(missing_ok=True)
    return copy


def pictures(count: int, *, labelled: bool = True) -> Pictures:
    """Grey pictures with noise, so that views differ where the brightness is between two classes."""
    random = np.random.default_rng(0)
    brightness = random.integers(0, 256, count)
    noisy = np.clip(brightness[:, None, None, None] + random.normal(0, 40, (count, 32, 32, 3)), 0, 255).astype(np.uint8)
    labels = np.round(brightness / 255 * 9).astype(np.int64)
    return Pictures("noise", count, lambda i: Image.fromarray(noisy[i]), labels if labelled else None)


def test_every_view_is_run_in_the_order_of_the_steps(bundle: Bundle) -> None:
    engines, shown = [Sharp(10), FakeEngine(10)], pictures(11)

    for protocol in ("10crop", "multiscale"):
        found, seconds = calibrate.run(bundle, engines, shown, protocol)

        steps = calibrate.steps(2, protocol)
        assert found.shape == (11, len(steps), 10)
        assert [len(blocks) for blocks in seconds] == [len({step.block for step in steps})] * 2
        for member, engine in enumerate(engines):
            blocks = make_blocks(shown.decode(9), bundle.manifest.members[member].preprocessing, protocol)
            places = [place for place, step in enumerate(steps) if step.member == member]
            np.testing.assert_array_equal(found[9, places], np.concatenate([engine.run(block) for block in blocks]))


def test_the_seconds_of_a_view_are_the_usual_ones_whatever_happens_once(bundle: Bundle) -> None:
    class Interrupted(FakeEngine):
        def run(self, views: np.ndarray) -> np.ndarray:
            if not self.batches:
                time.sleep(0.3)
            return super().run(views)

    slow, interrupted = FakeEngine(10, seconds_per_view=0.002), Interrupted(10, seconds_per_view=0.0005)

    _, ((first,), (second,)) = calibrate.run(bundle, [slow, interrupted], pictures(40), "center")

    assert first > second >= 0.0005


def test_runs_on_a_gpu_are_timed_one_by_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cores", lambda: 4)
    inside, most = [0], [0]

    class Gpu(FakeEngine):
        def run(self, views: np.ndarray) -> np.ndarray:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            inside[0] -= 1
            return super().run(views)

    engines = [Gpu(10), Gpu(10)]
    for engine in engines:
        engine.info = replace(engine.info, backend="tensorrt")
    calibrate.run(bundle, engines, pictures(64), "center")

    assert most == [1]


def test_what_is_reported_is_what_following_the_rule_gives(bundle: Bundle) -> None:
    """Counted again from the written plan and thresholds alone, on the images that certify."""
    engines, shown = [Sharp(10), FakeEngine(10)], pictures(900)

    found = calibrate.calibrate(bundle, engines, shown, "10crop", disagreement=0.01, confidence=0.9)

    vectors = calibrate.run(bundle, engines, shown, "10crop")[0].astype(np.float64)
    places = {step: place for place, step in enumerate(calibrate.steps(2, "10crop"))}
    _, certifying = thresholds.split(900, calibrate.SEED)
    used, spent, different, wrong = [], [], 0, 0
    for image in certifying:
        sums, views = np.zeros((2, 10)), np.zeros(2, np.int64)
        while step := found.rule.needed(sums, views, found.planned):
            for member, block, view in found.plan[views.sum() : views.sum() + step]:
                sums[member] += vectors[image, places[calibrate.Step(member, block, view)]]
                views[member] += 1
        used.append(views.sum())
        spent.append(sum(found.seconds[member][0] for member, *_ in found.plan[: views.sum()]))
        label = sums.sum(axis=0).argmax()
        different += label != vectors[image].sum(axis=0).argmax()
        wrong += label != shown.labels[image] if shown.labels is not None else 0
    total = sum(found.seconds[member][0] for member, *_ in found.plan)
    assert found.images_certified == len(certifying) == 600
    assert found.disagreements == different
    assert found.costs["calibrated"].views == pytest.approx(np.mean(used))
    assert found.costs["calibrated"].cost == pytest.approx(np.mean(spent) / total)
    assert found.costs["calibrated"].cost < found.costs["exact"].cost < 1
    assert found.errors is not None
    assert found.errors["calibrated"] == pytest.approx(100 * wrong / 600)


def test_with_labels_each_rule_has_a_temperature(bundle: Bundle) -> None:
    found = calibrate.calibrate(
        bundle, [FakeEngine(10), FakeEngine(10)], pictures(400), "flip", disagreement=0.02, confidence=0.9
    )

    assert found.temperatures is not None
    assert set(found.temperatures) == {"full", "exact", "calibrated"}
    for fit in found.temperatures.values():
        assert fit.images == 400
        assert fit.temperature < 1  # the fake engine is never as sure as it could be
        assert fit.loss_after < fit.loss_before
        assert fit.error_after < fit.error_before


def with_drafts(shown: Pictures, drafted: Callable[[int], bool], changed: Callable[[int], bool]) -> Pictures:
    """Some can be decoded smaller, and some are then seen as their negatives."""

    def draft(index: int, shorter_side: int) -> Image.Image:
        assert drafted(index)
        assert shorter_side == 64
        return ImageOps.invert(shown.decode(index)) if changed(index) else shown.decode(index)

    return replace(shown, drafted=lambda index, _: drafted(index), draft=draft)


def test_what_drafts_change_is_counted_and_the_reference_is_of_whole_pictures(bundle: Bundle) -> None:
    engines, whole = [Sharp(10), FakeEngine(10)], pictures(900)
    shown = with_drafts(whole, lambda i: i % 3 > 0, lambda i: i % 100 == 50)

    found = calibrate.calibrate(bundle, engines, shown, "flip", disagreement=0.05, confidence=0.9, draft=True)

    assert shown.draft is not None
    _, certifying = thresholds.split(900, calibrate.SEED)
    vectors = calibrate.run(bundle, engines, whole, "flip")[0].astype(np.float64)
    drafted = [i for i in certifying if shown.drafted(i, 64)]
    wrong = []
    for image in certifying:
        seen = shown.draft(image, 64) if shown.drafted(image, 64) else shown.decode(image)
        views = [make_blocks(seen, member.preprocessing, "flip")[0] for member in bundle.manifest.members]
        answers = [engine.run(block).astype(np.float64) for engine, block in zip(engines, views, strict=True)]
        sums, done = np.zeros((2, 10)), np.zeros(2, np.int64)
        while step := found.rule.needed(sums, done, found.planned):
            for member, _, view in found.plan[done.sum() : done.sum() + step]:
                sums[member] += answers[member][view]
                done[member] += 1
        if sums.sum(axis=0).argmax() != vectors[image].sum(axis=0).argmax():
            wrong.append(image)
    assert {i for i in drafted if i % 100 == 50} & set(wrong)
    assert found.disagreements == len(wrong)
    assert found.draft == Draft(shorter_side=64, images=len(drafted), disagreements=len(set(wrong) & set(drafted)))
    assert f"{len(drafted)} were, and {found.draft.disagreements} of these" in calibrate.report(found)


def test_only_what_a_draft_changes_is_run_twice(bundle: Bundle) -> None:
    engines = [Sharp(10), FakeEngine(10)]
    shown = with_drafts(pictures(400), lambda i: i % 2 == 0, lambda _: False)

    found = calibrate.calibrate(bundle, engines, shown, "flip", disagreement=0.03, confidence=0.9, draft=True)

    assert [sum(engine.batches) for engine in engines] == [2 * (400 + 200)] * 2
    assert found.draft is not None
    assert found.draft.images + found.images_searched < 400


def test_drafts_that_change_too_much_are_left_alone(bundle: Bundle) -> None:
    shown = with_drafts(pictures(400), lambda _: True, lambda i: i % 5 == 0)

    found = calibrate.calibrate(
        bundle, [Sharp(10), FakeEngine(10)], shown, "flip", disagreement=0.03, confidence=0.9, draft=True
    )

    assert found.draft is None
    assert found.draft_side is None
    assert (found.disagreements, found.rule.checkpoints) == (0, ())
    assert found.costs["calibrated"] == found.costs["exact"]
    assert found.errors is not None
    assert found.errors["calibrated"] == found.errors["full"]


def test_too_few_large_jpegs_are_refused_before_anything_is_run(bundle: Bundle) -> None:
    engine = FakeEngine(10)
    shown = with_drafts(pictures(300), lambda i: i < 30, lambda _: False)
    _, certifying = thresholds.split(300, calibrate.SEED)
    count = int((certifying < 30).sum())

    with pytest.raises(TooFewImages, match=rf"^{count} of the 200 images .*of 128 pixels or more.* at least 114 to"):
        calibrate.calibrate(bundle, [engine] * 2, shown, "flip", disagreement=0.02, confidence=0.9, draft=True)
    with pytest.raises(TooFewImages, match=r"^0 of the 200 images"):
        calibrate.calibrate(bundle, [engine] * 2, pictures(300), "flip", disagreement=0.02, confidence=0.9, draft=True)
    assert engine.batches == []


def test_a_draft_has_twice_the_pixels_of_what_the_largest_member_s_views_are_cut_from(bundle: Bundle) -> None:
    first, second = bundle.manifest.members
    larger = Preprocessing(resize=256, crop=224, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    manifest = bundle.manifest.model_copy(
        update={"members": (first.model_copy(update={"preprocessing": larger}), second)}
    )

    assert calibrate.draft_side(bundle, "10crop") == 64
    assert calibrate.draft_side(Bundle(bundle.path, manifest), "10crop") == 512
    assert calibrate.draft_side(Bundle(bundle.path, manifest), "multiscale") == 1280


def test_few_wrong_labels_tell_no_temperature(bundle: Bundle) -> None:
    """Of images that are all answered right, the sharpest probabilities are the likeliest."""
    shown = pictures(300)
    engines = [Sharp(10), Sharp(10)]
    vectors, _ = calibrate.run(bundle, engines, shown, "flip")
    wrong = np.flatnonzero(vectors.mean(axis=1).argmax(axis=1) != shown.labels)
    answered = vectors.mean(axis=1).argmax(axis=1)
    answered[wrong[:9]] = (answered[wrong[:9]] + 1) % 10

    found = calibrate.calibrate(
        bundle, engines, replace(shown, labels=answered), "flip", disagreement=0.02, confidence=0.9
    )

    assert found.errors is not None
    assert found.temperatures is not None
    assert "full" not in found.temperatures
    assert "No temperature of full: fewer than 10 of its labels are wrong." in calibrate.report(found)


def test_without_labels_there_are_thresholds_but_neither_errors_nor_temperatures(bundle: Bundle) -> None:
    found = calibrate.calibrate(
        bundle, [Sharp(10), Sharp(10)], pictures(300, labelled=False), "flip", disagreement=0.02, confidence=0.9
    )

    assert found.errors is None
    assert found.temperatures is None
    assert "error" not in calibrate.report(found)


def test_too_few_images_are_refused_before_anything_is_run(bundle: Bundle) -> None:
    engine = FakeEngine(10)

    with pytest.raises(TooFewImages, match=r"^10 images .* takes at least 896; .* --disagreement 0\.3482 or more$"):
        calibrate.calibrate(bundle, [engine] * 2, pictures(10), "flip", disagreement=0.005, confidence=0.95)
    assert engine.batches == []


@pytest.mark.parametrize(("count", "confidence"), [(2, 0.95), (3, 1 - 1e-12)])
def test_what_no_share_helps_is_not_told_to_ask_for_one(count: int, confidence: float) -> None:
    with pytest.raises(TooFewImages, match=r"takes at least \d+$"):
        calibrate.check_count(count, 4, 0.1, confidence)


def test_a_single_view_can_not_be_saved(bundle: Bundle) -> None:
    first = Bundle(bundle.path, bundle.manifest.model_copy(update={"members": bundle.manifest.members[:1]}))

    with pytest.raises(TooFewImages, match="a single view"):
        calibrate.calibrate(first, [FakeEngine(10)], pictures(99), "center", disagreement=0.1, confidence=0.9)


def test_pictures_are_found_in_any_folder_and_labelled_where_every_folder_is_a_label(
    tmp_path: Path, shipped: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> Pictures:
        return calibrate.find_pictures(tmp_path, shipped.manifest.labels, 10_000)

    for folder in ("ship", "cat"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "a.png")
    (tmp_path / "notes.txt").touch()

    found = read()
    assert (found.name, found.count) == (tmp_path.name, 2)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 8]
    assert found.decode(0).size == (40, 30)
    assert caplog.messages == []

    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    assert read().labels is None
    assert "1 of the 3 pictures in" in caplog.messages[0]
    assert "b.png: there will be no errors and no temperatures" in caplog.messages[0]


def test_a_folder_s_large_jpegs_can_be_drafted(tmp_path: Path, shipped: Bundle) -> None:
    for name, size in (("a.jpg", (160, 128)), ("b.jpg", (126, 160)), ("c.png", (160, 128))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8 no picture")

    found = calibrate.find_pictures(tmp_path, shipped.manifest.labels, 100_000)

    assert [found.drafted(i, 64) for i in range(3)] == [True, False, False]
    (smaller,) = [found.drafts(np.array([0]), 64).decode(0)]
    assert (smaller.size, found.decode(0).size) == ((80, 64), (160, 128))
    with pytest.raises(cifar.DataError, match=r"d\.jpg: .*remove it"):
        found.drafted(3, 64)


def test_a_picture_that_can_t_be_read_is_named(tmp_path: Path, shipped: Bundle) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    found = calibrate.find_pictures(tmp_path, shipped.manifest.labels, 10_000)

    with pytest.raises(cifar.DataError, match=r"bad\.jpg: .*remove it"):
        found.decode(0)
    (tmp_path / "bad.jpg").unlink()
    with pytest.raises(cifar.DataError, match=r"bad\.jpg can't be read .*; remove it"):
        found.decode(0)


def test_cifar_gives_its_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    asked: list[str] = []

    def read(root: Path, split: cifar.Split, dataset: cifar.Dataset) -> cifar.Images:
        asked.append(split)
        return cifar.Images(images, np.array([1, 2]))

    monkeypatch.setattr(cifar, "read", read)
    found = calibrate.find_pictures(tmp_path, cifar.CIFAR10.labels, 10_000)

    assert asked == ["val"]
    assert found.name == "CIFAR-10 val"
    np.testing.assert_array_equal(np.asarray(found.decode(1)), images[1])
    with pytest.raises(cifar.DataError, match="no pictures in"):
        calibrate.find_pictures(tmp_path, ("left", "right"), 10_000)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(engine_store, "open_engine", lambda *_: Sharp(10))
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    calibrate.main()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shown = pictures(150)
    assert shown.labels is not None
    for i, label in enumerate(shown.labels):
        path = tmp_path / "pictures" / cifar.CIFAR10.labels[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.decode(i).save(path)
    return tmp_path / "pictures"


def test_the_command_writes_the_file_and_reports(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, str(bundle.path), str(folder), "--disagreement", "0.05", "--protocol", "flip")

    (found,) = calibration.read(bundle)
    printed = capsys.readouterr().out
    assert (found.protocol, found.images_searched, found.images_certified) == ("flip", 50, 100)
    assert calibrate.report(found) in printed
    assert "at most 5 % of such images" in printed
    assert "Temperature of full" in printed


def test_the_command_certifies_drafts_of_real_jpegs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = pictures(150)
    (tmp_path / "jpegs").mkdir()
    for i in range(150):
        shown.decode(i).resize((192, 160)).save(tmp_path / "jpegs" / f"{i}.jpg")
    arguments = [str(bundle.path), str(tmp_path / "jpegs"), "--disagreement", "0.05", "--protocol", "flip"]

    command(monkeypatch, *arguments, "--draft")

    (found,) = calibration.read(bundle)
    assert found.draft is not None
    assert (found.draft.shorter_side, found.draft.images) == (64, 100)
    assert "to no less than 64 pixels" in capsys.readouterr().out
    command(monkeypatch, *arguments)
    assert calibration.read(bundle)[0].draft is None


def test_the_command_says_that_drafts_were_not_certified(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_drafts(pictures(150), lambda _: True, lambda _: True)
    monkeypatch.setattr(calibrate, "find_pictures", lambda *_: changed)

    command(monkeypatch, str(bundle.path), str(folder), "--disagreement", "0.05", "--protocol", "flip", "--draft")

    assert "Drafts could not be certified" in capsys.readouterr().out
    assert calibration.read(bundle)[0].draft is None


def test_the_command_refuses_with_one_line(bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="calibrate: 150 images can't certify"):
        command(monkeypatch, str(bundle.path), str(folder))
    assert not (bundle.path / calibration.FILE).exists()
    (bundle.path / calibration.FILE).write_text("{")
    with pytest.raises(SystemExit, match="is not JSON"):
        command(monkeypatch, str(bundle.path), str(folder), "--disagreement", "0.05")
    (bundle.path / calibration.FILE).unlink()
    (bundle.path / calibration.FILE).mkdir()
    with pytest.raises(SystemExit, match=r"^calibrate: .*Is a directory"):
        command(monkeypatch, str(bundle.path), str(folder), "--disagreement", "0.05")
    monkeypatch.setenv("RESNET_BACKEND", "fake")
    with pytest.raises(SystemExit, match=r"^calibrate: thresholds of the fake backend would mean nothing"):
        command(monkeypatch, str(bundle.path), str(folder), "--disagreement", "0.05")


def test_where_nothing_can_be_certified_the_report_says_so(bundle: Bundle) -> None:
    found = calibrate.calibrate(bundle, [Sharp(10)] * 2, pictures(200), "flip", disagreement=0.02, confidence=0.9)

    careful = found.model_copy(update={"thresholds": (None,) * len(found.checkpoints)})
    assert "Nothing cheaper than `exact` could be certified" in calibrate.report(careful)
    assert "Stops after 1 from a lead of" in calibrate.report(found)


def test_calibrated_is_never_dearer_than_exact_on_the_images_that_decide(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Careful thresholds in the order that was found may stop later than proofs do in the cheapest order."""
    random = np.random.default_rng(2)
    count, seconds = 900, [[0.001], [0.0023]]
    to_search, _ = thresholds.split(count, calibrate.SEED)
    for _ in range(6):
        of_image, of_member, of_view = (random.normal(size=(count, *rest, 10)) for rest in [(1, 1), (2, 1), (2, 10)])
        powers = np.exp(2 * (2 * of_image + of_member + of_view))
        vectors = (powers / powers.sum(axis=-1, keepdims=True)).reshape(count, 20, 10).astype(np.float32)
        monkeypatch.setattr(calibrate, "run", lambda *_, vectors=vectors: (vectors, seconds))
        shown = pictures(count, labelled=False)
        found = calibrate.calibrate(bundle, [Sharp(10)] * 2, shown, "10crop", disagreement=0.005, confidence=0.95)

        answers = thresholds.Answers(vectors, np.repeat([0, 1], 10), np.repeat([0.001, 0.0023], 10)).of(to_search)
        order = np.array([step.member * 10 + step.view for step in found.plan])
        bounds = np.array([np.inf if value is None else value for value in found.thresholds])
        cheapest = thresholds.walk(answers, thresholds.cheapest_first(answers.seconds), found.checkpoints)
        proofs = thresholds.follow(cheapest, np.full(len(bounds), np.inf)).seconds.mean()
        cost = thresholds.follow(thresholds.walk(answers, order, found.checkpoints), bounds).seconds.mean()
        assert cost <= proofs
