import asyncio
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export.bundle import Bundle, write
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import evaluate
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.drawing import draw
from resnet_ensemble.server.evaluate import Example
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training import cifar

Png = Callable[..., bytes]


def examples_of(*pairs: tuple[bytes, int]) -> list[Example]:
    return [Example(lambda content=content: content, label) for content, label in pairs]  # type: ignore[misc]


def score(pair: Bundle, *pairs: tuple[bytes, int]) -> evaluate.Score:
    classifier = load(Settings(bundle=pair.path), Metrics(), lambda *_: FakeEngine(10))
    try:
        return asyncio.run(evaluate.evaluate(classifier, examples_of(*pairs), "flip"))[0]
    finally:
        classifier.close()


def test_errors_of_ensemble_and_members_are_counted(png: Png, pair: Bundle) -> None:
    result = score(pair, (png(0), 0), (png(255), 9), (png(255), 3), (png(0), 0))

    assert (result.protocol, result.stop, result.images, result.ensemble) == ("flip", "full", 4, 25.0)
    assert (result.views_used, result.views_planned, result.cost, result.agreement) == (4, 4, 1.0, None)
    assert result.members == {member.name: 25.0 for member in pair.manifest.members}
    assert result.images_per_second > 0
    assert result.multiply_adds == 2 * sum(member.multiply_adds or 0 for member in pair.manifest.members) > 0


def test_every_protocol_is_evaluated_with_every_stop_rule_and_compared_with_all_views(png: Png, pair: Bundle) -> None:
    classifier = load(Settings(bundle=pair.path), Metrics(), lambda *_: FakeEngine(10))
    try:
        examples = examples_of((png(0), 0), (png(255), 3), (png(142), 5))
        scores = asyncio.run(evaluate.evaluate_all(classifier, examples, ["center", "10crop"], ["exact", "full"]))
    finally:
        classifier.close()

    assert [(score.protocol, score.stop) for score in scores] == [
        (protocol, stop) for protocol in ("center", "10crop") for stop in ("full", "exact")
    ]
    assert [score.agreement for score in scores] == [None, 100, None, 100]
    assert [score.members is None for score in scores] == [False, True, False, True]
    full, exact = scores[2:]
    assert exact.ensemble == full.ensemble == pytest.approx(100 / 3)
    assert exact.views_used < full.views_used == exact.views_planned == 20
    assert exact.cost < full.cost == 1
    assert full.multiply_adds is not None
    assert exact.multiply_adds is not None
    assert 0.5 * full.multiply_adds <= exact.multiply_adds < full.multiply_adds


def test_views_of_a_whole_picture_cost_as_their_pixels(pair: Bundle) -> None:
    classifier = load(Settings(bundle=pair.path), Metrics(), lambda *_: FakeEngine(10))
    wide = io.BytesIO()
    Image.new("RGB", (48, 32)).save(wide, "PNG")
    try:
        score, _ = asyncio.run(evaluate.evaluate(classifier, examples_of((wide.getvalue(), 0)), "dense"))
    finally:
        classifier.close()

    of_crops = sum(member.multiply_adds or 0 for member in pair.manifest.members)
    assert score.multiply_adds == pytest.approx(2 * 1.5 * of_crops)


def test_a_part_of_the_images_has_all_labels() -> None:
    examples = [Example(bytes, label) for label in range(10) for _ in range(7)]

    assert [example.label for example in evaluate.spread(examples, 10)] == list(range(10))
    assert evaluate.spread(examples, None) == evaluate.spread(examples, 100) == examples


def test_data_of_other_labels_is_refused(tmp_path: Path, png: Png, pair: Bundle) -> None:
    with pytest.raises(cifar.DataError, match=r"there is nothing at .*missing"):
        evaluate.read(tmp_path / "missing", "val", ("left", "right"))
    with pytest.raises(cifar.DataError, match="named like a label"):
        evaluate.read(tmp_path, "val", ("left", "right"))
    (tmp_path / "1.png").write_bytes(png())
    with pytest.raises(cifar.DataError, match=r"1 of the 1 pictures in .* are in no folder that is named like a label"):
        evaluate.read(tmp_path, "val", pair.manifest.labels)


