"""Where a member's weights come from, and what must travel with them.

    runs/resnet56-cifar10          a run's folder, or a checkpoint of training/train.py
    resnet50.pth, resnet50.safetensors   a state dict with torchvision's names, ours or anyone's
    resnet50:IMAGENET1K_V2         torchvision's own, downloaded (and kept by torch.hub)

The network is read off the tensors: depth, kind of block, projections, classes. A file that torchvision published is
known by its hash, and has the preprocessing and the accuracy that it has by name. What others can't tell, unless it is
given, is torchvision's for ImageNet's networks: the stride in the 3x3 (v1.5), a crop of 224 from a shorter side of 256,
ImageNet's mean and standard deviation, and for 1000 classes ImageNet's names. For those of CIFAR it is our recipes': a
crop of 32 from 32 pixels and 2 around them, CIFAR-10's mean, standard deviation and 10 names, or CIFAR-100's for 100
classes. Without projections a network has option A's shortcuts, unless it is declared to be plain.
"""

import argparse
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights, get_weight
from torchvision.models.resnet import ResNet50_Weights

from resnet_ensemble.export.bundle import Measured
from resnet_ensemble.export.declared import Declared, DeclaredMember, WeightsError, read_labels
from resnet_ensemble.training import checkpoint, cifar
from resnet_ensemble.training.checkpoint import Checkpoint
from resnet_ensemble.training.model import BLOCKS, ResNet, Shortcut, Stride, imagenet
from resnet_ensemble.training.model import cifar as cifar_network
from resnet_ensemble.training.recipes import RECIPES, new_network
from resnet_ensemble.training.views import Preprocessing

