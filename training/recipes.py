"""One frozen Recipe for each checkpoint that we can make: the paper's, and a short one for whoever has no week.

`python training/train.py --list` prints them with their cost and the error to expect.
"""

import ast
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from resnet_ensemble.training.model import (
    ResNet,
    Shortcut,
    Stride,
    cifar,
    cifar_blocks,
    imagenet,
    imagenet_blocks,
)
from resnet_ensemble.training.views import Preprocessing

Dataset = Literal["cifar10", "cifar100", "imagenet"]
Schedule = Literal["one-cycle", "staircase", "plateau"]
# pad: pad, then a random crop. scale: a random shorter side, then a random crop. area: torchvision's RandomResizedCrop.
# All three mirror half of the pictures.
Augmentation = Literal["pad", "scale", "area"]

# Lowest and highest value of numbers that have such.
LIMITS: dict[str, tuple[float, float]] = {
    "classes": (1, math.inf),
    "epochs": (0, math.inf),
    "iterations": (0, math.inf),
    "batch_size": (1, math.inf),
    "peak_learning_rate": (0, math.inf),
    "warm_up": (0, 1),
    "patience": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "label_smoothing": (0, 1),
    "ema_decay": (0, 1),
    "bn_images": (0, math.inf),
    "padding": (0, math.inf),
    "first_crop": (0, math.inf),
    "crop": (1, math.inf),
    "test_crop": (1, math.inf),
    "seed": (-(2**40), 2**40),  # times 100,003 and with the epoch, it must fit into 64 bits
}


