"""The loop on a small network and a small data set in CIFAR-10's shape."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_ensemble.training import checkpoint, cifar10, train
from resnet_ensemble.training.recipes import RECIPES, Recipe, new_network

TINY = replace(RECIPES["resnet20-cifar10"], name="tiny", depth=8, epochs=3, batch_size=16)


def small_split(_root: Path, split: str) -> cifar10.Split:
    """Class 0 is dark and class 1 is bright, so that three epochs are enough to learn it."""
    generator = np.random.default_rng(split == "train")
    labels = generator.integers(0, 2, 96 if split == "train" else 32)
    images = generator.integers(0, 90, (len(labels), 32, 32, 3)) + 160 * labels[:, None, None, None]
    return cifar10.Split(images.astype(np.uint8), labels)


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "read", small_split)


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
    model = new_network(TINY)

    decayed, others = train._optimizer(model, TINY).param_groups

    assert all(p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == TINY.weight_decay
    assert others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_list_names_every_recipe_with_its_cost() -> None:
    lines = train.listing().splitlines()[1:]

    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert lines[0].split() == ["resnet20-cifar10", "269,722", "40.6", "M", "40", "8.75", "%"]


def test_a_plain_recipe_trains_the_network_without_shortcuts(tmp_path: Path) -> None:
    result = run(tmp_path, replace(TINY, shortcut="plain", epochs=1))

    assert new_network(result.recipe).layer1[0].downsample is None
    assert result.weights.keys() == new_network(TINY).state_dict().keys()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.training.test_train import TINY, small_split
from resnet_ensemble.training import augment, cifar10, train
cifar10.read = small_split
crops, calls = augment.random_crops, 0
def dying(*arguments):
    global calls
    calls += 1
    if calls == 9:  # six steps an epoch: in the middle of the second
        os.kill(os.getpid(), signal.SIGKILL)
    return crops(*arguments)
augment.random_crops = dying
train.train(TINY, Path("unused"), Path(sys.argv[2]))
"""


def test_after_kill_9_in_the_middle_of_an_epoch_the_weights_end_bit_identical(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "killed")]
    killed = subprocess.run(command, check=False, capture_output=True)

    resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
