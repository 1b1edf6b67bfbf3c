"""A model repository for NVIDIA's Triton Inference Server, made of a bundle.

    DIR/README.md                   what is served, how pictures become views, a client
    DIR/resnet_ensemble.json        the SHA-256 of every file; written last
    DIR/cifar10/                    the ensemble: views in, the mean of the members' probabilities out, one row a view
    DIR/cifar10-resnet20/1/model.onnx   a member, and so on for each: config.pbtxt, labels.txt
    DIR/cifar10_mean/1/model.onnx   the mean, since Triton's ensembles route tensors but can't compute

Members that see a picture in the same way share the input `views`. Others get an input of their own, `views_MEMBER`,
named after the first that reads it; row i of every input is then the same view of the same picture.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from resnet_ensemble.export import sealed
from resnet_ensemble.export.bundle import Bundle, BundleError, Member
from resnet_ensemble.training.files import write_together
from resnet_ensemble.training.views import PROTOCOLS, mean_colour

CONTENTS = "resnet_ensemble.json"
LABELS = "labels.txt"
# Views in one batch of ONNX Runtime, so at most in one request: six pictures of ten views.
MAX_BATCH = 64
OPSET, IR_VERSION = 13, 8  # of the mean: older than the members', so whatever reads them reads it
BATCHING = "dynamic_batching { }"  # no delay: a batch is what waits when the model is free
ON_CPU = "instance_group [ { kind: KIND_CPU } ]"  # the mean of some kB, and the answer goes through the CPU anyway


class RepositoryError(BundleError):
    """The repository can't be written; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """A TensorRT plan that takes the place of a member's ONNX file.

    Its first profile takes 1 to `max_batch` crops, since Triton neither pads nor splits. It runs only in a Triton whose
    TensorRT has the version that built it, on the same kind of GPU.
    """

    content: bytes
    max_batch: int


@dataclass(frozen=True)
class _Tensor:
    """Of a model's interface; `dims` without the batch, -1 for any."""

    name: str
    kind: str
    dims: tuple[int, ...]

    def fields(self) -> str:
        return f'name: "{self.name}"\n    data_type: {self.kind}\n    dims: [ {", ".join(map(str, self.dims))} ]'


@dataclass(frozen=True)
class _Model:
    """One folder of the repository: what its config says, and the file of its version 1."""

    name: str
    platform: str
    inputs: Sequence[_Tensor]
    scheduling: str
    file: str
    content: bytes

    def config(self, max_batch: int, classes: int) -> str:
        inputs = ",\n".join(f"  {{\n    {tensor.fields()}\n  }}" for tensor in self.inputs)
        output = _Tensor("probabilities", "TYPE_FP32", (classes,)).fields()
        return f"""\
name: "{self.name}"
platform: "{self.platform}"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
  {{
    {output}
    label_filename: "{LABELS}"
  }}
]
{self.scheduling}
"""


def write(bundle: Bundle, folder: Path, plans: Mapping[str, Plan] | None = None) -> None:
    """Write the repository, whole or not at all, in place of an unchanged one of ours.

    `plans`: of members, by name. Raises BundleError, OSError.
    """
    files = _files(bundle, plans or {})
    folder = folder.resolve()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        made, old = Path(beside, "new"), Path(beside, "old")
        write_together({made / name: content for name, content in files.items()})
        if folder.exists():
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _files(bundle: Bundle, plans: Mapping[str, Plan]) -> dict[str, bytes]:
    """Every file by its path, the list of them last."""
    labels = bundle.manifest.labels
    if unfit := [label for label in labels if label.splitlines() != [label]]:
        raise RepositoryError(f"the label {unfit[0]!r} is not one line, as Triton's must be; export with other labels")
    inputs = _inputs(bundle.manifest.members)
    max_batch = min([MAX_BATCH, *(plan.max_batch for plan in plans.values())])
    files: dict[str, bytes] = {}
    for model in _models(bundle, inputs, plans):
        files[f"{model.name}/config.pbtxt"] = model.config(max_batch, len(labels)).encode()
        files[f"{model.name}/{LABELS}"] = "".join(f"{label}\n" for label in labels).encode()
        files[f"{model.name}/1/{model.file}"] = model.content
    files["README.md"] = _readme(bundle, inputs, max_batch).encode()
    hashes = {path: _sha256(content) for path, content in files.items()}
    return files | {CONTENTS: sealed.dumps({"bundle": bundle.identity, "files": hashes})}