class RecipeError(ValueError):
    """A recipe contradicts itself, or has no such field or no such value."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained. A checkpoint carries the recipe that made it.

    The defaults are the short CIFAR-10 recipe: the paper's data and augmentation under a one-cycle schedule with
    Nesterov momentum. ResNet-20 reached 9.20 % on the 5,000 validation images in 30 epochs with a weight decay of
    3e-4, and 7.84 % in 40 with 5e-4.
    """

    name: str
    dataset: Dataset = "cifar10"  # imagenet: any tree of folders, one a class
    depth: int
    classes: int = 10
    shortcut: Shortcut = "A"  # or "plain": the same network without shortcuts
    stride_at: Stride = "v1"
    seed: int = 0

    # How long: so many epochs or so many iterations; the other is 0.
    epochs: int = 40
    iterations: int = 0

    batch_size: int = 128  # of all processes together
    schedule: Schedule = "one-cycle"
    peak_learning_rate: float = 0.2
    warm_up: float = 0.15  # share of all steps
    drops: tuple[float, ...] = ()  # of a staircase, as shares of all steps
    patience: int = 0  # epochs without a new lowest error, after which one more is a plateau
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False  # batch norm and biases too, not only convolution and linear weights
    label_smoothing: float = 0.0
    ema_decay: float = 0.0  # of an exponential moving average of the weights, which is then what is evaluated
    bn_images: int = 0  # training images over which batch-norm statistics are estimated again at the end

    augmentation: Augmentation = "pad"
    padding: int = 4  # pixels on each side before a random crop of 32, as in the paper
    scale: tuple[int, int] = (256, 480)  # shorter side, lowest and highest
    pca_colour: bool = False  # AlexNet's colour augmentation
    first_crop: int = 0  # side of the training crops in the beginning; 0: the same as `crop`
    crop: int = 32
    # Per-channel mean and standard deviation of the training images, in units of 0 to 1.
    mean: tuple[float, float, float] = (0.49155, 0.48213, 0.44643)  # of CIFAR-10's 45,000
    std: tuple[float, float, float] = (0.24715, 0.24368, 0.26173)
    per_pixel_mean: bool = False  # subtract a mean image, as the paper did, instead of the mean colour

    # At test time: shorter side, then the centre.
    test_resize: int = 32
    test_crop: int = 32

    def __post_init__(self) -> None:
        for field, (lowest, highest) in LIMITS.items():
            value = getattr(self, field)
            if not lowest <= value <= highest:
                raise RecipeError(f"{self.name}: {field} must lie in {lowest:g} to {highest:g}, not {value}")
        try:
            (imagenet_blocks if self.dataset == "imagenet" else cifar_blocks)(self.depth)
            _ = self.preprocessing
        except ValueError as problem:
            raise RecipeError(f"{self.name}: {problem}") from None
        for wrong, message in self._contradictions():
            if wrong:
                raise RecipeError(f"{self.name}: {message}")

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        """What no recipe may be, and what to say of one that is."""
        return (
            (
                (self.epochs > 0) == (self.iterations > 0),
                f"of epochs {self.epochs} and iterations {self.iterations}, one must be 0",
            ),
            (
                self.schedule == "one-cycle" and not 0 < self.warm_up < 1,
                f"the warm-up of one-cycle is a share between 0 and 1, not {self.warm_up}",
            ),
            (
                (self.schedule == "staircase") != bool(self.drops),
                f"a staircase, and nothing else, has drops: {self.schedule}, {self.drops}",
            ),
            (
                not all(0 < drop < 1 for drop in self.drops),
                f"drops are shares of all steps, between 0 and 1, not {self.drops}",
            ),
            (
                (self.schedule == "plateau") != (self.patience > 0),
                f"a plateau, and nothing else, has patience: {self.schedule}",
            ),
            (self.nesterov and not self.momentum, "Nesterov's momentum can't be 0; set nesterov=False too"),
            (
                (self.augmentation == "pad") == (self.dataset == "imagenet"),
                f"{self.augmentation} is not an augmentation of {self.dataset}",
            ),
            (
                self.augmentation == "pad" and self.crop > 32 + 2 * self.padding,
                f"a crop of {self.crop} does not fit into 32 + 2 * {self.padding} pixels",
            ),
            (
                self.augmentation == "scale" and not self.crop <= self.scale[0] <= self.scale[1],
                f"a crop of {self.crop} needs a scale from there up, not {self.scale}",
            ),
            (
                self.augmentation != "area" and self.first_crop > 0,
                "only the augmentation `area` can have a first crop",
            ),
            (self.first_crop > self.crop, f"crops grow: the first, {self.first_crop}, can't exceed {self.crop}"),
            (
                self.per_pixel_mean and (self.first_crop > 0 or self.crop != self.test_crop),
                "a mean image has one size: crop, test crop and no first crop must agree",
            ),
            (
                self.dataset != "imagenet" and (self.test_resize, self.test_crop) != (32, 32),
                "pictures of CIFAR are tested as they are: test_resize and test_crop must be 32",
            ),
            (self.test_resize < self.test_crop, "the test crop must fit into the test resize"),
            (0 < self.bn_images < self.batch_size, f"bn_images must be 0, or at least a batch of {self.batch_size}"),
        )

    @property
    def network(self) -> str:
        """The network's name in paper.py: resnet20, plain56, resnet34b."""
        if self.shortcut == "plain":
            return f"plain{self.depth}"
        # On CIFAR, and for the bottlenecks of ImageNet, the paper has one option, and the name does not say it.
        unsaid = "A" if self.dataset != "imagenet" else "B" if self.depth >= 50 else ""
        return f"resnet{self.depth}{'' if self.shortcut == unsaid else self.shortcut.lower()}"

    @property
    def preprocessing(self) -> Preprocessing:
        """How the network wants to see a picture at test time; on CIFAR, with half of training's padding around it.

        Corner crops of the whole padding are the rarest views of training. A ResNet-20 of 30 epochs had a 10-crop error
        of 7.70, 7.66, 7.88 and 8.20 % on the 5,000 validation images with 1, 2, 3 and 4 pixels.
        """
        padding = self.padding // 2 if self.augmentation == "pad" else 0
        return Preprocessing(
            resize=self.test_resize, crop=self.test_crop, padding=padding, mean=self.mean, std=self.std
        )


def new_network(recipe: Recipe) -> ResNet:
    """The recipe's network, initialised but not trained."""
    if recipe.dataset == "imagenet":
        return imagenet(recipe.depth, classes=recipe.classes, shortcut=recipe.shortcut, stride_at=recipe.stride_at)
    return cifar(recipe.depth, classes=recipe.classes, shortcut=recipe.shortcut)


def changed(recipe: Recipe, assignments: list[str]) -> Recipe:
    """The recipe with fields replaced: ["epochs=2", "seed=1"]. Raises RecipeError.

    What follows from them is replaced too, unless it is given: the learning rate is proportional to the batch (arXiv
    1706.02677), and a number of epochs takes the place of a number of iterations.
    """
    kinds = get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in kinds:
            raise RecipeError(f"a recipe has no {name!r}; it has {', '.join(kinds)}")
        values[name] = _parse(name, text, kinds[name])
    follows: dict[str, Any] = {}
    if "batch_size" in values:
        follows["peak_learning_rate"] = recipe.peak_learning_rate * values["batch_size"] / recipe.batch_size
    if "epochs" in values:
        follows["iterations"] = 0
    if "iterations" in values:
        follows["epochs"] = 0
    return replace(recipe, **(follows | values))


