"""FP32 graph → INT8 graph, by activations and weights that were calibrated on real pictures.

`calibrate` looks at what flows into each convolution and finds

- ranges of activations: the clipping that loses least, in squared error, over a sample of values;
- integer weights: per output channel, rounded one after another so that what each rounding loses is made up by the
  weights that are not rounded yet (GPTQ, arXiv 2210.17323, on convolutions). Rounding to the nearest integer made
  most of the difference from FP32: on 143 photographs, a ResNet-18 with only its weights in INT8 differed by 0.018 (the
  mean of each picture's largest difference of a probability), and by 0.003 with these.

`quantized` writes them into the graph as QuantizeLinear and DequantizeLinear pairs, where a backend wants them. The
first convolution and the last linear layer stay in FP32. NumPy, ONNX and ONNX Runtime.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
import safetensors.numpy
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tqdm import tqdm

from resnet_ensemble.export.engines import Form

SAMPLE = 4096  # values of each activation that are kept from one batch
CLIPS = np.linspace(0.3, 1.0, 36)  # of activations, as shares of the extremes
WEIGHT_CLIPS = np.linspace(0.5, 1.0, 26)
# Rows of the least-squares problem of a layer, for each of its weights in one output channel.
ROWS_PER_WEIGHT = 4
DAMPING = 0.01  # of GPTQ, as a share of the mean diagonal
BLOCK = 128

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """What was found on `images` pictures.

    - ranges: low and high of each activation, by the tensor's name; 0 lies between them
    - weights: INT8 (out, ...), by the initializer's name; scales: (out,)
    """

    ranges: dict[str, tuple[float, float]]
    weights: dict[str, NDArray[np.int8]]
    scales: dict[str, Array]
    images: int

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        tensors: dict[str, NDArray[np.generic]] = {f"weights.{name}": w for name, w in self.weights.items()}
        tensors |= {f"scales.{name}": scale for name, scale in self.scales.items()}
        about = json.dumps({"ranges": self.ranges, "images": self.images})
        content: bytes = safetensors.numpy.save(tensors, metadata={"calibration": about})
        return content


def from_bytes(content: bytes) -> Calibration:
    """What `to_bytes` wrote."""
    size = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["calibration"])
    tensors = safetensors.numpy.load(content)
    return Calibration(
        ranges={name: (low, high) for name, (low, high) in about["ranges"].items()},
        weights={name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")},
        scales={name.removeprefix("scales."): t for name, t in tensors.items() if name.startswith("scales.")},
        images=about["images"],
    )


def calibrate(graph: bytes, batches: Sequence[NDArray[np.uint8]], *, images: int) -> Calibration:
    """Look at every batch of views, uint8 (n, h, w, 3), and find ranges and weights."""
    model = onnx.load_from_string(graph)
    layers = _layers(model)
    observed = sorted(_activations(model))
    run = _observer(model, observed)
    generator = np.random.default_rng(0)
    samples: dict[str, list[Array]] = {name: [] for name in observed}
    lows, highs = dict.fromkeys(observed, 0.0), dict.fromkeys(observed, 0.0)
    moments = {layer.name: np.zeros((layer.fan_in, layer.fan_in), np.float32) for layer in layers}
    for batch in tqdm(batches, "calibrate", unit="batch", leave=False, disable=None):
        found = run(batch)
        for name, values in found.items():
            lows[name] = min(lows[name], float(values.min()))
            highs[name] = max(highs[name], float(values.max()))
            samples[name].append(generator.choice(values.reshape(-1), SAMPLE))
        for layer in layers:
            rows = layer.rows(found[layer.input], ROWS_PER_WEIGHT * layer.fan_in // len(batches) + 1, generator)
            moments[layer.name] += rows.T @ rows
    ranges = {name: best_range(np.concatenate(samples[name]), lows[name], highs[name]) for name in observed}
    weights, scales = {}, {}
    for layer in tqdm(layers, "round weights", unit="layer", leave=False, disable=None):
        flat = layer.weight.reshape(len(layer.weight), -1)
        scale = best_scales(flat)
        rounded = round_together(flat, moments.pop(layer.name), scale)
        weights[layer.name], scales[layer.name] = rounded.reshape(layer.weight.shape), scale
    return Calibration(ranges, weights, scales, images)


def best_range(sample: Array, low: float, high: float) -> tuple[float, float]:
    """The part of low to high whose 256 steps represent the sample with the least squared error."""
    errors = []
    for clip in CLIPS:
        scale, zero = affine(low * clip, high * clip)
        steps = np.clip(np.round(sample / scale) + zero, 0, 255)
        errors.append(float(np.square((steps - zero) * scale - sample).mean()))
    best = float(CLIPS[int(np.argmin(errors))])
    return low * best, high * best


def affine(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and zero point of bytes from low to high."""
    scale = np.float32(max(high - low, 1e-8) / 255)
    return scale, int(np.clip(np.round(-low / scale), 0, 255))


