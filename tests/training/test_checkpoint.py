from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from resnet_ensemble.training import checkpoint
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError, Epoch, Origin, Progress
from resnet_ensemble.training.recipes import RECIPES, Recipe

RECIPE = RECIPES["resnet20-cifar10"]
EPOCH = Epoch(1, 0.1, 2.0, 60.0, 55.0, 5000, 12.5)
SAVED = Checkpoint(
    RECIPE,
    {"fc.weight": torch.eye(3)},
    {"fc.weight": torch.ones(3, 3)},
    (EPOCH,),
    trained={"fc.weight": torch.full((3, 3), 2.0)},
    statistics=torch.rand(2, 2, 5),
    mean_image=torch.rand(4, 4, 3),
    labels=("cat", "dog"),
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
    assert torch.equal(loaded.weights["fc.weight"], torch.eye(3))
    assert torch.equal(loaded.momentum["fc.weight"], torch.ones(3, 3))
    assert torch.equal(loaded.trained["fc.weight"], SAVED.trained["fc.weight"])
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
        {"weights.w": torch.zeros(2)},
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