def _parse(name: str, text: str, kind: Any) -> object:
    if kind is str:
        if not re.fullmatch(r"\w[\w.-]*", text):
            raise RecipeError(f"{name} becomes a folder's: letters, digits, _ . and -, not {text!r}")
        return text
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise RecipeError(f"{name} must be one of {', '.join(get_args(kind))}, not {text!r}")
        return text
    title = str(kind) if get_origin(kind) else kind.__name__
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        raise RecipeError(f"{name} must be written like a Python {title}, not {text!r}") from None
    try:
        return _as(value, kind)
    except (TypeError, ValueError):
        raise RecipeError(f"{name} must be {title}, not {text!r}") from None


def _as(value: object, kind: Any) -> object:
    """The value, if it is of this kind; whole numbers become floats. Raises TypeError, or ValueError for a length."""
    if get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = get_args(kind)
        each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_as(element, k) for element, k in zip(value, each, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


_CIFAR100: dict[str, Any] = {
    "classes": 100,
    "mean": (0.5071, 0.4866, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
}


def _cifar(depth: int, shortcut: Shortcut, dataset: Dataset, *, paper: bool) -> Recipe:
    values: dict[str, Any] = {"depth": depth, "shortcut": shortcut, "dataset": dataset}
    values |= _CIFAR100 if dataset == "cifar100" else {}
    if paper:  # section 4.2
        values |= {
            "epochs": 0,
            "iterations": 64_000,
            "schedule": "staircase",
            "peak_learning_rate": 0.1,
            "drops": (0.5, 0.75),  # 32k and 48k
            "warm_up": 400 / 64_000 if depth >= 110 else 0.0,  # the paper says so of 110, and nothing of 1202
            "nesterov": False,
            "weight_decay": 1e-4,
            "decay_all": True,
            "per_pixel_mean": True,
        }
    return _named(values, paper=paper)


def _imagenet(depth: int, shortcut: Shortcut, *, paper: bool) -> Recipe:
    values: dict[str, Any] = {
        "dataset": "imagenet",
        "depth": depth,
        "shortcut": shortcut,
        "classes": 1000,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "test_resize": 256,
        "test_crop": 224,
    }
    if paper:  # section 3.4
        values |= {
            "stride_at": "v1",
            "epochs": 0,
            "iterations": 600_000,
            "batch_size": 256,
            "schedule": "plateau",
            "peak_learning_rate": 0.1,
            "warm_up": 0.0,
            "patience": 5,
            "nesterov": False,
            "weight_decay": 1e-4,
            "decay_all": True,
            "bn_images": 51_200,
            "augmentation": "scale",
            "pca_colour": True,
            "crop": 224,
            "per_pixel_mean": True,
        }
    else:
        # After ffcv-imagenet's 40 epochs of ResNet-18 (rn18_configs/rn18_40_epochs.yaml): 0.5 at a batch of 1024, 160
        # then 192 pixels, label smoothing. Its ResNet-50 has 1.7 at 8 processes of 512, nearly the same for an image.
        # Tested at 224, which suits a network that was trained at 192 (arXiv 1906.06423).
        values |= {
            "stride_at": "v1.5",
            "epochs": 40,
            "batch_size": 1024,
            "peak_learning_rate": 0.5,
            "warm_up": 0.05,
            "weight_decay": 5e-5,
            "label_smoothing": 0.1,
            "ema_decay": 0.999,
            "augmentation": "area",
            "first_crop": 160,
            "crop": 192,
        }
    return _named(values, paper=paper)


def _named(values: dict[str, Any], *, paper: bool) -> Recipe:
    network = Recipe(name="", **values).network
    return Recipe(name=f"{network}-{values['dataset']}{'-paper' if paper else ''}", **values)


_IMAGENET_NETWORKS: tuple[tuple[int, Shortcut], ...] = (
    *((18, option) for option in ("plain", "A", "B")),
    *((34, option) for option in ("plain", "A", "B", "C")),
    *((depth, "B") for depth in (50, 101, 152)),
)
_CIFAR_NETWORKS: tuple[tuple[int, Shortcut], ...] = (
    *((depth, "A") for depth in (20, 32, 44, 56, 110, 1202)),
    *((depth, "plain") for depth in (20, 32, 44, 56, 110)),
)

RECIPES = {
    recipe.name: recipe
    for paper in (False, True)
    for recipe in (
        *(_cifar(depth, shortcut, "cifar10", paper=paper) for depth, shortcut in _CIFAR_NETWORKS),
        *(_cifar(depth, shortcut, "cifar100", paper=paper) for depth, shortcut in _CIFAR_NETWORKS if shortcut == "A"),
        *(_imagenet(depth, shortcut, paper=paper) for depth, shortcut in _IMAGENET_NETWORKS),
    )
}
