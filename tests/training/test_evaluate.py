"""Evaluation of untrained networks, whose errors are known from their probabilities."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_ensemble.training import augment, checkpoint, evaluate, paper
from resnet_ensemble.training.checkpoint import Checkpoint
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.evaluate import ALL_PROTOCOLS, Network, Score
from resnet_ensemble.training.recipes import RECIPES, new_network
from resnet_ensemble.training.views import PROTOCOLS, make_views
from tests.training.small import cifar_of_two, write_folders

RECIPE = replace(RECIPES["resnet20-cifar10"], depth=8)
FOLDERS = replace(RECIPES["resnet18b-imagenet"], classes=3, first_crop=0, crop=64, test_crop=64, test_resize=72)
CPU = torch.device("cpu")
Pictures = tuple[list[np.ndarray], list[int]]


def untrained(seed: int = 0, mean_image: torch.Tensor | None = None) -> Network:
    torch.manual_seed(seed)
    return Network(Checkpoint(RECIPE, new_network(RECIPE).state_dict(), mean_image=mean_image), CPU)


def of_folders(*labels: str, classes: int = 3) -> Network:
    recipe = replace(FOLDERS, classes=classes)
    return Network(Checkpoint(recipe, new_network(recipe).state_dict(), labels=labels), CPU)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    images = cifar_of_two(Path(), "val")
    return list(images.images), images.labels.tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_errors_are_those_of_the_mean_over_the_views(protocol: str, pictures: Pictures) -> None:
    network, (images, labels) = untrained(), pictures
    wrong = 0
    for pixels, label in zip(images, labels, strict=True):
        views = make_views(Image.fromarray(pixels), RECIPE.preprocessing, protocol)
        wrong += int(network.probabilities(torch.from_numpy(views)).mean(0).argmax()) != label

    (score,) = evaluate.evaluate([network], images, labels, protocol)

    assert score.top1 == pytest.approx(100 * wrong / len(labels))
    assert score.images == len(labels)
    assert 0 <= score.top5 <= score.top1


def test_an_ensemble_averages_its_networks(pictures: Pictures) -> None:
    networks, (images, labels) = [untrained(0), untrained(1)], pictures
    views = torch.from_numpy(np.stack(images))
    mean = sum(network.probabilities(views) for network in networks) / 2

    scores = evaluate.evaluate(networks, images, labels, "center")

    assert [score.network for score in scores] == ["resnet8", "resnet8", "ensemble"]
    assert scores[-1].top1 == pytest.approx(100 * float((mean.argmax(1) != torch.tensor(labels)).double().mean()))


@pytest.mark.parametrize("protocol", ALL_PROTOCOLS)
def test_worker_processes_change_nothing(protocol: str, tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=1, val=4, size=(90, 60))
    for i, file in enumerate((root / "val").rglob("*.JPEG")):  # pictures of many shapes
        Image.open(file).resize((60 + 7 * i, 80)).save(file)
    torch.manual_seed(0)
    network = Network(Checkpoint(FOLDERS, new_network(FOLDERS).state_dict()), CPU)
    files, labels = evaluate.read([network], root, "val")

    alone, with_workers = (evaluate.evaluate([network], files, labels, protocol, workers=n) for n in (0, 2))

    assert alone == with_workers
    assert alone[0].images == 12


def test_a_mean_image_is_subtracted_and_resized_for_other_sizes() -> None:
    mean_image = torch.rand(32, 32, 3)
    network = untrained(mean_image=mean_image)
    views = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)

    with torch.inference_mode():
        logits = network._network(augment.normalise(views, (mean_image,), RECIPE.std))

    assert torch.allclose(network.probabilities(views), torch.softmax(logits.double(), 1))
    assert network._mean(40, 48).shape == (40, 48, 3)


def test_networks_of_different_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different data sets"):
        evaluate.read([untrained(), of_folders()], tmp_path, "val")


def test_folders_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 classes, the network 7"):
        evaluate.read([of_folders(classes=7)], write_folders(tmp_path, train=1, val=1), "val")


def test_classes_keep_the_numbers_of_the_training(tmp_path: Path) -> None:
    root = write_folders(tmp_path, train=1, val=1)
    (picture,) = (root / "val" / "n01440764").iterdir()
    picture.unlink()
    picture.parent.rmdir()

    assert evaluate.read([of_folders("n01440764", "n01443537", "n01484850")], root, "val")[1] == [1, 2]
    with pytest.raises(DataError, match=r"classes that are not in train/: n01443537"):
        evaluate.read([of_folders("n01440764", "n01484850", "n02000000")], root, "val")
    with pytest.raises(DataError, match="different data sets"):
        evaluate.read([of_folders("a", "b", "c"), of_folders("a", "b", "d")], root, "val")


def test_the_table_has_the_paper_s_row_beside_ours() -> None:
    scores = [
        Score("resnet50", "10crop", 50_000, 22.9, 6.8, paper.row("imagenet", 1000, "resnet50", "10crop")),
        Score("resnet20", "center", 5000, 8.75, 0.3, paper.row("cifar10", 10, "resnet20", "center")),
        Score("ensemble", "flip", 5000, 5.0, 0.2),
    ]

    assert evaluate.table(scores).splitlines()[2:] == [
        "| resnet50 | 10crop | 50,000 | 22.90 % (22.53 to 23.27) | 6.80 % (6.58 to 7.02) | 22.85 / 6.71 % (Table 3) |",
        "| resnet20 | center | 5,000 | 8.75 % (8.00 to 9.57) | 0.30 % (0.18 to 0.49) | 8.75 % (Table 6, test) |",
        "| ensemble | flip | 5,000 | 5.00 % (4.43 to 5.64) | 0.20 % (0.11 to 0.37) |  |",
    ]


@pytest.mark.parametrize(("classes", "compared"), [(1000, True), (3, False)])
def test_the_paper_s_errors_stand_beside_those_of_its_own_classes_only(
    classes: int, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any folders of pictures are read as ImageNet's are."""
    network = of_folders(classes=classes)
    monkeypatch.setattr(network, "recipe", replace(network.recipe, depth=34))
    monkeypatch.setattr(evaluate, "_sums", lambda *_: torch.eye(classes, dtype=torch.float64)[:2])
    (score,) = evaluate.evaluate([network], [], [0, 1], "10crop")

    assert score.top1 == 0
    assert (score.published is not None) == compared