def test_a_folder_for_each_label_is_read_and_what_is_no_picture_left_alone(
    tmp_path: Path, png: Png, pair: Bundle
) -> None:
    for label in ("cat", "ship"):
        (tmp_path / label / "more").mkdir(parents=True)
        (tmp_path / label / "1.png").write_bytes(png(3))
        (tmp_path / label / ".DS_Store").write_bytes(b"x")

    name, split, examples = evaluate.read(tmp_path, "val", pair.manifest.labels)

    assert (name, split) == (tmp_path.name, "all")
    assert [(example.label, Path(example.name).name) for example in examples] == [(3, "1.png"), (8, "1.png")]


def test_a_folder_is_named_as_its_path_is_and_a_split_with_the_folder_that_it_is_in(
    tmp_path: Path, png: Png, pair: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "test" / "cat" / "1.png").write_bytes(png())
    monkeypatch.chdir(tmp_path / "photos" / "test")

    for path in (Path(), tmp_path / "photos" / "test"):
        assert evaluate.read(path, "val", pair.manifest.labels)[:2] == ("photos", "test")
    assert evaluate.read(Path(".."), "val", pair.manifest.labels)[:2] == ("photos", "all")


def test_pictures_whose_label_is_not_known_are_refused(tmp_path: Path, png: Png, pair: Bundle) -> None:
    for folder in ("cat", "aeroplane"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(3))

    with pytest.raises(cifar.DataError, match=r"1 of the 2 pictures in .* the first is .*aeroplane/1\.png"):
        evaluate.read(tmp_path, "val", pair.manifest.labels)


def test_a_picture_that_can_t_be_answered_is_named_and_the_engines_are_closed(
    tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "junk.png").write_bytes(b"junk")
    closed: list[Classifier] = []
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path), "--protocol", "center"])
    monkeypatch.setattr(evaluate, "load", lambda settings, metrics: load(settings, metrics, lambda *_: FakeEngine(10)))
    close = Classifier.close
    monkeypatch.setattr(Classifier, "close", lambda self: (closed.append(self), close(self)))

    with pytest.raises(SystemExit, match=r"junk\.png: unsupported_image_format"):
        evaluate.main()

    assert len(closed) == 1


def test_a_picture_that_can_t_be_read_is_named(tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("RESNET_BACKEND", "fake")
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path), "--protocol", "center"])

    with pytest.raises(SystemExit, match=r"^evaluate: .*gone\.png can't be read"):
        evaluate.main()


@pytest.mark.parametrize(
    ("variable", "reason"), [("BACKEND", "RESNET_BACKEND: Input should be"), ("FOO", "RESNET_FOO is not a setting")]
)
def test_a_wrong_setting_is_refused_with_one_line(
    tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    monkeypatch.setenv(f"RESNET_{variable}", "bogus")
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path)])

    with pytest.raises(SystemExit, match=f"^evaluate: {reason}"):
        evaluate.main()


def test_errors_of_the_fake_backend_are_not_recorded(
    tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_BACKEND", "fake")
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path), "--record"])

    with pytest.raises(SystemExit, match=r"^evaluate: errors of the fake backend would mean nothing"):
        evaluate.main()


@pytest.mark.parametrize(
    ("name", "reason"), [("plot.pdf", "2"), ("plot.png", r"^evaluate: .*Is a directory: '.*plot\.png'")]
)
def test_a_plot_that_could_not_be_written_is_refused_before_anything_is_run(
    tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    (tmp_path / "plot.png").mkdir()
    monkeypatch.setattr(evaluate, "load", None)
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path), "--plot", str(tmp_path / name)])

    with pytest.raises(SystemExit, match=reason):
        evaluate.main()