IMAGENET = Preprocessing(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# In the order of the WordNet ids, as everywhere.
IMAGENET_LABELS = tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
Unprojected = Literal["A", "plain"]
# Where other people's training scripts put the state dict, and what they and PyTorch's wrappers put before each name.
NESTED = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")
# Those of torchvision that are networks of the paper.
PUBLISHED = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Source:
    """A trained network in evaluation mode, and how to use it. `dataset`: a name of cifar.DATASETS, or imagenet."""

    name: str
    network: ResNet
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    dataset: str
    recipe: dict[str, Any] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    mean_image: Tensor | None = None


def read_all(declared: Declared) -> list[Source]:
    """Every member of an ensemble. Raises WeightsError, CheckpointError."""
    labels = read_labels(declared.labels) if declared.labels else None
    sources: list[Source] = []
    known: dict[str, str] = {}
    for member in declared.members:
        source = _read_member(member, labels)
        fingerprint = _fingerprint(source)
        if first := known.get(fingerprint):
            raise WeightsError(f"{member.weights} is the network of {first} once more; each member must be another one")
        known[fingerprint] = member.weights
        sources.append(source)
    return sources


def _fingerprint(source: Source) -> str:
    """A hash of all that its answers are computed with."""
    digest = hashlib.sha256(f"{source.network}{source.preprocessing}".encode())
    tensors = list(source.network.state_dict().values())
    for tensor in tensors if source.mean_image is None else [*tensors, source.mean_image]:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _read_member(member: DeclaredMember, labels: tuple[str, ...] | None) -> Source:
    fields = ("resize", "crop", "padding", "mean", "std")
    given = {field: value for field in fields if (value := getattr(member, field)) is not None}
    return read(
        member.weights,
        name=member.name,
        preprocessing=given,
        labels=labels,
        stride_at=member.stride,
        unprojected=member.shortcut,
    )


def read(
    text: str,
    *,
    name: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: tuple[str, ...] | None = None,
    stride_at: Stride = "v1.5",
    unprojected: Unprojected = "A",
) -> Source:
    """A member's weights; what is given here wins over what they say. Raises WeightsError, CheckpointError.

    - preprocessing: the fields of it that are given
    - stride_at, unprojected: of a state dict, which does not tell them
    """
    if re.fullmatch(r"resnet\d+:\w+", text):
        source = _from_torchvision(text)
    elif Path(text).is_dir() or _is_checkpoint(Path(text)):
        source = from_checkpoint(checkpoint.load(Path(text)))
    else:
        source = _from_file(Path(text), stride_at, unprojected, labels)
    try:
        seen = replace(source.preprocessing, **preprocessing or {})
    except ValueError as error:
        raise WeightsError(f"{text}: {error}") from None
    labels = labels or source.labels
    if source.labels and len(labels) != len(source.labels):
        raise WeightsError(f"{text} has {len(source.labels)} classes and {len(labels)} names are given")
    # An error was measured of pictures that were seen in one way; nobody knows that of another.
    measured = source.measured if seen == source.preprocessing else ()
    return replace(source, name=name or source.name, preprocessing=seen, labels=labels, measured=measured)


def from_checkpoint(saved: Checkpoint) -> Source:
    """One of our own checkpoints. Raises WeightsError if it is not trained to its end, or of no use."""
    recipe = saved.recipe
    if not saved.finished:
        raise WeightsError(f"{recipe.name} is not trained to its last epoch; run training/train.py again")
    network = new_network(recipe)
    _load(recipe.network, network, saved.weights)
    dataset = cifar.DATASETS.get(recipe.dataset)
    labels = saved.labels or (dataset.labels if dataset else ())
    if len(labels) == len(IMAGENET_LABELS) and all(re.fullmatch(r"n\d{8}", label) for label in labels):
        labels = IMAGENET_LABELS
    last = saved.history[-1]
    measured = Measured(
        dataset=dataset.title if dataset else "ImageNet",
        split="val",
        protocol="center",
        images=last.val_images,
        top1_error=round(last.val_error, 4),
        measured_by=f"python training/train.py {recipe.name}",
    )
    return Source(
        name=recipe.network,
        network=network.eval(),
        preprocessing=recipe.preprocessing,
        labels=labels,
        dataset=recipe.dataset,
        recipe=asdict(recipe),
        measured=(measured,),
        mean_image=saved.mean_image,
    )


def network_of(
    state: dict[str, Tensor], stride_at: Stride = "v1.5", unprojected: Unprojected = "A"
) -> tuple[str, ResNet]:
    """The name and the network of a state dict with torchvision's names. Raises WeightsError.

    `unprojected`: the shortcuts of a network that has no projections.
    """
    try:
        stem, classes = state["conv1.weight"].shape, int(state["fc.bias"].numel())
    except KeyError as missing:
        raise WeightsError(f"a state dict of torchvision's ResNet has {missing}; this one has {_some(state)}") from None
    if classes < 2:
        raise WeightsError("a softmax of one class is always 1: weights of two classes or more can be served")
    stages = [_count(state, stage) for stage in (1, 2, 3, 4)]
    blocks = tuple(count for count in stages if count)
    shortcut = _shortcut(state, unprojected)
    kind = "plain" if shortcut == "plain" else "resnet"
    if stem[2:] == (7, 7):
        deep = "layer1.0.conv3.weight" in state
        depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == deep]
        if not depths:
            raise WeightsError(f"no network of Table 1 has {blocks} blocks")
        name, network = (
            f"{kind}{depths[0]}",
            imagenet(depths[0], classes=classes, shortcut=shortcut, stride_at=stride_at),
        )
    elif stem == (16, 3, 3, 3) and len(set(blocks)) == 1 and len(blocks) == 3:
        depth = 6 * blocks[0] + 2
        name, network = f"{kind}{depth}", cifar_network(depth, classes=classes, shortcut=shortcut)
    else:
        raise WeightsError(f"a first convolution of {tuple(stem)} and {blocks} blocks are no network of the paper")
    _load(name, network, state)
    return name, network.eval()


def _load(name: str, network: ResNet, state: dict[str, Tensor]) -> None:
    """Give a network its weights. Raises WeightsError, also for what PyTorch would cast or take without a word."""
    # How many batches the statistics are of is an integer, and not used.
    learned = [key for key, tensor in network.state_dict().items() if tensor.is_floating_point()]
    for key in learned:
        if key in state and not state[key].is_floating_point():
            raise WeightsError(f"{key} is {state[key].dtype}; weights must be floating point")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"these weights look like {name} but don't fit it: {reason}") from None
    loaded = network.state_dict()
    for key in learned:
        if not loaded[key].isfinite().all():
            raise WeightsError(f"{key} has values that are not finite; no picture can be classified with it")


def _from_file(path: Path, stride_at: Stride, unprojected: Unprojected, labels: tuple[str, ...] | None) -> Source:
    state = _state(path)
    if published := _published(hashlib.sha256(path.read_bytes()).hexdigest()):
        return _of_torchvision(published, state)
    try:
        name, network = network_of(state, stride_at, unprojected)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    classes = network.get_submodule("fc").get_parameter("weight").shape[0]
    dataset, seen, usual = _usual(network, classes)
    known = labels or (usual if classes == len(usual) else None)
    if known is None or len(known) != classes:
        found = "no names are given" if known is None else f"{len(known)} names are given"
        raise WeightsError(f"{path} has {classes} classes and {found}; name them, one a line: --labels FILE")
    # CIFAR's files calibrate what has CIFAR's names; anything else takes pictures.
    dataset = dataset if known == usual else "imagenet"
    return Source(name, network, seen, known, dataset, recipe={"weights": path.name, "stride_at": stride_at})


