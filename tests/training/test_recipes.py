from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.training.listing import listing
from resnet_ensemble.training.recipes import RECIPES, Recipe, RecipeError, changed, new_network

CIFAR_PAPER = RECIPES["resnet110-cifar10-paper"]
IMAGENET_PAPER = RECIPES["resnet50-imagenet-paper"]


def test_every_network_of_the_paper_has_the_paper_s_recipe_and_a_short_one() -> None:
    networks = {"plain18", "resnet18a", "plain34", "resnet34a", "resnet34b", "resnet34c"}
    networks |= {f"resnet{depth}" for depth in (50, 101, 152)}
    cifar = {f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)} | {f"plain{d}" for d in (20, 32, 44, 56)}

    for ending in ("", "-paper"):
        assert {f"{network}-imagenet{ending}" for network in networks} <= RECIPES.keys()
        assert {f"{network}-cifar10{ending}" for network in cifar} <= RECIPES.keys()
        assert {f"resnet{depth}-cifar100{ending}" for depth in (20, 32, 44, 56, 110)} <= RECIPES.keys()


def test_names_are_unique_and_say_network_and_data() -> None:
    for name, recipe in RECIPES.items():
        assert name == recipe.name
        assert name.startswith(f"{recipe.network}-{recipe.dataset}")


def test_the_paper_s_cifar_recipe() -> None:
    r = CIFAR_PAPER
    assert (r.iterations, r.batch_size, r.peak_learning_rate) == (64_000, 128, 0.1)
    assert (r.weight_decay, r.momentum, r.nesterov, r.decay_all) == (1e-4, 0.9, False, True)
    assert [drop * r.iterations for drop in r.drops] == [32_000, 48_000]
    assert r.warm_up * r.iterations == 400
    assert RECIPES["resnet56-cifar10-paper"].warm_up == 0
    assert (r.padding, r.crop, r.per_pixel_mean) == (4, 32, True)


def test_the_paper_s_imagenet_recipe() -> None:
    r = IMAGENET_PAPER
    assert (r.iterations, r.batch_size, r.peak_learning_rate, r.weight_decay) == (600_000, 256, 0.1, 1e-4)
    assert (r.schedule, r.augmentation, r.scale, r.crop) == ("plateau", "scale", (256, 480), 224)
    assert (r.pca_colour, r.per_pixel_mean, r.stride_at, r.shortcut) == (True, True, "v1", "B")
    assert r.bn_images > 0


@pytest.mark.parametrize("name", ["resnet20-cifar100", "resnet34c-imagenet", "plain18-imagenet-paper"])
def test_a_recipe_makes_its_network(name: str) -> None:
    recipe = RECIPES[name]

    assert new_network(recipe).fc.out_features == recipe.classes == (100 if "cifar100" in name else 1000)


def test_fields_are_changed_by_name() -> None:
    recipe = changed(CIFAR_PAPER, ["epochs=2", "iterations=0", "peak_learning_rate=1", "drops=(0.1,)", "nesterov=True"])

    assert (recipe.epochs, recipe.iterations, recipe.drops, recipe.nesterov) == (2, 0, (0.1,), True)
    assert type(recipe.peak_learning_rate) is float
    assert changed(CIFAR_PAPER, ["shortcut=B"]).shortcut == "B"


