"""Weights of many origins become the same network."""

import argparse
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torchvision.models import ResNet50_Weights

from resnet_ensemble.export import weights
from resnet_ensemble.export.declared import WeightsError
from resnet_ensemble.export.weights import IMAGENET, IMAGENET_LABELS
from resnet_ensemble.training import checkpoint
from resnet_ensemble.training import cifar as cifar_files
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError, Epoch
from resnet_ensemble.training.model import Shortcut, cifar, imagenet
from resnet_ensemble.training.recipes import RECIPES, new_network

LABELS = tuple("abcdefg")


def logits(network: torch.nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        answer: Tensor = network(torch.randn(2, 3, 64, 64))
    return answer


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvision_s_state_dict_becomes_the_network_that_gives_its_logits(depth: int) -> None:
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=3).eval()

    name, network = weights.network_of(theirs.state_dict())

    assert name == f"resnet{depth}"
    assert torch.equal(logits(network), logits(theirs))


@pytest.mark.parametrize("option", ["A", "B", "C"])
def test_shortcuts_are_read_off_the_tensors(option: Shortcut) -> None:
    for made in (imagenet(34, classes=5, shortcut=option).eval(), *(cifar(n, shortcut=option).eval() for n in (8, 20))):
        assert torch.equal(logits(weights.network_of(made.state_dict())[1]), logits(made))


def test_the_stride_can_be_given() -> None:
    made = imagenet(50, classes=5, stride_at="v1").eval()

    _, v1 = weights.network_of(made.state_dict(), "v1")

    assert torch.equal(logits(v1), logits(made))
    assert not torch.equal(logits(weights.network_of(made.state_dict())[1]), logits(made))


@pytest.mark.parametrize("make", [partial(imagenet, 18), partial(cifar, 20)])
def test_a_plain_network_is_one_if_that_is_said(make: Callable[..., torch.nn.Module]) -> None:
    made = make(classes=5, shortcut="plain").eval()

    name, plain = weights.network_of(made.state_dict(), unprojected="plain")

    assert name in ("plain18", "plain20")
    assert torch.equal(logits(plain), logits(made))
    assert not torch.equal(logits(weights.network_of(made.state_dict())[1]), logits(made))


def test_a_network_with_projections_is_no_plain_one() -> None:
    with pytest.raises(WeightsError, match="these weights have projections"):
        weights.network_of(imagenet(18).state_dict(), unprojected="plain")


FORMS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": lambda state: state,
    "nested": lambda state: {"epoch": 3, "arch": "resnet18", "state_dict": state, "best_acc1": torch.tensor(1.0)},
    "of torchvision's scripts": lambda state: {"model": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1)},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_a_file_is_read_in_the_forms_that_people_save(tmp_path: Path, theirs: torch.nn.Module, form: str) -> None:
    path = tmp_path / "mine.pth"
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(theirs.state_dict(), path)
    else:
        torch.save(FORMS[form](theirs.state_dict()), path)

    source = weights.read(str(path), labels=LABELS)

    assert (source.name, source.labels, source.preprocessing) == ("resnet18", LABELS, IMAGENET)
    assert torch.equal(logits(source.network), logits(theirs))


def test_a_thousand_classes_are_imagenet_s(tmp_path: Path) -> None:
    torch.save(imagenet(18).state_dict(), tmp_path / "r.pth")

    labels = weights.read(str(tmp_path / "r.pth")).labels

    assert (len(labels), labels[0], labels[207], labels[999]) == (1000, "tench", "golden retriever", "toilet tissue")


@pytest.mark.parametrize(("classes", "dataset"), [(10, cifar_files.CIFAR10), (100, cifar_files.CIFAR100)])
def test_networks_for_cifar_see_pictures_as_our_recipes_do_and_have_its_names(
    tmp_path: Path, classes: int, dataset: cifar_files.Dataset
) -> None:
    torch.save(cifar(20, classes=classes).state_dict(), tmp_path / "r.pth")

    source = weights.read(str(tmp_path / "r.pth"))

    assert source.labels == dataset.labels
    assert cifar_files.DATASETS[source.dataset] is dataset
    assert source.preprocessing == RECIPES[f"resnet20-{source.dataset}"].preprocessing
    assert (source.preprocessing.resize, source.preprocessing.crop, source.preprocessing.padding) == (32, 32, 2)


