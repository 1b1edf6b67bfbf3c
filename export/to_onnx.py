"""Export checkpoints to ONNX and write them as a bundle.

    python export/to_onnx.py runs/resnet20-cifar10 runs/resnet32-cifar10 --bundle bundles/cifar10

Each graph takes uint8 (n, h, w, 3) and answers float32 (n, classes) probabilities: cast, normalisation and softmax
are inside, batch norm is folded into the convolutions, and n, h and w are dynamic. Pixels last is the order in which
decoders deliver them; the transposition inside the graph was measured to cost nothing (ResNet-20, 20 views on one
Zen 5 core, ONNX Runtime 1.32.0: 14.77 ms with it, 14.75 ms for a graph that takes channels first). Every graph is
checked against torch before anything is written. With --calibration DIR, a folder with CIFAR's official files or with
pictures, the bundle also holds what INT8 engines are made with.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import io
import platform
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from resnet_ensemble.export import drawings, engines, gate, quantize
from resnet_ensemble.export.bundle import Bundle, CalibrationFile, Golden, Manifest, Measured, Member, write
from resnet_ensemble.export.gate import CalibrationError
from resnet_ensemble.training import checkpoint, cifar
from resnet_ensemble.training.checkpoint import Checkpoint
from resnet_ensemble.training.model import parameter_count
from resnet_ensemble.training.recipes import new_network
from resnet_ensemble.training.views import Preprocessing, make_views

OPSET = 20
PROTOCOL = "10crop"
# (batch, height, width) at which the exported graph must agree with torch.
CHECKED_SHAPES = ((1, 32, 32), (5, 32, 32), (3, 40, 33), (2, 47, 64), (1, 224, 224))
TOLERANCE = 1e-4
TITLES = {"imagenet": "ImageNet"} | {name: dataset.title for name, dataset in cifar.DATASETS.items()}


class ExportError(Exception):
    """The graph is not the network that it was made from."""


class Graph(nn.Module):
    """uint8 (n, h, w, 3) → float32 (n, classes) probabilities.

    A mean image, if the network was trained with one, is resized to the views.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, mean_image: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        image = mean.expand(1, 1, 3) if mean_image is None else mean_image
        self.register_buffer("shift", (-image / std).permute(2, 0, 1)[None].contiguous())  # (1, 3, h or 1, w or 1)

    def forward(self, views: Tensor) -> Tensor:
        x = views.permute(0, 3, 1, 2).float()  # (n, 3, h, w)
        shift = self.shift
        if shift.shape[-1] > 1:
            shift = F.interpolate(shift, size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.softmax(self.network(x * self.scale + shift), dim=1)  # (n, classes)


def network_of(saved: Checkpoint) -> nn.Module:
    """The checkpoint's network in evaluation mode."""
    made = new_network(saved.recipe)
    made.load_state_dict(saved.weights)
    return made.eval()


def to_onnx(graph: Graph) -> bytes:
    """Serialize, with batch norm folded and n, h, w dynamic. Raises ExportError where it differs from torch."""
    folded = copy.deepcopy(graph)
    _fold_batch_norm(folded)
    example = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        folded.eval(),
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["views"],
        output_names=["probabilities"],
        dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},),
        verbose=False,
    )
    assert program is not None  # only None when it was told to write a file itself
    model = program.model_proto
    _name_dimensions(model)
    _strip_traces(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    content: bytes = model.SerializeToString()
    _compare(content, graph)
    return content


def export(
    checkpoints: list[Checkpoint], path: Path, *, name: str, version: str, calibration: Path | None = None
) -> Bundle:
    """Write a bundle with one member a checkpoint. Raises ExportError, DataError, CalibrationError."""
    labels = _labels(checkpoints)
    pictures = drawings.pictures()
    files = {f"golden/{title}.png": content for title, content in pictures.items()}
    members: list[Member] = []
    expected: dict[str, dict[str, tuple[float, ...]]] = {title: {} for title in pictures}
    for saved in tqdm(checkpoints, "export", unit="member", disable=None):
        if not saved.finished:
            raise ExportError(f"{saved.recipe.name} is not trained to its last epoch; run training/train.py again")
        trained, seen = network_of(saved), saved.recipe.preprocessing
        graph = Graph(trained, seen, saved.mean_image).eval()
        content = to_onnx(graph)
        title = saved.recipe.network
        file = f"members/{title}.onnx"
        files[file] = content
        calibrated = None
        if calibration:
            calibrated, found = _calibrate(content, title, saved, labels, calibration)
            files[calibrated.file] = found
        members.append(
            Member(
                name=title,
                file=file,
                sha256=hashlib.sha256(content).hexdigest(),
                parameters=parameter_count(trained),
                preprocessing=seen,
                recipe=asdict(saved.recipe),
                measured=(_validation(saved),),
                calibration=calibrated,
            )
        )
        for picture, png in pictures.items():
            expected[picture][title] = _expect(graph, png, seen)
    manifest = Manifest(
        format=1,
        name=name,
        version=version,
        protocol=PROTOCOL,
        labels=labels,
        members=tuple(members),
        golden_protocol=PROTOCOL,
        golden_tolerance=TOLERANCE,
        golden=tuple(
            Golden(
                file=f"golden/{picture}.png",
                sha256=hashlib.sha256(png).hexdigest(),
                probabilities=expected[picture],
            )
            for picture, png in pictures.items()
        ),
        measured=(),
        provenance={
            "weights": f"trained by this project on {TITLES[checkpoints[0].recipe.dataset]}'s training images; MIT",
            "golden": "drawn by export/drawings.py; probabilities by torch in float32",
            "torch": torch.__version__,
            "onnx": importlib.metadata.version("onnx"),
            "python": platform.python_version(),
        },
    )
    return write(path, manifest, files)


def _fold_batch_norm(graph: Graph) -> None:
    """Replace each convolution and the batch norm that is registered next to it by one convolution with a bias."""
    for module in list(graph.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())


def _name_dimensions(model: onnx.ModelProto) -> None:
    shape = model.graph.input[0].type.tensor_type.shape
    renamed = {shape.dim[i].dim_param: name for i, name in enumerate(("batch", "height", "width"))}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold stack traces with paths of the exporting machine."""
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    model.graph.doc_string = model.doc_string = ""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del tensor.metadata_props[:]
        tensor.doc_string = ""


@torch.inference_mode()
def _compare(content: bytes, graph: Graph) -> None:
    backend = engines.backend("onnxruntime")
    engine = backend.load(backend.compile(content, "fp32"), "fp32")
    generator = np.random.default_rng(0)
    for batch, height, width in CHECKED_SHAPES:
        views = generator.integers(0, 256, (batch, height, width, 3), np.uint8)
        difference = np.abs(engine.run(views) - graph(torch.from_numpy(views)).numpy()).max()
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the graph differs from torch by {difference:.2g} at {views.shape}; allowed: {TOLERANCE}"
            )


@torch.inference_mode()
def _expect(graph: Graph, png: bytes, seen: Preprocessing) -> tuple[float, ...]:
    views = make_views(Image.open(io.BytesIO(png)).convert("RGB"), seen, PROTOCOL)
    mean: NDArray[np.float64] = graph(torch.from_numpy(views)).double().mean(0).numpy()
    return tuple(round(float(value), 7) for value in mean)


def _labels(checkpoints: list[Checkpoint]) -> tuple[str, ...]:
    """The labels that all of them have."""
    found = {saved.labels or cifar.DATASETS[saved.recipe.dataset].labels for saved in checkpoints}
    if len(found) != 1:
        raise ExportError("the networks have different labels, so they are no ensemble")
    return found.pop()


def _calibrate(
    content: bytes, title: str, saved: Checkpoint, labels: tuple[str, ...], source: Path
) -> tuple[CalibrationFile, bytes]:
    """What INT8 engines are made with: found on training images of CIFAR, or on a folder of pictures."""
    seen, dataset = saved.recipe.preprocessing, cifar.DATASETS.get(saved.recipe.dataset)
    if dataset:
        images = cifar.read(source, "train", dataset).images[: gate.MOST_IMAGES]
        views = np.stack([make_views(Image.fromarray(image), seen, "center")[0] for image in images])
    else:
        views = gate.from_folder(source, seen, labels).views
    found = quantize.calibrate(content, list(gate.batches(views)), images=len(views)).to_bytes()
    file = CalibrationFile(
        file=f"members/{title}.calibration.safetensors",
        sha256=hashlib.sha256(found).hexdigest(),
        dataset=f"{TITLES[saved.recipe.dataset]}, training images" if dataset else source.resolve().name,
        images=len(views),
    )
    return file, found


def _validation(saved: Checkpoint) -> Measured:
    last = saved.history[-1]
    return Measured(
        dataset=TITLES[saved.recipe.dataset],
        split="val",
        protocol="center",
        images=last.val_images,
        top1_error=round(last.val_error, 4),
        measured_by=f"python training/train.py {saved.recipe.name}",
    )


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders that training/train.py wrote")
    parser.add_argument("--bundle", type=Path, required=True, help="the folder to write")
    parser.add_argument("--name", help="the bundle's name (default: its folder's)")
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="CIFAR's official files, or pictures, for INT8")
    parser.add_argument("--version", default="1", help="the bundle's version (default: 1)")
    arguments = parser.parse_args()
    try:
        checkpoints = [checkpoint.load(run / "checkpoint.safetensors") for run in arguments.runs]
        name = arguments.name or arguments.bundle.resolve().name
        bundle = export(
            checkpoints, arguments.bundle, name=name, version=arguments.version, calibration=arguments.calibration
        )
    except (
        ExportError,
        CalibrationError,
        checkpoint.CheckpointError,
        cifar.DataError,
        engines.BackendUnavailable,
    ) as problem:
        raise SystemExit(str(problem)) from None
    print(f"{bundle.identity}: {len(bundle.manifest.members)} members in {bundle.path}")


if __name__ == "__main__":
    main()