def test_what_follows_from_a_change_is_changed_too_unless_it_is_given() -> None:
    smaller = changed(IMAGENET_PAPER, ["batch_size=64", "epochs=2"])
    given = changed(IMAGENET_PAPER, ["batch_size=64", "peak_learning_rate=0.2"])

    assert smaller.peak_learning_rate == pytest.approx(0.1 / 4)
    assert (smaller.epochs, smaller.iterations) == (2, 0)
    assert given.peak_learning_rate == 0.2
    assert (changed(RECIPES["resnet20-cifar10"], ["iterations=9"]).epochs) == 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=2", "a recipe has no 'epoch'; it has name, dataset"),
        ("epochs=two", "epochs must be written like a Python int"),
        ("epochs=2.5", "epochs must be int, not '2.5'"),
        ("nesterov=1", "nesterov must be bool"),
        ("schedule=cosine", "schedule must be one of one-cycle, staircase, plateau, not 'cosine'"),
        ("epochs=0", "epochs 0 and iterations 0, one must be 0"),
        ("drops=()", "a staircase, and nothing else, has drops"),
        ("patience=3", "a plateau, and nothing else, has patience"),
        ("augmentation=area", "area is not an augmentation of cifar10"),
        ("first_crop=16", "only the augmentation `area`"),
        ("test_crop=16", "a mean image has one size"),
        ("batch_size=0", "batch_size must lie in 1 to inf, not 0"),
        ("depth=21", "a CIFAR network has 6n \\+ 2 layers"),
        ("iterations=-5", "iterations must lie in 0 to inf, not -5"),
        ("momentum=2", "momentum must lie in 0 to 1"),
        ("weight_decay=-1", "weight_decay must lie in"),
        ("label_smoothing=nan", "label_smoothing must be written like a Python float"),
        ("drops=(32000, 48000)", "drops are shares of all steps"),
        ("drops=(0.5, 'x')", r"drops must be tuple\[float, \.\.\.\], not"),
        ("mean=(0.5,)", r"mean must be tuple\[float, float, float\], not '\(0.5,\)'"),
        ("mean=(125, 123, 114)", "mean .* must lie in 0 to 1"),
        ("std=(0, 0, 0)", "std .* above 0"),
        ("crop=64", r"a crop of 64 does not fit into 32 \+ 2 \* 4"),
        ("bn_images=100", "bn_images must be 0, or at least a batch of 128"),
        ("name=../other", "name becomes a folder's"),
        ("name=", "name becomes a folder's"),
    ],
)
def test_mistakes_are_named(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(CIFAR_PAPER, [assignment])


@pytest.mark.parametrize(
    ("recipe", "assignments", "message"),
    [
        ("resnet50-imagenet-paper", "scale=(200,300)", "a crop of 224 needs a scale from there up"),
        ("resnet50-imagenet", "depth=20", r"one of \[18, 34, 50, 101, 152\] layers, not 20"),
        ("resnet50-imagenet", "crop=128", "crops grow: the first, 160, can't exceed 128"),
        ("resnet50-imagenet", "test_crop=300", "a crop of 300 does not fit into 256"),
        ("resnet20-cifar10", "test_crop=24", "test_resize and test_crop must be 32"),
        ("resnet20-cifar10", "momentum=0", "set nesterov=False too"),
    ],
)
def test_what_can_t_be_is_refused(recipe: str, assignments: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(RECIPES[recipe], assignments.split())


@pytest.mark.parametrize(
    ("recipe", "shortcut", "network"),
    [
        ("resnet20-cifar10", "A", "resnet20"),
        ("resnet20-cifar10", "B", "resnet20b"),
        ("resnet34b-imagenet", "C", "resnet34c"),
        ("resnet50-imagenet", "B", "resnet50"),
        ("resnet50-imagenet", "C", "resnet50c"),
        ("resnet50-imagenet", "plain", "plain50"),
    ],
)
def test_a_network_that_is_not_the_paper_s_has_not_its_name(recipe: str, shortcut: str, network: str) -> None:
    assert changed(RECIPES[recipe], [f"shortcut={shortcut}"]).network == network


def test_a_one_cycle_without_warm_up_is_refused() -> None:
    with pytest.raises(RecipeError, match="warm-up of one-cycle"):
        replace(RECIPES["resnet20-cifar10"], warm_up=0.0)


@given(st.sampled_from(list(RECIPES.values())), st.integers(0, 10_000))
def test_what_is_written_as_an_assignment_is_read(recipe: Recipe, seed: int) -> None:
    written = [f"seed={seed}", f"mean={recipe.mean}", f"scale={recipe.scale}", f"schedule={recipe.schedule}"]

    assert changed(recipe, written) == replace(recipe, seed=seed)


def test_the_list_names_every_recipe_with_its_cost_and_error() -> None:
    lines = {line.split()[0]: line.split() for line in listing().splitlines()[1:]}

    assert list(lines) == list(RECIPES)
    assert lines["resnet20-cifar10"][1:7] == ["269,722", "40.6", "M", "14,040", "128", "0.4"]
    # 3.86e9 multiply-adds, two operations each, three passes, 256 x 600,000 pictures
    assert lines["resnet50-imagenet-paper"][1:] == (
        ["25,557,032", "3,858.0", "M", "600,000", "256", "3,555.5", "22.85", "(paper,", "Table", "3,", "10crop)"]
    )
    assert " ".join(lines["resnet101-imagenet"][7:]) == "not yet run"