def _usual(network: ResNet, classes: int) -> tuple[str, Preprocessing, tuple[str, ...]]:
    """The data set that such a network is for, how it sees a picture, and the names of its classes."""
    if network.conv1.kernel_size == (7, 7):
        return "imagenet", IMAGENET, IMAGENET_LABELS
    dataset = "cifar100" if classes == 100 else "cifar10"
    return dataset, RECIPES[f"resnet20-{dataset}"].preprocessing, cifar.DATASETS[dataset].labels


def _published(sha256: str) -> WeightsEnum | None:
    """The weights that torchvision published as a file with this hash, of which its address has the beginning."""
    weights = (one for name in PUBLISHED for one in get_model_weights(name))
    return next((one for one in weights if sha256.startswith(Path(one.url).stem.rsplit("-", 1)[1])), None)


def _from_torchvision(text: str) -> Source:
    model, version = text.split(":")
    title = f"ResNet{model.removeprefix('resnet')}_Weights.{version}"
    try:
        weights: WeightsEnum = get_weight(title)
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"torchvision has no weights {text} ({error})") from None
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # noqa: BLE001  # of the network, of a damaged download, of a damaged file kept from before
        raise WeightsError(
            f"can't download {weights.url} ({_first_line(error)}); get the file where there is internet, and give its "
            "path instead"
        ) from None
    return _of_torchvision(weights, dict(state))


def _of_torchvision(weights: WeightsEnum, state: dict[str, Tensor]) -> Source:
    """With the preprocessing and the accuracy that torchvision published."""
    name, network = network_of(state)
    how = weights.transforms()
    published = Measured(
        dataset="ImageNet",
        split="val",
        protocol="center",
        images=50_000,
        top1_error=round(100 - weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], 4),
        measured_by="published by torchvision",
    )
    seen = Preprocessing(resize=how.resize_size[0], crop=how.crop_size[0], mean=tuple(how.mean), std=tuple(how.std))
    recipe = {"weights": f"{name}:{weights.name}"}
    return Source(name, network, seen, IMAGENET_LABELS, "imagenet", recipe=recipe, measured=(published,))


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: give a run's folder, a file, or a name like resnet50:IMAGENET1K_V2")
    state = _tensors(path)
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict; save model.state_dict()")
    plain = {PREFIXES.sub("", str(name)): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise WeightsError(
            f"{path} holds several networks, whose names differ only in what stands before them (model., module., "
            "_orig_mod.); save the state_dict() of one"
        )
    return plain


def _tensors(path: Path) -> Any:
    """What a file holds: tensors, containers of them, and the options that training scripts keep. Nothing is run."""
    content = path.read_bytes()  # here, since PyTorch raises OSError for damaged files, too
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # has only attributes; torchvision's scripts save it
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # a damaged file makes PyTorch raise almost anything
        other = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it has {other[1]}, too" if other else _first_line(error)
        raise WeightsError(
            f"{path} is no state dict of tensors alone, and nothing else is loaded ({reason}); save model.state_dict()"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0].split(". ")[0] or type(error).__name__


def _is_checkpoint(path: Path) -> bool:
    """Whether a file begins as our checkpoints do, be it cut off or not."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64)[8:].startswith(b'{"__metadata__":{"resnet_ensemble"')  # after the header's length


def _count(state: dict[str, Tensor], stage: int) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})


def _shortcut(state: dict[str, Tensor], unprojected: Unprojected) -> Shortcut:
    """Options B and C have projections; A and a plain network have none."""
    if not any("downsample" in name for name in state):
        return unprojected
    if unprojected == "plain":
        raise WeightsError("a plain network has no shortcuts, and these weights have projections")
    # Networks of basic blocks that begin with as many channels as they have need none in their first block.
    first = "layer1.0.downsample.0.weight" in state and "layer1.0.conv3.weight" not in state
    return "C" if first or "layer1.1.downsample.0.weight" in state else "B"


def _some(state: dict[str, Tensor]) -> str:
    names = list(state)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