def test_a_network_for_cifar_with_other_names_is_of_other_pictures(tmp_path: Path) -> None:
    torch.save(cifar(20, classes=7).state_dict(), tmp_path / "r.pth")

    source = weights.read(str(tmp_path / "r.pth"), labels=LABELS)

    assert (source.labels, source.dataset) == (LABELS, "imagenet")
    assert source.preprocessing == RECIPES["resnet20-cifar10"].preprocessing
    with pytest.raises(WeightsError, match="7 classes and no names are given"):
        weights.read(str(tmp_path / "r.pth"))


def test_name_and_preprocessing_can_be_given(tmp_path: Path, theirs: torch.nn.Module) -> None:
    torch.save(theirs.state_dict(), tmp_path / "r.pth")

    source = weights.read(str(tmp_path / "r.pth"), name="mine", preprocessing={"resize": 232}, labels=LABELS)

    assert (source.name, source.preprocessing) == ("mine", replace(IMAGENET, resize=232))


def test_what_is_given_of_the_preprocessing_leaves_the_rest_but_no_error_that_was_measured_without_it(
    run: Path,
) -> None:
    source = weights.read(str(run), preprocessing={"resize": 36})

    assert source.preprocessing == replace(RECIPES["resnet20-cifar10"].preprocessing, resize=36)
    assert source.measured == ()


def test_a_file_that_torchvision_published_is_known_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights._published("11ad3fa6" + 56 * "0") is ResNet50_Weights.IMAGENET1K_V2
    assert weights._published(64 * "0") is None
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "renamed.pth")
    monkeypatch.setattr(weights, "_published", lambda sha256: ResNet50_Weights.IMAGENET1K_V2)

    source = weights.read(str(tmp_path / "renamed.pth"))

    assert (source.preprocessing.resize, source.measured[0].top1_error) == (232, pytest.approx(19.142))
    assert source.recipe == {"weights": "resnet50:IMAGENET1K_V2"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = replace(RECIPES["resnet20-cifar10"], depth=8)
    history = (Epoch(1, 0.1, 2.0, 60.0, 55.5, 5000, 12.5),)
    saved = Checkpoint(recipe, new_network(recipe).state_dict(), history=history, finished=True)
    checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", saved)
    return tmp_path / "run"


@pytest.mark.parametrize("file", ["", "checkpoint.safetensors"])
def test_our_own_checkpoint_brings_everything_along(run: Path, file: str) -> None:
    source = weights.read(str(run / file))

    assert (source.name, source.dataset, source.labels[3]) == ("resnet8", "cifar10", "cat")
    assert source.preprocessing == RECIPES["resnet20-cifar10"].preprocessing
    assert (source.measured[0].top1_error, source.measured[0].images) == (55.5, 5000)


def test_our_imagenet_checkpoints_get_imagenet_s_names(run: Path) -> None:
    recipe = replace(RECIPES["resnet20-cifar10"], depth=8, classes=1000)
    labels = tuple(f"n{i:08}" for i in range(1000))
    saved = replace(checkpoint.load(run), recipe=recipe, weights=new_network(recipe).state_dict(), labels=labels)

    assert weights.from_checkpoint(saved).labels == IMAGENET_LABELS


def test_a_run_that_is_not_finished_is_refused(run: Path) -> None:
    checkpoint.save(run / "checkpoint.safetensors", replace(checkpoint.load(run), finished=False))

    with pytest.raises(WeightsError, match="not trained to its last epoch"):
        weights.read(str(run))


@pytest.mark.parametrize("size", [100, 10_000, -10])
def test_our_own_checkpoint_is_called_damaged_where_it_is_cut_off(run: Path, size: int) -> None:
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:size])

    for given in (run, path):
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged: "):
            weights.read(str(given))


def test_weights_of_ours_that_are_not_finite_are_refused(run: Path) -> None:
    saved = checkpoint.load(run)
    saved.weights["fc.bias"].fill_(torch.nan)

    with pytest.raises(WeightsError, match=r"fc\.bias has values that are not finite"):
        weights.from_checkpoint(saved)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": Evil()},
            r"no state dict of tensors alone, and nothing else is loaded \(it has .*print, too\); save model",
        ),
        ({1: torch.zeros(2)}, "has 'conv1.weight'; this one has 1"),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.bias": torch.zeros(1)}, "a softmax of one class is always 1"),
        ({"epoch": 3}, "holds no state dict"),
        ({"w": torch.zeros(2)}, r"has 'conv1.weight'; this one has w"),
        ({"conv1.weight": torch.zeros(8, 3, 5, 5), "fc.bias": torch.zeros(2)}, "no network of the paper"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(2)}, "no network of Table 1"),
    ],
    ids=["pickle", "no names", "one class", "no tensors", "other names", "another stem", "no blocks"],
)
def test_what_is_no_resnet_is_refused(
    tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match=message):
        weights.read(str(tmp_path / "x.pth"))
    assert "executed" not in capsys.readouterr().out


