"""Graphs of lower precision, through ONNX Runtime; engines/test_tensorrt_builder.py has what TensorRT makes of them."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from resnet_ensemble.export import gate, precisions, quantize
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import Precision
from resnet_ensemble.export.quantize import Calibration
from tests.export.engines.fake_gpu import without_bf16

LOWER: tuple[Precision, ...] = ("fp16", "bf16", "int8", "fp8")


@pytest.fixture(scope="module")
def graph(shipped: Bundle) -> bytes:
    return shipped.read(shipped.manifest.members[0])


@pytest.fixture(scope="module")
def views(shipped: Bundle) -> NDArray[np.uint8]:
    return gate.from_golden(shipped, shipped.manifest.members[0]).views


@pytest.fixture(scope="module")
def calibration(graph: bytes, views: NDArray[np.uint8]) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:  # rounding to the nearest: quicker, and good enough here
        patch.setattr(
            quantize, "round_together", lambda w, _, scale: np.rint(w / scale[:, None]).clip(-127, 127).astype(np.int8)
        )
        return quantize.calibrate(graph, [views[::5]], images=8)


@pytest.fixture(scope="module")
def prepared(graph: bytes, calibration: Calibration) -> dict[Precision, bytes]:
    """What TensorRT is to parse, in every precision."""
    made: dict[Precision, bytes] = dict.fromkeys(("fp32", *LOWER), graph)
    made |= {"int8": quantize.quantized(graph, calibration, "symmetric"), "fp8": precisions.float8(graph, calibration)}
    return {precision: precisions.for_tensorrt(content, precision) for precision, content in made.items()}


def run(graph: bytes, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Without its optimisations: with them, ONNX Runtime 1.32.0 answers nonsense for FP8.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    answers: NDArray[np.float32] = session.run(None, {"views": views})[0]
    return answers


def types(graph: bytes) -> Counter[tuple[str, str]]:
    """How many convolutions and linear layers read activations of which type: (operator, type)."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph), data_prop=True)
    known = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            maker = makers[node.input[0]]
            read = maker.input[0] if maker.op_type == "DequantizeLinear" else node.input[0]
            found[node.op_type, TensorProto.DataType.Name(known[read])] += 1
    return found


# Largest difference of a probability from FP32, on the 80 golden views; the mean difference is 100 times smaller.
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 0), ("fp16", 0.005), ("bf16", 0.05), ("int8", 0.7)])
def test_the_classifier_stays_the_same(
    prepared: dict[Precision, bytes], graph: bytes, views: NDArray[np.uint8], precision: Precision, allowed: float
) -> None:
    found, expected = run(without_bf16(prepared[precision]), views), run(graph, views)

    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= allowed
    assert np.abs(found - expected).mean() <= allowed / 50
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97


def test_fp8_differs_by_its_rounding_and_no_more(
    prepared: dict[Precision, bytes], graph: bytes, views: NDArray[np.uint8]
) -> None:
    found, expected = run(prepared["fp8"], views[::4]), run(graph, views[::4])

    assert found.dtype == np.float32
    assert 1e-3 < np.abs(found - expected).mean() < 0.03
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9


@pytest.mark.parametrize(
    ("precision", "inner", "rest"),
    [
        ("fp32", "FLOAT", "FLOAT"),
        ("fp16", "FLOAT16", "FLOAT16"),
        ("bf16", "BFLOAT16", "BFLOAT16"),
        ("int8", "INT8", "FLOAT16"),
        ("fp8", "FLOAT8E4M3FN", "FLOAT16"),
    ],
)
def test_every_layer_reads_the_type_that_was_asked_for(
    prepared: dict[Precision, bytes], precision: Precision, inner: str, rest: str
) -> None:
    expected = Counter({("Conv", inner): 20}) + Counter({("Conv", rest): 1, ("Gemm", rest): 1})

    assert types(prepared[precision]) == expected


@pytest.mark.parametrize("precision", ["fp32", *LOWER])
def test_views_are_cast_before_they_are_transposed(prepared: dict[Precision, bytes], precision: Precision) -> None:
    nodes = onnx.load_from_string(prepared[precision]).graph.node

    (first,) = [node for node in nodes if "views" in node.input]
    assert first.op_type == "Cast"


def test_no_calibrated_activation_saturates_in_fp8(graph: bytes, calibration: Calibration) -> None:
    model = onnx.load_from_string(precisions.float8(graph, calibration))
    scales = {t.name: float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name.endswith(".scale")}
    makers = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}

    assert len(makers) == 18
    for name, scale in makers.items():
        seen = max(map(abs, calibration.ranges[name])) / quantize.CLIPS.min()
        assert precisions.FLOAT8_MAX * scales[scale] >= seen


def test_weights_in_fp8_are_the_nearest(graph: bytes, calibration: Calibration) -> None:
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer}
    after = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load_from_string(precisions.float8(graph, calibration)).graph.initializer
    }
    rounded = {name.removesuffix(".float8"): values for name, values in after.items() if name.endswith(".float8")}

    assert len(rounded) == 20
    for name, values in rounded.items():
        back = values.astype(np.float32) * after[f"{name}.scale"]
        # 3 bits of mantissa: half a step is 1/16 of the value, or of the smallest normal number, 2 ** -6
        step = np.maximum(np.abs(before[name]), after[f"{name}.scale"] * 2**-6) / 16
        assert (np.abs(back - before[name]) <= step * 1.001).all()


def test_a_scale_never_vanishes_in_half_precision(graph: bytes, calibration: Calibration) -> None:
    tiny = Calibration(
        calibration.ranges,
        calibration.weights,
        {name: np.full_like(scale, 1e-12) for name, scale in calibration.scales.items()},
        calibration.images,
    )
    lowered = onnx.load_from_string(precisions.lowered(quantize.quantized(graph, tiny, "symmetric"), "fp16"))

    scales = [numpy_helper.to_array(t) for t in lowered.graph.initializer if t.name.endswith(".scale")]
    assert len(scales) == 18 + 20
    assert all((scale > 0).all() and scale.dtype in (np.float16, ml_dtypes.bfloat16) for scale in scales)


def test_numbers_that_a_graph_counts_are_lowered_too() -> None:
    """As in graphs exported before windows were pooled: those computed their weights from the size of the last map."""
    made = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 20]>
        counting (uint8[n, h, w, 3] views) => (float[n, 2] probabilities) <
            float[2, 3, 1, 1] weight = {1, 2, 3, 4, 5, 6}, int64[2] places = {2, 3}
        > {
            [cast] floats = Cast <to = 1> (views)
            [transpose] picture = Transpose <perm = [0, 3, 1, 2]> (floats)
            [conv] map = Conv (picture, weight)
            [shape] shape = Shape <start = 2> (map)
            [size] size = ReduceProd <keepdims = 0> (shape)
            [count] count = Cast <to = 1> (size)
            [sum] sum = ReduceSum <keepdims = 0> (map, places)
            [mean] mean = Div (sum, count)
            [softmax] probabilities = Softmax <axis = 1> (mean)
        }
        """
    ).SerializeToString()
    views = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 3), np.uint8)

    found = run(precisions.lowered(made, "fp16"), views)

    np.testing.assert_allclose(found, run(made, views), atol=1e-3)
