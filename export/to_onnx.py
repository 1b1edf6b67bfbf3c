"""Export trained networks to ONNX and write them as a bundle.

    python export/to_onnx.py runs/resnet20-cifar10 runs/resnet32-cifar10 --bundle bundles/mine
    python export/to_onnx.py resnet18.pth resnet50:IMAGENET1K_V2 --bundle bundles/pair --calibration PHOTOS
    python export/to_onnx.py --ensemble torchvision-v2 --bundle bundles/torchvision-v2

Each graph takes uint8 (n, h, w, 3) and answers float32 (n, classes) probabilities: cast, normalisation and softmax
are inside, batch norm is folded into the convolutions, and n, h and w are dynamic. Pixels last is the order in which
decoders deliver them; the transposition inside the graph was measured to cost nothing (ResNet-20, 20 views on one
Zen 5 core, ONNX Runtime 1.32.0: 14.77 ms with it, 14.75 ms for a graph that takes channels first). Every graph is
checked against torch before anything is written; a bundle that is there is then replaced. With --calibration DIR, a
folder with CIFAR's official files or with pictures, the bundle also holds what INT8 engines are made with.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import platform
import re
import runpy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

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
from resnet_ensemble.export.bundle import (
    NAME,
    VERSION,
    Bundle,
    BundleError,
    CalibrationFile,
    Golden,
    Manifest,
    Member,
    write,
)
from resnet_ensemble.export.declared import Declared, WeightsError, choose, made_before
from resnet_ensemble.export.gate import CalibrationError
from resnet_ensemble.export.weights import Source, read_all
from resnet_ensemble.training import cifar
from resnet_ensemble.training.checkpoint import CheckpointError
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.model import (
    FullyConvolutional,
    ResNet,
    SubsampleAndPad,
    multiply_adds,
    parameter_count,
)
from resnet_ensemble.training.views import Preprocessing, make_views

OPSET = 20
PROTOCOL = "10crop"
# (batch, height, width) at which the exported graph must agree with torch, in sides of a crop.
CHECKED_SHAPES = ((1, 1, 1), (5, 1, 1), (3, 1.25, 1.05), (2, 1.45, 2))
TOLERANCE = 1e-4


class ExportError(Exception):
    """The graph is not the network that it was made from."""


class Graph(nn.Module):
    """uint8 (n, h, w, 3) → float32 (n, classes) probabilities.

    Views that are larger than a crop are averaged over (training/model.py). A mean image, if the network was trained
    with one, is resized to the views.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: ResNet, preprocessing: Preprocessing, mean_image: Tensor | None = None) -> None:
        super().__init__()
        self.network = FullyConvolutional(network, preprocessing.crop)
        self.preprocessing = preprocessing
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        image = mean.expand(1, 1, 3) if mean_image is None else mean_image
        self.register_buffer("shift", (-image / std).permute(2, 0, 1)[None].contiguous())  # (1, 3, h or 1, w or 1)

    def forward(self, views: Tensor) -> Tensor:
        x = views.float().permute(0, 3, 1, 2)  # (n, 3, h, w); TensorRT transposes floats, but no bytes
        shift = self.shift
        if shift.shape[-1] > 1:
            shift = F.interpolate(shift, size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.softmax(self.network(x * self.scale + shift), dim=1)  # (n, classes)


def to_onnx(graph: Graph) -> bytes:
    """Serialize, with batch norm folded and n, h, w dynamic. Raises ExportError where it differs from torch."""
    folded = copy.deepcopy(graph)
    _fold_batch_norm(folded)
    _convolve_shortcuts(folded)
    crop = graph.preprocessing.crop
    example = torch.zeros((2, crop + 1, crop + 2, 3), dtype=torch.uint8)
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
    sources: Sequence[Source],
    path: Path,
    *,
    name: str,
    version: str,
    protocol: str = PROTOCOL,
    calibration: Path | None = None,
    identity: str = "",
) -> Bundle:
    """Write a bundle with one member a source. Raises ExportError, DataError, CalibrationError.

    `identity` says in the manifest what it was made from (`Declared.identity`).
    """
    labels = _labels(sources)
    pictures = drawings.pictures()
    files = {f"golden/{title}.png": content for title, content in pictures.items()}
    members: list[Member] = []
    expected: dict[str, dict[str, tuple[float, ...]]] = {title: {} for title in pictures}
    for source, title in zip(tqdm(sources, "export", unit="member", disable=None), _titles(sources), strict=True):
        seen = source.preprocessing
        graph = Graph(source.network, seen, source.mean_image).eval()
        content = to_onnx(graph)
        file = f"members/{title}.onnx"
        files[file] = content
        calibrated = None
        if calibration:
            calibrated, found = _calibrate(content, title, source, calibration)
            files[calibrated.file] = found
        members.append(
            Member(
                name=title,
                file=file,
                sha256=hashlib.sha256(content).hexdigest(),
                parameters=parameter_count(source.network),
                preprocessing=seen,
                recipe=source.recipe,
                measured=source.measured,
                calibration=calibrated,
                multiply_adds=multiply_adds(source.network, seen.crop),
            )
        )
        for picture, png in pictures.items():
            expected[picture][title] = _expect(graph, png, seen)
    manifest = Manifest(
        format=1,
        name=name,
        version=version,
        protocol=protocol,
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
            "golden": "drawn by export/drawings.py; probabilities by torch in float32",
            "weights": identity,
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


def _convolve_shortcuts(graph: Graph) -> None:
    """Write option A's shortcuts as 1x1 convolutions whose weights are 1 and 0, which answer the same to the last bit.

    Residual sums are then fused into convolutions, in all blocks of a stage: ONNX Runtime lays activations out in
    another way before and after what is no convolution. One lone view took a ResNet-20 0.52 ms instead of 0.60 and a
    ResNet-56 1.46 instead of 1.62 with two threads, and 0.84 (0.89) and 2.53 (2.66) with one; in batches of 10, all
    four shipped networks together, 1 to 2 % less (ONNX Runtime 1.32.0, two Zen 4 cores, medians of 60, 30 and 15
    rounds, 2026-11-27).
    """
    for module in list(graph.modules()):
        for name, shortcut in list(module.named_children()):
            if isinstance(shortcut, SubsampleAndPad):
                setattr(module, name, shortcut.as_convolution())


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
    engine = backend.load(backend.compile(content, "fp32", graph.preprocessing), "fp32")
    generator = np.random.default_rng(0)
    crop = graph.preprocessing.crop
    for batch, height, width in CHECKED_SHAPES:
        views = generator.integers(0, 256, (batch, round(crop * height), round(crop * width), 3), np.uint8)
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


def _labels(sources: Sequence[Source]) -> tuple[str, ...]:
    """The labels that all of them have."""
    found = {source.labels for source in sources}
    if len(found) != 1:
        raise ExportError("the networks have different labels, so they are no ensemble")
    return found.pop()


def _titles(sources: Sequence[Source]) -> list[str]:
    """One name each: two networks of one name become resnet152-1 and resnet152-2. Raises ExportError."""
    names = [source.name for source in sources]
    titles = [f"{name}-{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    if len(set(titles)) < len(titles):
        raise ExportError(f"two members would be named alike ({', '.join(titles)}); give them other names")
    return titles


def _calibrate(content: bytes, title: str, source: Source, folder: Path) -> tuple[CalibrationFile, bytes]:
    """What INT8 engines are made with: found on training images of CIFAR, or on a folder of pictures."""
    dataset = cifar.DATASETS.get(source.dataset)
    if dataset:
        images = cifar.read(folder, "train", dataset).images[: gate.MOST_IMAGES]
        views = np.stack([make_views(Image.fromarray(image), source.preprocessing, "center")[0] for image in images])
        count = len(images)
    else:
        pictures = gate.from_folder(folder, source.preprocessing, source.labels)
        views, count = pictures.calibration, pictures.count
    found = quantize.calibrate(content, gate.calibration_batches(views), images=count).to_bytes()
    file = CalibrationFile(
        file=f"members/{title}.calibration.safetensors",
        sha256=hashlib.sha256(found).hexdigest(),
        dataset=f"{dataset.title}, training images" if dataset else folder.resolve().name,
        images=count,
    )
    return file, found


def export_declared(
    chosen: Declared,
    path: Path,
    *,
    name: str | None = None,
    version: str = "1",
    calibration: Path | None = None,
) -> Bundle:
    """The bundle of a declared ensemble. Raises what PROBLEMS lists.

    One that is there already, and whole, is not made again.
    """
    name = name or path.resolve().name
    if not re.fullmatch(NAME, name):
        raise ExportError(f"{name!r} is no name for a bundle: letters, digits, dot, dash, underscore; give it another")
    if not re.fullmatch(VERSION, version):
        raise ExportError(f"{version!r} is no version of a bundle: letters, digits and signs of ASCII, without spaces")
    made = None if calibration else made_before(path, chosen)
    if made and (made.manifest.name, made.manifest.version) == (name, version):
        return made
    return export(
        read_all(chosen),
        path,
        name=name,
        version=version,
        protocol=chosen.protocol,
        calibration=calibration,
        identity=chosen.identity(),
    )


PROBLEMS = (
    BundleError,
    ExportError,
    CalibrationError,
    WeightsError,
    CheckpointError,
    DataError,
    engines.BackendUnavailable,
    OSError,
)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights", nargs="*", metavar="WEIGHTS", help="a run's folder, a file, or resnet50:IMAGENET1K_V2"
    )
    parser.add_argument("--bundle", type=Path, required=True, help="the folder to write")
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="CIFAR's official files, or pictures, for INT8")
    parser.add_argument("--ensemble", metavar="NAME", help="a declared ensemble (export/ensembles/), or a TOML file")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line, if the weights have none")
    parser.add_argument("--name", help="the bundle's name (default: its folder's)")
    parser.add_argument("--version", default="1", help="the bundle's version (default: 1)")
    arguments = parser.parse_args()
    if bool(arguments.weights) == bool(arguments.ensemble):
        parser.error("give WEIGHTS, or --ensemble NAME")
    try:
        bundle = export_declared(
            choose(arguments.weights, arguments.ensemble, arguments.labels),
            arguments.bundle,
            name=arguments.name,
            version=arguments.version,
            calibration=arguments.calibration,
        )
    except OSError as problem:
        raise SystemExit(
            f"to_onnx: {problem}; no file of the bundle was replaced: run it again when this is solved"
        ) from None
    except PROBLEMS as problem:
        raise SystemExit(f"to_onnx: {problem}") from None
    print(f"{bundle.identity}: {len(bundle.manifest.members)} members in {bundle.path}")


if __name__ == "__main__":
    main()