def test_the_command_prints_a_row_for_each_protocol_or_says_what_is_missing(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folders(tmp_path / "data", train=1, val=2)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", Checkpoint(FOLDERS, new_network(FOLDERS).state_dict()))
    command = [str(root / "training" / "evaluate.py"), str(tmp_path / "run"), "--data"]

    done = subprocess.run([sys.executable, *command, str(data)], check=True, capture_output=True, text=True)
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    with pytest.raises(SystemExit) as failed:
        evaluate.main()

    rows = [line.split(" | ")[:3] for line in done.stdout.splitlines()[2:]]
    assert rows == [["| resnet18b", protocol, "6"] for protocol in ALL_PROTOCOLS]
    assert str(failed.value.code).startswith(f"evaluate: no val/ in {tmp_path}")  # a text: printed, and the code is 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (PermissionError(13, "Permission denied", "val"), "evaluate: [Errno 13] Permission denied: 'val'"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_command_ends_with_one_line_or_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: str | int
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(evaluate.checkpoint, "load", fail)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--data", str(tmp_path)])

    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == code


def test_fewer_workers_than_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "run", "--data", str(tmp_path), "--workers", "-1"])

    with pytest.raises(SystemExit) as refused:
        evaluate.main()
    assert refused.value.code == 2
    assert "--workers -1" in capsys.readouterr().err
