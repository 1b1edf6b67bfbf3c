from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from resnet_ensemble.training import checkpoint
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError, Epoch, Origin, Progress
from resnet_ensemble.training.recipes import RECIPES, Recipe, new_network

RECIPE = RECIPES["resnet20-cifar10"]
EPOCH = Epoch(1, 0.1, 2.0, 60.0, 55.0, 5000, 12.5)
NETWORK = new_network(RECIPE)
SAVED = Checkpoint(
    RECIPE,
    NETWORK.state_dict(),
    {name: torch.rand_like(parameter) for name, parameter in NETWORK.named_parameters()},
    (EPOCH,),
    trained=new_network(RECIPE).state_dict(),
    statistics=torch.rand(2, 2, 5),
    mean_image=torch.rand(32, 32, 3),
    labels=tuple("abcdefghij"),
    progress=Progress(3, 1.5, 7.0, 2.5, 0.5),
    origin=Origin("abc", "def", "2.14", "cpu", "bf16", 2),
    loss_scale={"scale": 65536.0},
)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.safetensors", SAVED)

    loaded = checkpoint.load(tmp_path / "c.safetensors")

    assert (loaded.recipe, loaded.history, loaded.finished) == (RECIPE, (EPOCH,), False)
    assert (loaded.labels, loaded.progress, loaded.origin) == (SAVED.labels, SAVED.progress, SAVED.origin)
    assert loaded.loss_scale == SAVED.loss_scale
    for part in ("weights", "momentum", "trained"):
        found, saved = getattr(loaded, part), getattr(SAVED, part)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert torch.equal(loaded.mean_image, SAVED.mean_image)
    assert torch.equal(loaded.statistics, SAVED.statistics)


def test_a_run_s_folder_means_its_last_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.safetensors", replace(SAVED, finished=True))

    assert checkpoint.load(tmp_path).finished


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"python training/train\.py"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_a_cut_off_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, SAVED)
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def rewrite(path: Path, header: str | None = None, **tensors: torch.Tensor | None) -> None:
    """A checkpoint whose header, or some of whose tensors, are others or none."""
    with safetensors.safe_open(path, framework="pt") as file:
        old = file.metadata()["resnet_ensemble"]
    kept = {
        name: tensor for name, tensor in (safetensors.torch.load_file(path) | tensors).items() if tensor is not None
    }
    safetensors.torch.save_file(kept, path, {"resnet_ensemble": old if header is None else header})


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{", "Expecting property name"),
        ("{}", "it has no 'format'"),
        ("[]", "list indices"),
        ('{"format": 1, "recipe": {"name": "x", "depth": 20}}', "it has no 'history'"),
        ('{"format": 1, "recipe": {"name": "x"}, "history": []}', "'depth'"),
        ('{"format": 1, "recipe": [], "history": []}', "no attribute 'keys'"),
        ('{"format": 1, "recipe": {"name": "x", "depth": 20}, "history": [{"epoch": 1}]}', "'learning_rate'"),
        ('{"format": 1, "recipe": {"name": "x", "depth": 20}, "history": [], "finished": true}', "has no epochs"),
        (
            '{"format": 1, "recipe": {"name": "x", "depth": 20}, "history": [], "labels": ["a"]}',
            "1 labels, .* 10 classes",
        ),
        (
            '{"format": 1, "recipe": {"name": "x", "depth": 32}, "history": []}',
            r"layer1\.3\..* is missing; of the network",
        ),
    ],
)
def test_a_header_that_is_not_of_the_file_is_called_damage(tmp_path: Path, header: str, reason: str) -> None:
    checkpoint.save(tmp_path / "c.safetensors", SAVED)
    rewrite(tmp_path / "c.safetensors", header)

    with pytest.raises(
        CheckpointError, match=rf"c\.safetensors is damaged \(.*{reason}.*\); restore it, or train again"
    ):
        checkpoint.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ["weights.fc.bias", "trained.bn1.running_var", "momentum.conv1.weight", "mean_image"])
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (None, "missing"),
        (torch.zeros(2, 3), r"torch\.float32 \(2, 3\)"),
        (torch.zeros(10, dtype=torch.int8), r"torch\.int8 \(10,\)"),
    ],
    ids=["missing", "of another shape", "of another kind"],
)
def test_tensors_that_are_not_those_of_the_recipe_are_called_damage(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    recipe = replace(RECIPE, per_pixel_mean=True)
    checkpoint.save(tmp_path / "c.safetensors", replace(SAVED, recipe=recipe))
    rewrite(tmp_path / "c.safetensors", **{name: tensor})

    with pytest.raises(CheckpointError, match=rf"is damaged \({name} is {reason}; of the network of its recipe"):
        checkpoint.load(tmp_path / "c.safetensors")


def test_a_state_dict_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "resnet18.pth")

    with pytest.raises(CheckpointError, match=r"is no checkpoint of training/train\.py: those end in \.safetensors"):
        checkpoint.load(tmp_path / "resnet18.pth")


def test_a_recipe_that_can_t_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    header = '{"format": 1, "recipe": {"name": "x", "depth": 21}, "history": []}'
    safetensors.torch.save_file({"weights.w": torch.zeros(2)}, path, {"resnet_ensemble": header})

    with pytest.raises(CheckpointError, match="recipe that this version refuses"):
        checkpoint.load(path)


def test_somebody_elses_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)

    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(path)


def test_a_checkpoint_older_than_a_recipe_s_field_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(
        {f"weights.{name}": tensor for name, tensor in NETWORK.state_dict().items()},
        path,
        {"resnet_ensemble": '{"format": 1, "recipe": {"name": "old", "depth": 20}, "history": []}'},
    )

    assert checkpoint.load(path).recipe == Recipe(name="old", depth=20)


def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"weights.w": torch.zeros(2)}, path, {"resnet_ensemble": '{"format": 2}'})

    with pytest.raises(CheckpointError, match="checkpoint format 2; this version reads 1"):
        checkpoint.load(path)


def test_a_recipe_with_other_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    header = '{"format": 1, "recipe": {"name": "x", "dropout": 0.5}, "history": []}'  # no network of ours has dropout
    safetensors.torch.save_file({"weights.w": torch.zeros(2)}, path, {"resnet_ensemble": header})

    with pytest.raises(CheckpointError, match="dropout"):
        checkpoint.load(path)
