"""A checkpoint: weights, the recipe that made them, and what they scored, in one safetensors file.

The recipe, the progress and the history are JSON in the file's header, so one atomic rename replaces all of it and
nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from resnet_ensemble.training.files import write_atomically
from resnet_ensemble.training.recipes import Recipe, RecipeError, new_network

FORMAT = 1


class CheckpointError(Exception):
    """The file is missing, damaged, or not a checkpoint of ours."""


@dataclass(frozen=True)
class Epoch:
    """One line of the training log. Errors in %."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_error: float
    val_error: float
    val_images: int
    seconds: float
    val_top5_error: float | None = None
    waited: float | None = None  # seconds of these in which the loop waited for the loader


@dataclass(frozen=True)
class Progress:
    """How far a run is in its current epoch, and what the log's next line has added up to so far."""

    steps: int = 0  # of the epoch
    loss_sum: float = 0.0
    wrong: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True)
class Origin:
    """What made a checkpoint, beside its recipe."""

    code: str = ""  # revision
    data: str = ""  # SHA-256
    torch: str = ""
    device: str = ""
    precision: str = ""
    processes: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network and where its training stands.

    - weights: the state dict that is evaluated and exported; an average, if the recipe keeps one
    - momentum: the optimizer's buffers by parameter name
    - trained: the state dict that training goes on with, if `weights` is an average of such
    - statistics: in the middle of an epoch of several processes, batch norm's of each: (2, processes, n), first of the
      network, then of what is evaluated
    - mean_image: float (h, w, 3) in 0 to 1, if the recipe subtracts one
    - loss_scale: of fp16
    - finished: whether its run has come to its end, which a best checkpoint need not be of
    """

    recipe: Recipe
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[Epoch, ...] = ()
    trained: dict[str, Tensor] = field(default_factory=dict)
    statistics: Tensor | None = None
    mean_image: Tensor | None = None
    labels: tuple[str, ...] = ()
    progress: Progress = Progress()
    origin: Origin = Origin()
    loss_scale: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` atomically."""
    write_atomically(path, to_bytes(checkpoint))


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """What `load` reads."""
    about = {
        "format": FORMAT,
        "recipe": asdict(checkpoint.recipe),
        "history": [asdict(epoch) for epoch in checkpoint.history],
        "labels": checkpoint.labels,
        "progress": asdict(checkpoint.progress),
        "origin": asdict(checkpoint.origin),
        "loss_scale": checkpoint.loss_scale,
        "finished": checkpoint.finished,
    }
    tensors = {f"weights.{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {f"momentum.{name}": tensor for name, tensor in checkpoint.momentum.items()}
    tensors |= {f"trained.{name}": tensor for name, tensor in checkpoint.trained.items()}
    single = {"mean_image": checkpoint.mean_image, "statistics": checkpoint.statistics}
    tensors |= {name: tensor for name, tensor in single.items() if tensor is not None}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={"resnet_ensemble": json.dumps(about)})


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint: a file, or the folder of a run, which means its last one. Raises CheckpointError."""
    if path.is_dir():
        path /= "checkpoint.safetensors"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; make one with: python training/train.py RECIPE --data DIR")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no checkpoint of training/train.py: those end in .safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("resnet_ensemble")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if header is None:
        raise CheckpointError(f"{path} is a safetensors file but not a checkpoint of training/train.py")
    try:
        found = _parse(header, tensors, path)
        _check(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # for whatever the header says instead
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} is damaged ({reason}); restore it, or train again") from None
    return found


def _parse(header: str, tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    about = json.loads(header)
    if about["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {about['format']}; this version reads {FORMAT}")
    recipe = _recipe(about["recipe"], path)
    history = tuple(Epoch(**epoch) for epoch in about["history"])
    return Checkpoint(
        recipe=recipe,
        weights=_with_prefix(tensors, "weights."),
        momentum=_with_prefix(tensors, "momentum."),
        history=history,
        trained=_with_prefix(tensors, "trained."),
        statistics=tensors.get("statistics"),
        mean_image=tensors.get("mean_image"),
        labels=tuple(about.get("labels", ())),
        progress=Progress(**about.get("progress", {})),
        origin=Origin(**about.get("origin", {})),
        loss_scale=about.get("loss_scale", {}),
        finished=about.get("finished", len(history) >= recipe.epochs),
    )


def _check(found: Checkpoint) -> None:
    """Raises ValueError if the parts don't belong together."""
    recipe = found.recipe
    if found.finished and not found.history:
        raise ValueError("it is finished, and has no epochs")
    if found.labels and len(found.labels) != recipe.classes:
        raise ValueError(f"it has {len(found.labels)} labels, and its recipe {recipe.classes} classes")
    with torch.device("meta"):  # names and shapes, at no cost
        network = new_network(recipe)
        image = torch.empty(recipe.test_crop, recipe.test_crop, 3)
    _compare("weights.", found.weights, network.state_dict())
    if found.trained:
        _compare("trained.", found.trained, network.state_dict())
    if found.momentum:
        _compare("momentum.", found.momentum, dict(network.named_parameters()))
    if recipe.per_pixel_mean or found.mean_image is not None:
        mean_image = {} if found.mean_image is None else {"mean_image": found.mean_image}
        _compare("", mean_image, {"mean_image": image})


def _compare(prefix: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        is_, should_be = (_kind(tensors.get(name)) for tensors in (found, expected))
        if is_ != should_be:
            raise ValueError(f"{prefix}{name} is {is_}; of the network of its recipe it is {should_be}")


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _recipe(values: dict[str, Any], path: Path) -> Recipe:
    """A field that is newer than the checkpoint has its default: what was done before there was a choice."""
    unknown = values.keys() - {f.name for f in fields(Recipe)}
    if unknown:
        raise CheckpointError(f"{path} was made by another version: its recipe has {', '.join(sorted(unknown))}")
    as_tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return Recipe(**as_tuples)
    except RecipeError as problem:
        raise CheckpointError(f"{path} has a recipe that this version refuses: {problem}") from None


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