def test_a_file_that_is_cut_off_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    torch.save(cifar(8).state_dict(), tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for size in range(100, len(whole), 997):
        (tmp_path / "x.pth").write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"x\.pth is no state dict of tensors alone"):
            weights.read(str(tmp_path / "x.pth"))


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    """Such as a network and its average: it must not be chance which one is served."""
    state = cifar(8).state_dict()
    both = {f"{start}{name}": tensor for start in ("model.", "model.module.") for name, tensor in state.items()}
    torch.save({"state_dict": both}, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match="holds several networks"):
        weights.read(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("content", [b"not weights at all", b"", b"\x80\x02}q\x00."], ids=["text", "empty", "a pickle"])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_of_junk_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsError, match="no state dict of tensors"):
        weights.read(str(tmp_path / name))


def test_a_missing_file_says_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at .*give a run's folder, a file, or a name like"):
        weights.read(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        weights.read(str(tmp_path))


def test_other_classes_need_their_names(tmp_path: Path, theirs: torch.nn.Module) -> None:
    torch.save(theirs.state_dict(), tmp_path / "r.pth")

    with pytest.raises(WeightsError, match=r"7 classes and no names are given.*--labels"):
        weights.read(str(tmp_path / "r.pth"))
    with pytest.raises(WeightsError, match="7 classes and 2 names are given"):
        weights.read(str(tmp_path / "r.pth"), labels=("a", "b"))


def test_weights_that_almost_fit_are_refused(theirs: torch.nn.Module) -> None:
    state = dict(theirs.state_dict())
    del state["layer3.0.bn2.bias"]

    with pytest.raises(WeightsError, match=r"look like resnet18 but don't fit it.*layer3\.0\.bn2\.bias"):
        weights.network_of(state)


@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn1.running_var", "fc.bias"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "is torch.int8; weights must be floating point"),
        (lambda tensor: tensor.to(torch.complex64), "is torch.complex64; weights must be floating point"),
        (lambda tensor: tensor * torch.nan, "has values that are not finite"),
        (lambda tensor: tensor.double() + 1e300, "has values that are not finite"),  # in float32
    ],
    ids=["integers", "complex", "not a number", "infinite"],
)
def test_weights_that_would_be_cast_or_are_not_finite_are_named(
    tmp_path: Path, theirs: torch.nn.Module, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    state = theirs.state_dict()
    torch.save(state | {name: change(state[name])}, tmp_path / "r.pth")

    with pytest.raises(WeightsError, match=rf"r\.pth: {name} {message}"):
        weights.read(str(tmp_path / "r.pth"), labels=LABELS)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_floating_point_are_those_of_the_network(theirs: torch.nn.Module, kind: torch.dtype) -> None:
    state = {name: tensor.to(kind) for name, tensor in theirs.state_dict().items()}

    _, network = weights.network_of(state)

    assert torch.allclose(logits(network), logits(theirs), atol=0.05)


def test_torchvision_s_weights_come_with_their_own_preprocessing_and_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet50().state_dict()
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda *_, **__: state)

    v1, v2 = (weights.read(f"resnet50:IMAGENET1K_{version}") for version in ("V1", "V2"))

    assert (v1.preprocessing.resize, v2.preprocessing.resize, v2.preprocessing.crop) == (256, 232, 224)
    assert (v1.measured[0].top1_error, v2.measured[0].top1_error) == (pytest.approx(23.87), pytest.approx(19.142))
    assert v1.labels == IMAGENET_LABELS


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("Name or service not known"), RuntimeError('invalid hash value (expected "11ad3fa6"')],
)
def test_a_download_that_fails_says_what_to_do_instead(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, weights_only: bool, **__: object) -> None:
        assert weights_only
        raise error

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fail)

    with pytest.raises(WeightsError, match=r"can't download https://.*give its path instead"):
        weights.read("resnet50:IMAGENET1K_V2")


def test_a_name_that_torchvision_does_not_have_is_refused() -> None:
    with pytest.raises(WeightsError, match="torchvision has no weights resnet18:IMAGENET1K_V2"):
        weights.read("resnet18:IMAGENET1K_V2")
