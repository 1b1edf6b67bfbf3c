"""The recipes with what they cost and the error to expect, for `python training/train.py --list`."""

import functools
import math

import torch

from resnet_ensemble.training import paper, schedules
from resnet_ensemble.training.model import ResNet, Shortcut, Stride, cifar, imagenet, multiply_adds, parameter_count
from resnet_ensemble.training.recipes import RECIPES, Recipe

TRAINING_IMAGES = {"cifar10": 45_000, "cifar100": 45_000, "imagenet": 1_281_167}
# Forward, and backward for the activations and for the weights.
PASSES = 3

# What the short recipes reached; the rows of this project are the last lines of training/results.
REACHED = {
    "resnet20-cifar10": "7.84 (ours, val)",
    "resnet32-cifar10": "7.58 (ours, val)",
    "resnet44-cifar10": "7.06 (ours, val)",
    "resnet56-cifar10": "7.40 (ours, val)",
    "resnet18b-imagenet": "29.4 (ffcv-imagenet, flip)",
    "resnet50-imagenet": "22.8 (ffcv-imagenet, flip)",
}


def listing() -> str:
    """A table: parameters, multiply-adds for one picture, iterations, compute in PFLOP, and the top-1 error in %.

    The errors of the paper's recipes are the paper's (by its own, ResNet-20 reached 8.34 % here, of the validation
    images); ffcv-imagenet's are of recipes like ours, but with BlurPool and tested at 256 pixels. Nothing else has been
    run yet.
    """
    title = f"{'recipe':<27}{'parameters':>12}{'mult-adds':>12}{'batches':>9}{'of':>6}{'PFLOP':>13}  top-1 error in %"
    return "\n".join([title, *map(_line, RECIPES.values())])


def expected(recipe: Recipe) -> str:
    """The error that the paper, or whoever ran such a recipe, reached with it."""
    if not recipe.name.endswith("-paper"):
        return REACHED.get(recipe.name, "not yet run")
    protocol = "center" if recipe.dataset == "cifar10" else "10crop"
    row = paper.row(recipe.dataset, recipe.classes, recipe.network, protocol)
    return f"{row.top1:.2f} (paper, {row.source}, {protocol})" if row else "not in the paper's tables"


@functools.cache
def _network(folders: bool, depth: int, classes: int, shortcut: Shortcut, stride_at: Stride) -> ResNet:
    with torch.device("meta"):  # shapes only
        if folders:
            return imagenet(depth, classes=classes, shortcut=shortcut, stride_at=stride_at).eval()
        return cifar(depth, classes=classes, shortcut=shortcut).eval()


# The paper's recipe and the short one have the same network; of 1,202 layers, that takes seconds.
_cost = functools.cache(multiply_adds)


def _line(recipe: Recipe) -> str:
    folders = recipe.dataset == "imagenet"
    network = _network(folders, recipe.depth, recipe.classes, recipe.shortcut, recipe.stride_at)
    images = TRAINING_IMAGES[recipe.dataset]
    an_epoch = images // recipe.batch_size
    steps = recipe.iterations or recipe.epochs * an_epoch
    epochs = math.ceil(steps / an_epoch)
    first = recipe.first_crop or recipe.crop
    crops = [schedules.crop_size(epoch, epochs=epochs, first=first, last=recipe.crop) for epoch in range(epochs)]
    costs = {crop: _cost(network, crop) for crop in set(crops)}
    mean_cost = sum(costs[crop] for crop in crops) / epochs
    petaflop = 2 * PASSES * mean_cost * steps * recipe.batch_size / 1e15
    return (
        f"{recipe.name:<27}{parameter_count(network):>12,}{costs[recipe.crop] / 1e6:>10,.1f} M{steps:>9,}"
        f"{recipe.batch_size:>6}{petaflop:>13,.1f}  {expected(recipe)}"
    )