def test_an_interrupt_ends_it_quietly(tmp_path: Path, pair: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load", interrupt)
    monkeypatch.setattr("sys.argv", ["evaluate", str(pair.path), str(tmp_path)])

    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 130


def test_cifar_images_are_encoded_without_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    monkeypatch.setattr(cifar, "read", lambda *_: cifar.Images(images, np.array([1, 2])))

    name, split, examples = evaluate.read(tmp_path, "val", cifar.CIFAR10.labels)

    from resnet_ensemble.server.images import decode

    assert (name, split) == ("CIFAR-10", "val")
    decoded = [np.asarray(decode(example.read(), max_pixels=2000)) for example in examples]
    np.testing.assert_array_equal(np.stack(decoded), images)


def test_a_recorded_result_replaces_an_older_one(pair: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(Path(shutil.copytree(pair.path, tmp_path / "b")))

    names = [member.name for member in bundle.manifest.members]

    for error in (9.0, 8.0):
        members = dict.fromkeys(names, error + 2)
        full = evaluate.Score("flip", "full", 7, error, members, None, 4.0, 4, 1.0, 1.0, None)
        exact = evaluate.Score("flip", "exact", 7, 1.0, None, 100.0, 3.0, 4, 0.6, 1.0, None)
        evaluate.record(Bundle.open(bundle.path), [full, exact], "D", "val", "onnxruntime fp32")

    after = Bundle.open(bundle.path).manifest
    recorded = [[m for m in part.measured if m.dataset == "D"] for part in (after, *after.members)]
    found = [[(m.protocol, m.images, m.top1_error) for m in measured] for measured in recorded]
    assert found == [[("flip", 7, 8.0)], *[[("flip", 7, 10.0)]] * len(names)]
    assert after.measured[: len(bundle.manifest.measured)] == bundle.manifest.measured


def test_the_table_has_a_row_for_each_protocol_and_stop_rule() -> None:
    members = {"a": 9.0, "b": 10.0}
    full = evaluate.Score("10crop", "full", 5000, 8.0, members, None, 20.0, 20, 1.0, 123.4, 2.2e9)
    exact = evaluate.Score("10crop", "exact", 5000, 8.0, None, 100.0, 11.53, 20, 0.512, 234.5, None)

    lines = evaluate.table([full, exact]).splitlines()

    assert lines[0] == (
        "| protocol | stop | a | b | ensemble (95 % interval) | agreement | views | multiply-adds | cost | images/s |"
    )
    error = "**8.00 %** (7.28 to 8.78)"
    assert lines[2] == f"| 10crop | full | 9.00 % | 10.00 % | {error} |  | 20.0 of 20 | 2,200 M | 1.00 | 123 |"
    assert lines[3] == f"| 10crop | exact |  |  | {error} | 100.00 % | 11.5 of 20 |  | 0.51 | 234 |"
    assert len(lines) == 4


def test_the_plot_has_every_score_and_the_same_scores_give_the_same_bytes() -> None:
    full = evaluate.Score("10crop", "full", 5000, 8.0, None, None, 20.0, 20, 1.0, 123.4, 2.2e9)
    scores = [full, replace(full, stop="exact", multiply_adds=1.2e9), replace(full, protocol="dense")]

    drawn = draw(scores, "cifar10")

    with Image.open(io.BytesIO(drawn)) as image:
        assert image.format == "PNG"
    assert draw(scores, "cifar10") == drawn != draw(scores[:2], "cifar10")


def test_a_bundle_without_multiply_adds_is_evaluated_without_them(png: Png, pair: Bundle, tmp_path: Path) -> None:
    members = tuple(member.model_copy(update={"multiply_adds": None}) for member in pair.manifest.members)
    shutil.copytree(pair.path, tmp_path / "b")
    old = write(tmp_path / "b", pair.manifest.model_copy(update={"members": members}), {})

    assert score(old, (png(0), 0)).multiply_adds is None
