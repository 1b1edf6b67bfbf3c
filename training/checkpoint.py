"""A checkpoint: weights, the recipe that made them, and what they scored, in one safetensors file.

The recipe, the progress and the history are JSON in the file's header, so one atomic rename replaces all of it and
nothing is ever unpickled.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from resnet_ensemble.training.files import write_atomically
from resnet_ensemble.training.recipes import Recipe

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


@dataclass(frozen=True)
class Checkpoint:
    """`weights`: the model's state dict. `momentum`: the optimizer's buffers by parameter name."""

    recipe: Recipe
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[Epoch, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the recipe's last epoch is done."""
        return len(self.history) >= self.recipe.epochs


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` atomically."""
    about = {
        "format": FORMAT,
        "recipe": asdict(checkpoint.recipe),
        "history": [asdict(epoch) for epoch in checkpoint.history],
    }
    tensors = {f"weights.{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {f"momentum.{name}": tensor for name, tensor in checkpoint.momentum.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(contiguous, metadata={"resnet_ensemble": json.dumps(about)}))


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; make one with: python training/train.py RECIPE --data DIR")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("resnet_ensemble")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if header is None:
        raise CheckpointError(f"{path} is a safetensors file but not a checkpoint of training/train.py")
    about = json.loads(header)
    if about["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {about['format']}; this version reads {FORMAT}")
    return Checkpoint(
        recipe=_recipe(about["recipe"], path),
        weights=_with_prefix(tensors, "weights."),
        momentum=_with_prefix(tensors, "momentum."),
        history=tuple(Epoch(**epoch) for epoch in about["history"]),
    )


def _recipe(values: dict[str, Any], path: Path) -> Recipe:
    """A field that is newer than the checkpoint has its default: what was done before there was a choice."""
    unknown = values.keys() - {f.name for f in fields(Recipe)}
    if unknown:
        raise CheckpointError(f"{path} was made by another version: its recipe has {', '.join(sorted(unknown))}")
    as_tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Recipe(**as_tuples)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
