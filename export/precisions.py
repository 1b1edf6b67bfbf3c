"""FP32 graph → graph of lower precision. TensorRT 11 computes in the types that the graph has, and in no others.

Bytes become floats and are normalised in FP32, and the softmax is FP32, so probabilities stay float32. What lies
between is lowered to FP16 or BF16, also the scales of a quantized graph and what it leaves in floats. FP8 is E4M3: 4
bits of exponent, 3 of mantissa, up to 448.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from resnet_ensemble.export.engines import Precision

if TYPE_CHECKING:
    from resnet_ensemble.export.quantize import Calibration  # which needs more than ONNX

Half = Literal["fp16", "bf16"]
_TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_TINIEST = np.array(2.0**-24)  # above 0 in FP16
BF16_OPSET = 22  # the first with a convolution in BF16
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_MAX = 448.0
# Calibrated ranges are clipped for 256 equal steps, to no less than 0.3 of what was seen (quantize.CLIPS). The steps of
# FP8 grow with the values, so that room for four times as much costs nothing but the two smallest of 15 powers of 2.
HEADROOM = 4.0


def for_tensorrt(graph: bytes, precision: Precision) -> bytes:
    """What TensorRT is to parse: an FP32 graph, or for int8 and fp8 a quantized one, in the types of a precision."""
    if precision == "bf16":
        return lowered(graph, "bf16")
    return graph if precision == "fp32" else lowered(graph, "fp16")


def lowered(graph: bytes, half: Half) -> bytes:
    """The graph with its convolutions, sums, pooling and linear layer in FP16 or BF16."""
    model = onnx.load_from_string(graph)
    if half == "bf16":
        model = version_converter.convert_version(model, BF16_OPSET)
        del model.graph.value_info[:]  # types that are about to change
    kind, dtype = _TYPES[half]
    picture = next(n for n in model.graph.node if n.op_type == "Conv").input[0]
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    outside = {*_before(model, picture), softmax.name}
    inside = [node for node in model.graph.node if node.name not in outside]
    used = {name for node in inside for name in node.input}
    scales = {node.input[1] for node in inside if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in model.graph.initializer:
        if tensor.name in used and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(dtype)
            if tensor.name in scales:  # one that vanishes would be refused; its weights are nearly 0
                values = np.maximum(values, _TINIEST.astype(dtype))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in model.graph.node:
        if node.name == softmax.name:
            logits = node.input[0]
            nodes.append(
                helper.make_node("Cast", [logits], [f"{logits}.float"], "logits_to_float", to=TensorProto.FLOAT)
            )
            node.input[0] = f"{logits}.float"
        elif node.name not in outside:
            _rename(node, {picture: f"{picture}.{half}"})
            if node.op_type == "Cast":  # bundles of before count the windows that have a place of the last map
                node.attribute[0].i = kind
        nodes.append(node)
        if picture in node.output:
            nodes.append(helper.make_node("Cast", [picture], [f"{picture}.{half}"], f"picture_to_{half}", to=kind))
    return _written(model, nodes)


def float8(graph: bytes, calibration: "Calibration") -> bytes:
    """The graph with QuantizeLinear and DequantizeLinear pairs of FP8, where `quantize` has them for TensorRT.

    One scale a tensor, for weights too: relative to its size, FP8 rounds a small weight as finely as a large one.
    """
    model = onnx.load_from_string(graph)
    layers = [node for node in model.graph.node if node.op_type == "Conv"][1:]  # the first reads the picture
    weights = {node.input[1] for node in layers}
    activations = {node.input[0] for node in layers}
    renamed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        scale = np.float32(max(float(np.abs(values).max()), 1e-8) / FLOAT8_MAX)
        rounded = np.clip(values / scale, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8)
        kept += [numpy_helper.from_array(rounded, f"{tensor.name}.float8"), *_scale(tensor.name, scale)]
        nodes.append(_pair(tensor.name)[1])
        renamed[tensor.name] = f"{tensor.name}.float"
    for node in model.graph.node:
        _rename(node, renamed)
        nodes.append(node)
        for name in activations.intersection(node.output):
            low, high = calibration.ranges[name]
            kept += _scale(name, np.float32(HEADROOM * max(-low, high, 1e-8) / FLOAT8_MAX))
            nodes += _pair(name)
            renamed[name] = f"{name}.float"
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return _written(model, nodes)


def _scale(name: str, scale: np.float32) -> list[onnx.TensorProto]:
    """A scale, and the zero point whose type says that it is FP8."""
    zero: NDArray[np.generic] = np.zeros((), FLOAT8)
    return [numpy_helper.from_array(np.array(scale), f"{name}.scale"), numpy_helper.from_array(zero, f"{name}.zero")]


def _pair(name: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Nodes from `name` to `name.float8` and on to `name.float`."""
    constants = [f"{name}.scale", f"{name}.zero"]
    return (
        helper.make_node("QuantizeLinear", [name, *constants], [f"{name}.float8"], f"{name}.quantize"),
        helper.make_node("DequantizeLinear", [f"{name}.float8", *constants], [f"{name}.float"], f"{name}.dequantize"),
    )


def _before(model: onnx.ModelProto, tensor: str) -> set[str]:
    """Names of the nodes that a tensor is made by."""
    needed, names = {tensor}, set()
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            names.add(node.name)
    return names


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)


def _written(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> bytes:
    """The model with these nodes instead of its own, checked."""
    copies = []
    for node in nodes:  # a node of the graph is gone once the graph's list is cleared
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content
