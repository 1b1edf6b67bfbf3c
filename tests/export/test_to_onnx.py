"""Export of a small untrained network, against torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from resnet_ensemble.export import declared, precisions, quantize, to_onnx, weights
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.training import augment
from resnet_ensemble.training.checkpoint import Checkpoint, Epoch
from resnet_ensemble.training.model import cifar, multiply_adds, parameter_count
from resnet_ensemble.training.recipes import RECIPES

RECIPE = replace(RECIPES["resnet20-cifar10"], depth=8, epochs=1)


@pytest.fixture(scope="module")
def saved() -> Checkpoint:
    torch.manual_seed(0)
    network = cifar(8)
    for module in network.modules():  # as if it had been trained: statistics that folding must take into account
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Checkpoint(
        RECIPE, network.state_dict(), history=(Epoch(1, 0.1, 2.0, 60.0, 55.0, 5000, 12.5),), finished=True
    )


def source(saved: Checkpoint) -> weights.Source:
    return weights.from_checkpoint(saved)


@pytest.fixture(scope="module")
def graph(saved: Checkpoint) -> to_onnx.Graph:
    return to_onnx.Graph(source(saved).network, RECIPE.preprocessing).eval()


@pytest.fixture(scope="module")
def exported(graph: to_onnx.Graph) -> bytes:
    return to_onnx.to_onnx(graph)


@pytest.mark.parametrize("shape", [(1, 32, 32), (7, 32, 32), (2, 40, 56), (1, 33, 29), (3, 224, 224)])
def test_the_graph_gives_torchs_probabilities_at_any_batch_and_size(
    graph: to_onnx.Graph, exported: bytes, shape: tuple[int, int, int]
) -> None:
    views = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)

    (probabilities,) = onnxruntime.InferenceSession(exported).run(None, {"views": views})

    with torch.inference_mode():
        np.testing.assert_allclose(probabilities, graph(torch.from_numpy(views)).numpy(), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_in_half_precision_it_is_the_same_at_any_size(exported: bytes) -> None:
    views = np.random.default_rng(1).integers(0, 256, (2, 48, 60, 3), np.uint8)
    lower = precisions.lowered(exported, "fp16")

    found, expected = (onnxruntime.InferenceSession(g).run(None, {"views": views})[0] for g in (lower, exported))

    np.testing.assert_allclose(found, expected, atol=0.005)
    assert not np.array_equal(found, expected)


def test_the_interface_is_bytes_in_and_probabilities_out(exported: bytes) -> None:
    model = onnx.load_from_string(exported)
    (views,), (probabilities,) = model.graph.input, model.graph.output

    assert views.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert probabilities.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    dims = [dim.dim_param or dim.dim_value for dim in views.type.tensor_type.shape.dim]
    assert dims == ["batch", "height", "width", 3]


def test_a_mean_image_is_resized_to_the_views(saved: Checkpoint) -> None:
    mean_image = torch.rand(32, 32, 3)
    graph = to_onnx.Graph(source(saved).network, RECIPE.preprocessing, mean_image).eval()
    views = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    larger = np.random.default_rng(1).integers(0, 256, (2, 40, 48, 3), np.uint8)

    session = onnxruntime.InferenceSession(to_onnx.to_onnx(graph))

    with torch.inference_mode():
        x = augment.normalise(torch.from_numpy(views), (mean_image,), RECIPE.std)
        expected = torch.softmax(graph.network(x), 1).numpy()
        resized = graph(torch.from_numpy(larger)).numpy()
    np.testing.assert_allclose(session.run(None, {"views": views})[0], expected, atol=1e-5)
    np.testing.assert_allclose(session.run(None, {"views": larger})[0], resized, atol=1e-5)


def test_networks_with_different_labels_are_no_bundle(saved: Checkpoint, tmp_path: Path) -> None:
    other = replace(saved, labels=tuple("abcdefghij"))

    with pytest.raises(to_onnx.ExportError, match="different labels"):
        to_onnx.export([source(saved), source(other)], tmp_path / "b", name="b", version="1")


def test_batch_norm_is_folded_away(exported: bytes) -> None:
    operators = {node.op_type for node in onnx.load_from_string(exported).graph.node}

    assert "BatchNormalization" not in operators
    assert {"Conv", "Softmax", "Cast"} <= operators


def test_shortcuts_are_convolutions_so_that_sums_are_fused(exported: bytes) -> None:
    operators = [node.op_type for node in onnx.load_from_string(exported).graph.node]

    assert not {"Pad", "Slice"} & set(operators)
    assert operators.count("Conv") == 7 + 2  # those of a ResNet-8, and two shortcuts


def test_the_file_holds_no_path_of_the_exporting_machine(exported: bytes) -> None:
    assert str(Path(__file__).resolve().parents[2]).encode() not in exported
    assert b"site-packages" not in exported


def test_a_graph_that_is_another_network_is_refused(graph: to_onnx.Graph, exported: bytes) -> None:
    other = to_onnx.Graph(cifar(8).eval(), RECIPE.preprocessing).eval()

    with pytest.raises(to_onnx.ExportError, match="differs from torch"):
        to_onnx._compare(exported, other)


def test_an_exported_bundle_is_complete(saved: Checkpoint, tmp_path: Path) -> None:
    to_onnx.export([source(saved)], tmp_path / "b", name="b", version="1")

    bundle = Bundle.open(tmp_path / "b")
    (member,) = bundle.manifest.members
    (measured,) = member.measured
    assert (member.name, member.parameters) == ("resnet8", parameter_count(cifar(8)))
    assert member.multiply_adds == multiply_adds(cifar(8), 32)
    assert (measured.protocol, measured.images, measured.top1_error) == ("center", 5000, 55.0)
    assert all(sum(g.probabilities["resnet8"]) == pytest.approx(1, abs=1e-5) for g in bundle.manifest.golden)
    bundle.read(member)


def test_two_networks_of_one_name_get_numbers(saved: Checkpoint, tmp_path: Path) -> None:
    bundle = to_onnx.export([source(saved)] * 2, tmp_path / "b", name="b", version="1")

    assert [member.name for member in bundle.manifest.members] == ["resnet8-1", "resnet8-2"]


def test_names_that_would_be_alike_are_refused(saved: Checkpoint) -> None:
    sources = [replace(weights.from_checkpoint(saved), name=name) for name in ("a", "a", "a-1")]

    with pytest.raises(to_onnx.ExportError, match="two members would be named alike"):
        to_onnx._titles(sources)


def test_a_calibration_travels_with_its_member(saved: Checkpoint, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(photos / f"{i}.png")
    mine = replace(source(saved), dataset="mine")

    bundle = to_onnx.export([mine], tmp_path / "b", name="b", version="1", calibration=photos)

    (member,) = Bundle.open(tmp_path / "b").manifest.members
    assert member.calibration is not None
    assert (member.calibration.dataset, member.calibration.images) == ("photos", 20)
    assert quantize.from_bytes(bundle.read(member.calibration)).images == 20


def test_bytes_are_cast_before_anything_else_since_tensorrt_can_do_nothing_with_them(exported: bytes) -> None:
    readers = [node.op_type for node in onnx.load_from_string(exported).graph.node if "views" in node.input]

    assert set(readers) == {"Cast"}


@pytest.mark.parametrize("folder", ["my bundle", ".hidden"])
def test_a_folder_whose_name_is_no_bundle_s_asks_for_a_name(tmp_path: Path, folder: str) -> None:
    with pytest.raises(to_onnx.ExportError, match=rf"'{folder}' is no name for a bundle.*give it another"):
        to_onnx.export_declared(declared.choose(["mine.pth"], None, None), tmp_path / folder)


@pytest.mark.parametrize("version", ["v 1", "", "1\n", "é"])
def test_a_version_that_is_none_is_refused_before_the_weights_are_read(tmp_path: Path, version: str) -> None:
    chosen = declared.choose(["none.pth"], None, None)

    with pytest.raises(to_onnx.ExportError, match="is no version of a bundle"):
        to_onnx.export_declared(chosen, tmp_path / "b", version=version)