def best_scales(weights: Array) -> Array:
    """For each row of (out, n), the scale of integers from -127 to 127 with the least squared error: (out,)."""
    largest = np.maximum(np.abs(weights).max(axis=1), 1e-12)
    best, lowest = largest / 127, np.full(len(weights), np.inf)
    for clip in WEIGHT_CLIPS:
        scale = largest * clip / 127
        rounded = np.clip(np.round(weights / scale[:, None]), -127, 127) * scale[:, None]
        error = np.square(rounded - weights).sum(axis=1)
        best = np.where(error < lowest, scale, best)
        lowest = np.minimum(error, lowest)
    found: Array = best.astype(np.float32)
    return found


def round_together(weights: Array, moments: Array, scale: Array) -> NDArray[np.int8]:
    """Integers for (out, n) weights, rounded so that their outputs, not they themselves, change least.

    `moments` (n, n) is the sum of x xᵀ over the inputs. GPTQ: round a column, and spread its error over the columns to
    come along the inverse of the moments, those with the largest inputs first.
    """
    moments = moments.astype(np.float64)
    diagonal = np.diagonal(moments).copy()
    silent = diagonal == 0  # inputs that are always zero: any weight will do
    diagonal[silent] = 1
    np.fill_diagonal(moments, diagonal + DAMPING * diagonal.mean())
    order = np.argsort(-diagonal)
    inverse = np.linalg.inv(moments[order][:, order])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    rest = weights[:, order].astype(np.float64)
    integers = np.empty(rest.shape)
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        lost = np.empty((len(rest), stop - start))
        for i in range(start, stop):
            integers[:, i] = np.clip(np.round(rest[:, i] / scale), -127, 127)
            lost[:, i - start] = (rest[:, i] - integers[:, i] * scale) / upper[i, i]
            rest[:, i:stop] -= lost[:, i - start, None] * upper[i, i:stop]
        rest[:, stop:] -= lost @ upper[start:stop, stop:]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return np.ascontiguousarray(integers[:, back], np.int8)  # safetensors writes memory as it lies


def quantized(graph: bytes, calibration: Calibration, form: Form) -> bytes:
    """The graph with QuantizeLinear and DequantizeLinear pairs in a backend's form."""
    model = onnx.load_from_string(graph)
    chosen = _chosen(model, form)
    for layer in _layers(model):
        _quantize_weight(model, layer, calibration)
    for name in chosen:
        _quantize_activation(model, name, calibration.ranges[name], form)
    _sort(model.graph)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


