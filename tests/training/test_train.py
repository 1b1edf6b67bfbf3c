"""The loop on a small network and a small data set in CIFAR-10's shape."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_ensemble.training import checkpoint, cifar10, train
from resnet_ensemble.training.recipes import RECIPES, Recipe

TINY = replace(RECIPES["resnet20-cifar10"], name="tiny", depth=8, epochs=3, batch_size=16)


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 0 is dark and class 1 is bright, so that three epochs are enough to learn it."""

    def read(_root: Path, split: str) -> cifar10.Split:
        generator = np.random.default_rng(split == "train")
        labels = generator.integers(0, 2, 96 if split == "train" else 32)
        images = generator.integers(0, 90, (len(labels), 32, 32, 3)) + 160 * labels[:, None, None, None]
        return cifar10.Split(images.astype(np.uint8), labels)

    monkeypatch.setattr(cifar10, "read", read)


def run(folder: Path, recipe: Recipe = TINY) -> checkpoint.Checkpoint:
    return train.train(recipe, Path("unused"), folder)


def test_training_learns_and_logs_every_epoch(tmp_path: Path) -> None:
    result = run(tmp_path)

    assert result.finished
    assert result.history[-1].val_error == 0
    assert result.history[-1].train_loss < result.history[0].train_loss
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,learning_rate,train_loss")
    assert len(lines) == 4


def test_a_resumed_run_has_the_very_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    saves = 0
    original = checkpoint.save

    def save_then_die(path: Path, saved: checkpoint.Checkpoint) -> None:
        nonlocal saves
        original(path, saved)
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")

    resumed = run(tmp_path / "resumed")

    assert [epoch.train_loss for epoch in resumed.history] == [epoch.train_loss for epoch in whole.history]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    written = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns

    assert run(tmp_path).history == first.history
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == written


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, epochs=1))

    with pytest.raises(SystemExit, match="another recipe"):
        run(tmp_path, replace(TINY, epochs=1, weight_decay=0.1))


def test_a_diverged_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the loss became nan"):
        run(tmp_path, replace(TINY, peak_learning_rate=float("inf")))
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_weight_decay_is_only_on_convolution_and_linear_weights() -> None:
    model = train.cifar(8)

    decayed, others = train._optimizer(model, TINY).param_groups

    assert all(p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == TINY.weight_decay
    assert others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
