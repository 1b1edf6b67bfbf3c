"""One frozen Recipe for each checkpoint that we can make."""

from dataclasses import dataclass

from resnet_ensemble.training.model import ResNet, Shortcut, cifar


@dataclass(frozen=True)
class Recipe:
    """How one network is trained. A checkpoint carries the recipe that made it."""

    name: str
    depth: int
    classes: int = 10
    shortcut: Shortcut = "A"  # or "plain": the same network without shortcuts
    epochs: int = 30
    batch_size: int = 128
    peak_learning_rate: float = 0.2
    warm_up: float = 0.15  # share of all steps
    momentum: float = 0.9
    weight_decay: float = 3e-4  # of convolution and linear weights only
    padding: int = 4  # pixels on each side before a random crop of 32, as in the paper
    # Per-channel mean and standard deviation of the 45,000 training images, in units of 0 to 1.
    mean: tuple[float, float, float] = (0.49155, 0.48213, 0.44643)
    std: tuple[float, float, float] = (0.24715, 0.24368, 0.26173)
    seed: int = 0


def new_network(recipe: Recipe) -> ResNet:
    """The recipe's network, initialised but not trained."""
    return cifar(recipe.depth, classes=recipe.classes, shortcut=recipe.shortcut)


def _short(depth: int, shortcut: Shortcut = "A") -> Recipe:
    """The paper's data and augmentation under a one-cycle schedule: 30 epochs instead of its 182.

    Linear warm-up and linear decay to zero with Nesterov momentum reach in 30 epochs what the paper's step schedule
    reaches in about a hundred; the weight decay is between the paper's 1e-4 and the usual 5e-4 because nets this
    small underfit in so few epochs.
    """
    kind = "plain" if shortcut == "plain" else "resnet"
    return Recipe(name=f"{kind}{depth}-cifar10", depth=depth, shortcut=shortcut)


RECIPES = {
    recipe.name: recipe
    for recipe in (*map(_short, (20, 32, 44, 56)), *(_short(depth, "plain") for depth in (20, 32, 44, 56)))
}
