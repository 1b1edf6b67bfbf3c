"""Members with random weights in every precision, as TensorRT is to parse them. Their answers mean nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from resnet_ensemble.export import precisions, quantize, to_onnx
from resnet_ensemble.export.engines import Precision
from resnet_ensemble.export.quantize import Calibration
from resnet_ensemble.training.model import Shortcut, imagenet
from resnet_ensemble.training.views import Preprocessing

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def exported(depth: int, shortcut: Shortcut = "B") -> bytes:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the comparison with torch takes longer than the export
        patch.setattr(to_onnx, "_compare", lambda content, graph: None)
        network = imagenet(depth, shortcut=shortcut)
        return to_onnx.to_onnx(to_onnx.Graph(network.eval(), IMAGENET).eval())


def calibrated(graph: bytes) -> Calibration:
    """Ranges that nobody measured, and weights rounded to the nearest."""
    model = onnx.load_from_string(graph)
    weights, scales = {}, {}
    kept = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Conv"][1:]:
        weight = kept[node.input[1]]
        scale = quantize.best_scales(weight.reshape(len(weight), -1))
        weights[node.input[1]] = np.rint(weight / scale[:, None, None, None]).clip(-127, 127).astype(np.int8)
        scales[node.input[1]] = scale
    everything = [output for node in model.graph.node for output in node.output]
    return Calibration(dict.fromkeys(everything, (0.0, 6.0)), weights, scales, images=0)


def prepared(graph: bytes) -> dict[Precision, bytes]:
    made = dict.fromkeys(PRECISIONS, graph)
    made["int8"] = quantize.quantized(graph, calibrated(graph), "symmetric")
    made["fp8"] = precisions.float8(graph, calibrated(graph))
    return {precision: precisions.for_tensorrt(content, precision) for precision, content in made.items()}


def jobs(graph: bytes, folder: Path, name: str, seen: Preprocessing) -> list[dict[str, object]]:
    """What rtx.py takes: the graph in every precision."""
    made = []
    for precision, content in prepared(graph).items():
        file = folder / f"{name}-{precision}.onnx"
        file.write_bytes(content)
        made.append({"graph": str(file), "crop": seen.crop, "resize": seen.resize, "precision": precision})
    return made