@dataclass(frozen=True)
class _Layer:
    """A convolution that is quantized: `name` of its weight, (out, in, k, k)."""

    node: onnx.NodeProto
    name: str
    weight: Array

    @property
    def input(self) -> str:
        return str(self.node.input[0])

    @property
    def fan_in(self) -> int:
        return int(np.prod(self.weight.shape[1:]))

    def rows(self, values: Array, count: int, generator: np.random.Generator) -> Array:
        """What the kernel sees at random places: about `count` rows (fan_in,) of values (n, in, h, w)."""
        attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        size, stride, pad = self.weight.shape[2], attributes["strides"][0], attributes["pads"][0]
        padded = np.pad(values, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        n, _, height, width = padded.shape
        places = -(-count // n)
        tops = stride * generator.integers(0, (height - size) // stride + 1, places)
        lefts = stride * generator.integers(0, (width - size) // stride + 1, places)
        seen = np.stack(
            [padded[:, :, t : t + size, left : left + size] for t, left in zip(tops, lefts, strict=True)]
        )  # (places, n, in, k, k)
        rows: Array = seen.reshape(places * n, -1)
        return rows


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    """Every convolution but the first, which reads the picture."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv"][1:]
    return [_Layer(node, node.input[1], numpy_helper.to_array(values[node.input[1]])) for node in nodes]


def _sums(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The residual sums: additions of two activations."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type == "Add" and not constants & set(node.input)]


def _activations(model: onnx.ModelProto) -> set[str]:
    """Everything that some form quantizes."""
    return {layer.input for layer in _layers(model)} | {name for node in _sums(model) for name in node.input}


def _chosen(model: onnx.ModelProto, form: Form) -> list[str]:
    inputs = {layer.input for layer in _layers(model)}
    return sorted(_activations(model) if form == "integer" else inputs)


def _observer(model: onnx.ModelProto, names: Sequence[str]) -> "_Observer":
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return _Observer(watched.SerializeToString(), names)


class _Observer:
    """Runs the graph and gives the values of activations."""

    def __init__(self, graph: bytes, names: Sequence[str]) -> None:
        import onnxruntime  # noqa: PLC0415  # a backend, which may be missing where only graphs are made

        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._names = list(names)

    def __call__(self, views: NDArray[np.uint8]) -> dict[str, Array]:
        values = self._session.run(self._names, {"views": views})
        return dict(zip(self._names, cast("list[Array]", values), strict=True))


def _quantize_weight(model: onnx.ModelProto, layer: _Layer, calibration: Calibration) -> None:
    integers, scale, zero = (f"{layer.name}.{part}" for part in ("int8", "scale", "zero"))
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(calibration.weights[layer.name], integers),
            numpy_helper.from_array(calibration.scales[layer.name], scale),
            numpy_helper.from_array(np.zeros(len(calibration.scales[layer.name]), np.int8), zero),
        ]
    )
    model.graph.node.append(
        helper.make_node(
            "DequantizeLinear", [integers, scale, zero], [f"{layer.name}.float"], f"{layer.name}.dequantize", axis=0
        )
    )
    layer.node.input[1] = f"{layer.name}.float"
    # By its place: a new list of all others would be a copy of all weights for each layer.
    del model.graph.initializer[next(i for i, t in enumerate(model.graph.initializer) if t.name == layer.name)]


def _quantize_activation(model: onnx.ModelProto, name: str, limits: tuple[float, float], form: Form) -> None:
    """Put a pair after a tensor, and let what the form says read the pair's output."""
    readers = [node for node in model.graph.node if name in node.input]
    if form == "inputs":
        readers = [node for node in readers if node.op_type == "Conv"]
    if form == "symmetric":
        scale, zero = np.float32(max(abs(limits[0]), abs(limits[1]), 1e-8) / 127), np.array(0, np.int8)
    else:
        scale, zero_point = affine(*limits)
        zero = np.array(zero_point, np.uint8)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array(scale), f"{name}.scale"), numpy_helper.from_array(zero, f"{name}.zero")]
    )
    pair = [f"{name}.scale", f"{name}.zero"]
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [name, *pair], [f"{name}.bytes"], f"{name}.quantize"),
            helper.make_node("DequantizeLinear", [f"{name}.bytes", *pair], [f"{name}.float"], f"{name}.dequantize"),
        ]
    )
    for node in readers:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = f"{name}.float"


def _sort(graph: onnx.GraphProto) -> None:
    """Order the nodes so that each comes after what it reads."""
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(filter(None, node.input))]
        assert ready, "the graph has a cycle"
        ordered += ready
        known |= {output for node in ready for output in node.output}
        names = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in names]
    del graph.node[:]
    graph.node.extend(ordered)
