"""INT8 graphs of a small network, through ONNX Runtime."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from resnet_ensemble.export import quantize, to_onnx
from resnet_ensemble.export.engines import Form
from resnet_ensemble.export.quantize import Calibration
from resnet_ensemble.training.model import cifar
from resnet_ensemble.training.recipes import RECIPES

FORMS: tuple[Form, ...] = ("inputs", "trunk", "integer", "symmetric")


def pictures(n: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth noise, so that neighbouring pixels are alike, as in photographs."""
    noise = np.random.default_rng(seed).normal(size=(n, 8, 8, 3))
    smooth = np.repeat(np.repeat(noise, 4, axis=1), 4, axis=2)
    return np.clip(128 + 60 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def graph() -> bytes:
    torch.manual_seed(0)
    network = cifar(14)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return to_onnx.to_onnx(to_onnx.Graph(network.eval(), RECIPES["resnet20-cifar10"].preprocessing).eval())


@pytest.fixture(scope="module")
def calibration(graph: bytes) -> Calibration:
    return quantize.calibrate(graph, [pictures(16, seed) for seed in range(6)], images=96)


def run(graph: bytes, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    answers: NDArray[np.float32] = onnxruntime.InferenceSession(graph).run(None, {"views": views})[0]
    return answers


@pytest.mark.parametrize("form", FORMS)
def test_an_int8_graph_is_nearly_the_same_classifier_at_any_batch_and_size(
    graph: bytes, calibration: Calibration, form: Form
) -> None:
    int8 = quantize.quantized(graph, calibration, form)

    for views in (pictures(64, 99), np.tile(pictures(3, 98), (1, 2, 2, 1))[:, :44, :36]):
        difference = np.abs(run(int8, views) - run(graph, views)).max()
        assert 0 < difference < 0.05


@pytest.mark.parametrize(("form", "pairs"), [("inputs", 12), ("trunk", 12), ("symmetric", 12), ("integer", 20)])
def test_activations_are_quantized_where_the_form_says(
    graph: bytes, calibration: Calibration, form: Form, pairs: int
) -> None:
    """14 convolutions after the first, of which 2 are shortcuts and read what others read.

    The integer form adds both sides of 6 sums, some of which are read by convolutions already.
    """
    model = onnx.load_from_string(quantize.quantized(graph, calibration, form))
    makers = {output: node for node in model.graph.node for output in node.output}
    count = Counter(node.op_type for node in model.graph.node)
    sums = [node for node in model.graph.node if node.op_type == "Add" and all(i in makers for i in node.input)]

    assert count["DequantizeLinear"] == count["QuantizeLinear"] + 14  # the weights are integers already
    assert count["QuantizeLinear"] == pairs
    from_bytes = [sum(makers[name].op_type == "DequantizeLinear" for name in node.input) for node in sums]
    assert len(sums) == 6
    if form == "inputs":
        assert max(from_bytes) == 0
    if form == "integer":
        assert min(from_bytes) == 2


def test_onnx_runtime_computes_the_integer_form_in_integers(graph: bytes, calibration: Calibration) -> None:
    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(quantize.quantized(graph, calibration, "integer"), options)
        count = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)

    assert count["QLinearConv"] == 14
    assert count["QLinearAdd"] == 5  # the last sum is averaged in FP32


def test_symmetric_zero_points_are_zero(graph: bytes, calibration: Calibration) -> None:
    model = onnx.load_from_string(quantize.quantized(graph, calibration, "symmetric"))

    zeros = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith(".zero")]
    assert len(zeros) == 12 + 14
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_the_first_convolution_and_the_linear_layer_stay_as_they_are(graph: bytes, calibration: Calibration) -> None:
    before, after = onnx.load_from_string(graph), onnx.load_from_string(quantize.quantized(graph, calibration, "trunk"))

    for kind in ("Conv", "Gemm"):
        first, same = (next(n for n in model.graph.node if n.op_type == kind) for model in (before, after))
        assert first.input[1] == same.input[1]


def test_what_is_written_is_read(calibration: Calibration) -> None:
    again = quantize.from_bytes(calibration.to_bytes())

    assert (again.ranges, again.images) == (calibration.ranges, 96)
    assert again.weights.keys() == calibration.weights.keys()
    for name, weight in calibration.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)
        np.testing.assert_array_equal(again.scales[name], calibration.scales[name])


def test_rounding_together_changes_outputs_less_than_rounding_to_the_nearest() -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(8, 60)).astype(np.float32)
    inputs = np.maximum(generator.normal(size=(500, 20)) @ generator.normal(size=(20, 60)), 0).astype(np.float32)
    scale = quantize.best_scales(weights)
    nearest = np.clip(np.round(weights / scale[:, None]), -127, 127)

    together = quantize.round_together(weights, inputs.T @ inputs, scale)

    def lost(integers: NDArray[np.generic]) -> float:
        return float(np.square(inputs @ (integers * scale[:, None] - weights).T).mean())

    assert lost(together) < 0.5 * lost(nearest)
    assert np.abs(together * scale[:, None] - weights).max() < 6 * scale.max()


@given(st.integers(0, 1000))
def test_with_independent_inputs_rounding_together_is_rounding_to_the_nearest(seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(3, 7)).astype(np.float32)
    scale = quantize.best_scales(weights)

    together = quantize.round_together(weights, np.eye(7, dtype=np.float32), scale)

    np.testing.assert_array_equal(together, np.clip(np.round(weights / scale[:, None]), -127, 127))


def test_a_silent_input_harms_nothing() -> None:
    weights = np.ones((2, 3), np.float32)
    moments = np.diag([1.0, 0.0, 1.0]).astype(np.float32)

    assert np.isfinite(quantize.round_together(weights, moments, np.full(2, 0.01, np.float32))).all()


@given(low=st.floats(-100, 0), high=st.floats(0, 100))
def test_zero_is_represented_exactly_and_the_range_within_a_step(low: float, high: float) -> None:
    scale, zero = quantize.affine(low, high)

    assert 0 <= zero <= 255
    assert (0 - zero) * scale <= low + scale
    assert (255 - zero) * scale >= high - scale


def test_a_range_gives_up_outliers_for_precision_where_that_loses_less() -> None:
    generator = np.random.default_rng(0)
    flat, tailed = generator.uniform(0, 9, 20_000), generator.exponential(size=200_000) ** 1.5

    high = {
        name: quantize.best_range(v.astype(np.float32), 0.0, float(v.max()))[1]
        for name, v in (("f", flat), ("t", tailed))
    }

    assert high["f"] == pytest.approx(9, rel=0.05)
    assert high["t"] < 0.9 * tailed.max()