def _models(bundle: Bundle, inputs: Mapping[str, str], plans: Mapping[str, Plan]) -> Iterator[_Model]:
    """The members, their mean, and the ensemble of all. Raises BundleDamaged."""
    manifest = bundle.manifest
    title, classes = manifest.name, len(manifest.labels)
    for member in manifest.members:
        name = f"{title}-{member.name}"
        if plan := plans.get(member.name):
            views = _views("views", member.preprocessing.crop)
            yield _Model(name, "tensorrt_plan", [views], BATCHING, "model.plan", plan.content)
        else:
            yield _Model(name, "onnxruntime_onnx", [_views("views")], BATCHING, "model.onnx", bundle.read(member))
    votes = [_Tensor(_vote(member), "TYPE_FP32", (classes,)) for member in inputs]
    graph = mean_graph([vote.name for vote in votes], classes)
    yield _Model(f"{title}_mean", "onnxruntime_onnx", votes, f"{BATCHING}\n{ON_CPU}", "model.onnx", graph)
    views_of_all = [_views(name) for name in dict.fromkeys(inputs.values())]
    # Triton wants a version's folder; git and object stores keep no empty one.
    yield _Model(title, "ensemble", views_of_all, _steps(title, inputs), ".keep", b"")


def check_replaceable(folder: Path) -> None:
    """Raise RepositoryError unless the folder is new, empty, or just as it was written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RepositoryError(f"{folder} is a file; name a new folder for the Triton repository")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not found:
        return
    remedy = "name another folder, or remove it"
    try:
        listed = sealed.loads((folder / CONTENTS).read_bytes())["files"]
    except FileNotFoundError:
        raise RepositoryError(f"{folder} is not empty and has no {CONTENTS}, so it is not ours; {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise RepositoryError(f"{folder / CONTENTS} is damaged, so nothing there is replaced; {remedy}") from None
    changed = found ^ {*listed, CONTENTS}
    changed |= {name for name in found & {*listed} if _sha256((folder / name).read_bytes()) != listed[name]}
    if changed:
        raise RepositoryError(f"{folder} was changed after it was written ({min(changed)}); {remedy}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _inputs(members: Sequence[Member]) -> dict[str, str]:
    """The name of the ensemble's input that each member reads, by the member's name."""
    first: dict[tuple[object, ...], str] = {}
    for member in members:
        first.setdefault(_geometry(member), member.name)
    return {member.name: "views" if len(first) == 1 else f"views_{first[_geometry(member)]}" for member in members}


def _geometry(member: Member) -> tuple[object, ...]:
    """What the pixels of a view depend on. The mean only colours the padding; its subtraction is in the graph."""
    seen = member.preprocessing
    return seen.resize, seen.crop, seen.padding, mean_colour(seen.mean) if seen.padding else None


def _vote(member: str) -> str:
    """The ensemble's name for a member's probabilities."""
    return f"probabilities_{member}"


def _views(name: str, side: int = -1) -> _Tensor:
    return _Tensor(name, "TYPE_UINT8", (side, side, 3))


def mean_graph(names: Sequence[str], classes: int) -> bytes:
    """An ONNX graph: float32 (n, classes) of each name in, their mean out."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes]) for name in names]
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph([helper.make_node("Mean", list(names), ["probabilities"])], "mean", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _steps(title: str, inputs: Mapping[str, str]) -> str:
    """Each member reads its input, and the mean reads all members."""
    steps = [_step(f"{title}-{member}", {"views": given}, _vote(member)) for member, given in inputs.items()]
    steps.append(_step(f"{title}_mean", {_vote(member): _vote(member) for member in inputs}, "probabilities"))
    return "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}"


def _step(model: str, inputs: Mapping[str, str], output: str) -> str:
    maps = "".join(f'      input_map {{ key: "{key}" value: "{value}" }}\n' for key, value in inputs.items())
    return (
        f'    {{\n      model_name: "{model}"\n      model_version: -1\n{maps}'
        f'      output_map {{ key: "probabilities" value: "{output}" }}\n    }}'
    )


def _readme(bundle: Bundle, inputs: Mapping[str, str], max_batch: int) -> str:
    manifest = bundle.manifest
    rows, calls = [], []
    for given in dict.fromkeys(inputs.values()):
        readers = [member for member in manifest.members if inputs[member.name] == given]
        seen = readers[0].preprocessing
        rows.append(
            f"| `{given}` | {', '.join(member.name for member in readers)} | {seen.resize} | {seen.padding} "
            f"| {mean_colour(seen.mean) if seen.padding else ''} | {seen.crop} |"
        )
        calls.append(
            f'    "{given}": Preprocessing(resize={seen.resize}, crop={seen.crop}, padding={seen.padding}, '
            f"mean={seen.mean}, std={seen.std}),"
        )
    protocol, says = manifest.protocol, f"The bundle's protocol is `{manifest.protocol}`"
    if protocol not in PROTOCOLS:
        protocol = "10crop"
        says += ", whose whole views have several shapes and need a request each; the client below sends `10crop`"
    views = [f"{view.position}{' of the mirror' if view.mirrored else ''}" for view in PROTOCOLS[protocol]]
    return README.format(
        bundle=bundle.identity,
        title=manifest.name,
        models=", ".join(f"`{manifest.name}-{name}`" for name in inputs),
        classes=len(manifest.labels),
        max_batch=max_batch,
        rows="\n".join(rows),
        seen="\n".join(calls),
        says=says,
        protocol=protocol,
        count=len(PROTOCOLS[protocol]),
        positions=", ".join(views),
    )


README = """\
# {title} on Triton

A Triton model repository made of the bundle {bundle} by `export/build_engines.py --triton`. The file
`resnet_ensemble.json` has the SHA-256 of every file; without it the copy is incomplete.

    docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD:/models" nvcr.io/nvidia/tritonserver:YY.MM-py3 \\
      tritonserver --model-repository=/models

- `{title}`: the ensemble. Answers `probabilities`, FP32 (views, {classes}): for each view the mean over the members.
  The answer for a picture is the mean over its views.
- {models}: one member each, `views` in and its own `probabilities` out.
- `{title}_mean`: the mean, which the ensemble calls.

`labels.txt` beside each config names the {classes} classes in order. One request has at most {max_batch} views.

## Views

Views are UINT8 (views, height, width, 3), RGB, 0 to 255: cast, normalisation and softmax are inside the models.

| input of `{title}` | read by | shorter side resized to | padding on each side | its colour | crop |
|---|---|---|---|---|---|
{rows}

Resizing is bilinear with antialiasing (Pillow's), the longer side rounded down. Row i of every input is the same view
of the same picture. {says}, {count} views of each picture:
{positions}.

## A client

`pip install 'tritonclient[grpc]' pillow`, and the package resnet-ensemble; what is taken of it has no other needs.

```python
import sys
from pathlib import Path

import tritonclient.grpc as triton
from PIL import Image

from resnet_ensemble.training.pixels import to_rgb
from resnet_ensemble.training.views import Preprocessing, make_views

SEEN = {{
{seen}
}}

image = Image.open(sys.argv[1])
image.load()
image = to_rgb(image)  # upright, transparency on white, 16 bits as 8, as the server does it
inputs = []
for name, preprocessing in SEEN.items():
    views = make_views(image, preprocessing, "{protocol}")  # uint8 ({count}, crop, crop, 3)
    inputs.append(triton.InferInput(name, list(views.shape), "UINT8"))
    inputs[-1].set_data_from_numpy(views)
url = sys.argv[2] if len(sys.argv) > 2 else "localhost:8001"
probabilities = triton.InferenceServerClient(url).infer("{title}", inputs).as_numpy("probabilities").mean(axis=0)
labels = Path("{title}", "labels.txt").read_text().splitlines()
for index in probabilities.argsort()[:-6:-1]:
    print(f"{{probabilities[index]:.4f}}  {{labels[index]}}")
```
"""
