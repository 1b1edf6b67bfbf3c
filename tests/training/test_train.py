"""The loop on a small network and small data sets."""

import errno
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_ensemble.training import checkpoint, cifar, record, train
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError
from resnet_ensemble.training.data import Batch, DataError
from resnet_ensemble.training.processes import Group
from resnet_ensemble.training.recipes import RECIPES, Recipe, new_network
from resnet_ensemble.training.train import Options
from tests.training.small import VALIDATION, cifar_of_two, write_folders

TINY = replace(RECIPES["resnet20-cifar10"], name="tiny", depth=8, epochs=3, batch_size=16)
# Everything that the short recipes leave out.
RICH = replace(
    TINY,
    schedule="staircase",
    peak_learning_rate=0.1,
    drops=(0.5, 0.75),
    decay_all=True,
    nesterov=False,
    label_smoothing=0.1,
    ema_decay=0.9,
    bn_images=64,
    pca_colour=True,
    per_pixel_mean=True,
)
# The first steps only: after them, rounding grows as it does in every training.
FEW_STEPS = replace(TINY, epochs=0, iterations=4, peak_learning_rate=0.02)
FOLDERS = replace(
    RECIPES["resnet18b-imagenet"],
    classes=3, epochs=3, batch_size=8, peak_learning_rate=0.05, first_crop=32, crop=64, test_crop=64, test_resize=72,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_cifar")


def run(folder: Path, recipe: Recipe = TINY, data: Path = Path("unused"), options: Options | None = None) -> Checkpoint:
    return train.train(recipe, data, folder, options or Options(workers=0))


def same(first: Checkpoint, second: Checkpoint) -> bool:
    return all(torch.equal(first.weights[name], weight) for name, weight in second.weights.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"), train=8, val=3, size=(90, 80))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Callable[[Recipe], Checkpoint]:
    """What a recipe ends with if nothing interrupts it: trained by the first test that asks."""
    return functools.cache(lambda recipe: run(tmp_path_factory.mktemp("whole"), recipe, folders))


def test_training_learns_and_logs_every_epoch(tmp_path: Path) -> None:
    result = run(tmp_path)

    assert result.finished
    assert (result.history[-1].val_error, result.history[-1].val_images) == (0, VALIDATION)
    assert result.history[-1].train_loss < result.history[0].train_loss
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,learning_rate,train_loss")
    assert len(lines) == 4
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_says_what_made_it(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, epochs=1), options=Options(workers=0, precision="fp32"))

    saved = checkpoint.load(tmp_path)

    assert saved.labels == cifar.CIFAR10.labels
    assert (saved.origin.torch, saved.origin.precision, saved.origin.processes) == (torch.__version__, "fp32", 1)
    assert len(saved.origin.data) == 64


@pytest.mark.parametrize("recipe", [TINY, RICH, FOLDERS], ids=["short", "rich", "folders"])
def test_a_run_that_died_after_an_epoch_ends_with_the_very_weights_of_an_uninterrupted_one(
    tmp_path: Path, recipe: Recipe, folders: Path, whole: Callable[[Recipe], Checkpoint]
) -> None:
    original, saves = record.write, 0

    def write_then_die(folder: Path, saved: Checkpoint) -> None:
        nonlocal saves
        original(folder, saved)
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "write", write_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed", recipe, folders)

    resumed = run(tmp_path / "resumed", recipe, folders)

    expected = whole(recipe)
    assert [epoch.train_loss for epoch in resumed.history] == [epoch.train_loss for epoch in expected.history]
    assert same(resumed, expected)


@pytest.mark.parametrize("recipe", [TINY, RICH, FOLDERS], ids=["short", "rich", "folders"])
def test_sigterm_saves_in_the_middle_of_an_epoch_and_the_run_goes_on_from_there(
    tmp_path: Path,
    recipe: Recipe,
    folders: Path,
    whole: Callable[[Recipe], Checkpoint],
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = train.step, 0
    an_epoch = 24 // 8 if recipe is FOLDERS else 96 // 16

    def step_then_sigterm(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == an_epoch + 2:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step", step_then_sigterm)
        with pytest.raises(train.Stopped) as stopped:
            run(tmp_path / "resumed", recipe, folders)
    saved = checkpoint.load(tmp_path / "resumed")
    resumed = run(tmp_path / "resumed", recipe, folders)

    printed = capsys.readouterr().out
    expected = whole(recipe)

    assert stopped.value.code == 143
    assert "saved after step 2 of epoch 2" in printed
    assert (len(saved.history), saved.progress.steps, saved.finished) == (1, 2, False)
    assert [e.train_loss for e in resumed.history] == pytest.approx([e.train_loss for e in expected.history])
    assert [e.train_error for e in resumed.history] == [e.train_error for e in expected.history]
    assert same(resumed, expected)


@pytest.mark.parametrize("recipe", [TINY, RICH], ids=["short", "rich"])
def test_an_epoch_whose_evaluation_fails_is_not_trained_again(
    tmp_path: Path, recipe: Recipe, whole: Callable[[Recipe], Checkpoint]
) -> None:
    """The last epoch, before whose evaluation a recipe's statistics are estimated again."""
    original, evaluations = train.evaluate, 0

    def evaluate_then_fail(*arguments: object) -> train.Errors:
        nonlocal evaluations
        evaluations += 1
        if evaluations == recipe.epochs:
            raise DataError("damaged.JPEG can't be decoded")
        return original(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate_then_fail)
        with pytest.raises(DataError, match=r"damaged\.JPEG"):
            run(tmp_path, recipe)
    saved = checkpoint.load(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(train, "step")
        resumed = run(tmp_path, recipe)

    expected = whole(recipe)
    assert (len(saved.history), saved.progress.steps, saved.finished) == (2, 96 // 16, False)
    assert [e.learning_rate for e in resumed.history] == [e.learning_rate for e in expected.history]
    assert [e.train_error for e in resumed.history] == [e.train_error for e in expected.history]
    assert same(resumed, expected)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    written = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns

    assert run(tmp_path).history == first.history
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == written


def test_a_recipe_of_iterations_stops_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    result = run(tmp_path, replace(TINY, epochs=0, iterations=8))

    assert [epoch.epoch for epoch in result.history] == [1, 2]
    assert result.history[1].learning_rate == pytest.approx(
        train.learning_rate(result.recipe, step=7, steps=8, history=())
    )


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([30.0, 20.0, 40.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: train.Errors(next(errors), 0.0, VALIDATION))

    run(tmp_path)

    best, last = (checkpoint.load(tmp_path / f"{name}.safetensors") for name in ("best", "checkpoint"))
    assert [best.history[-1].val_error, last.history[-1].val_error] == [20, 40]
    assert not same(best, last)


def test_the_best_checkpoint_says_when_its_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([20.0, 30.0, 40.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: train.Errors(next(errors), 0.0, VALIDATION))
    said: list[bool] = []
    written = record.write

    def write_and_look(folder: Path, saved: Checkpoint) -> None:
        written(folder, saved)
        if not saved.progress.steps:  # an epoch has ended
            said.append(checkpoint.load(folder / "best.safetensors").finished)

    monkeypatch.setattr(record, "write", write_and_look)
    run(tmp_path)
    best = checkpoint.load(tmp_path / "best.safetensors")

    assert said == [False] * 3
    assert (best.finished, len(best.history)) == (True, 1)

    checkpoint.save(
        tmp_path / "best.safetensors", replace(best, finished=False)
    )  # as of a run that was killed just then
    run(tmp_path)
    assert checkpoint.load(tmp_path / "best.safetensors").finished

    (tmp_path / "best.safetensors").unlink()
    assert run(tmp_path).finished


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, epochs=1))

    with pytest.raises(CheckpointError, match="another recipe"):
        run(tmp_path, replace(TINY, epochs=1, weight_decay=0.1))


def test_other_data_in_the_same_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, replace(TINY, epochs=1))
    monkeypatch.setattr(
        cifar, "read", lambda *a: replace(cifar_of_two(*a), labels=cifar_of_two(*a).labels[::-1].copy())
    )

    with pytest.raises(CheckpointError, match="other data"):
        run(tmp_path, replace(TINY, epochs=1))


@pytest.mark.parametrize("peak", [float("inf"), 1e6], ids=["infinite", "far too high"])
def test_a_diverged_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path, peak: float) -> None:
    with pytest.raises(train.Stopped, match="the loss became"):
        run(tmp_path, replace(TINY, peak_learning_rate=peak))
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_last_step_that_ruins_the_weights_does_not_replace_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss before it is fine, and no step of the epoch shows another."""
    monkeypatch.setattr(train, "learning_rate", lambda _recipe, step, *_: math.inf if step == 11 else 0.01)

    with pytest.raises(train.Stopped, match="weights not finite, in step 6 of epoch 2"):
        run(tmp_path)
    assert len(checkpoint.load(tmp_path).history) == 1


def test_weight_decay_is_only_on_convolution_and_linear_weights_unless_the_recipe_says_all() -> None:
    model = new_network(TINY)

    decayed, others = train.sgd(model, TINY).param_groups

    assert all(p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == TINY.weight_decay
    assert others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert train.sgd(model, RICH).param_groups[1]["weight_decay"] == RICH.weight_decay


def test_a_plain_recipe_trains_the_network_without_shortcuts(tmp_path: Path) -> None:
    result = run(tmp_path, replace(TINY, shortcut="plain", epochs=1))

    assert new_network(result.recipe).layer1[0].downsample is None
    assert result.weights.keys() == new_network(TINY).state_dict().keys()


def test_a_plateau_s_rate_follows_from_the_validation_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "evaluate", lambda *_: train.Errors(50.0, 0.0, VALIDATION))
    recipe = replace(TINY, schedule="plateau", patience=1, peak_learning_rate=0.1, epochs=5)

    rates = [epoch.learning_rate for epoch in run(tmp_path, recipe).history]

    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_train_too(tmp_path: Path, precision: train.Precision) -> None:
    result = run(tmp_path, options=Options(workers=0, precision=precision))

    assert result.history[-1].val_error == 0
    assert bool(result.loss_scale) == (precision == "fp16")
    assert result.weights["fc.weight"].dtype == torch.float32


def test_an_average_of_the_weights_is_what_is_evaluated_and_training_goes_on_with_the_others(tmp_path: Path) -> None:
    result = run(tmp_path, replace(TINY, ema_decay=0.9))

    assert result.trained.keys() == result.weights.keys()
    assert not torch.equal(result.trained["fc.weight"], result.weights["fc.weight"])


def test_estimating_statistics_again_changes_only_them(tmp_path: Path) -> None:
    with_, without = (run(tmp_path / str(n), replace(TINY, epochs=1, bn_images=n)) for n in (96, 0))

    changed = {name for name in with_.weights if not torch.equal(with_.weights[name], without.weights[name])}
    assert "bn1.running_mean" in changed
    assert all("running" in name or "num_batches" in name for name in changed)


def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def test_a_batch_in_parts_has_the_gradients_of_the_whole_batch() -> None:
    data = cifar_of_two(Path(), "train")
    batch = Batch(torch.from_numpy(data.images[:16]), (torch.zeros(3),), torch.from_numpy(data.labels[:16]))
    found = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        network = new_network(TINY).eval()  # so that batch norm doesn't depend on the parts
        options = Options(precision="fp32", accumulate=accumulate)
        sums = torch.zeros(3)
        train.step(network, batch, TINY, torch.amp.GradScaler("cpu", enabled=False), options, sums)
        found.append([*gradients(network), sums])

    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_batch_that_can_t_be_cut_into_equal_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="equal parts"):
        run(tmp_path, options=Options(accumulate=3))


@pytest.mark.parametrize(
    ("device", "accumulate", "mode"), [("cuda", 1, "reduce-overhead"), ("cuda", 2, None), ("cpu", 1, None)]
)
def test_cuda_graphs_are_made_only_where_gradients_are_not_added_up(
    monkeypatch: pytest.MonkeyPatch, device: str, accumulate: int, mode: str | None
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, *, mode: (network, mode))
    network = torch.nn.Linear(1, 1)
    options = Options(accumulate=accumulate, compile=True)

    assert train._wrap(network, Group(0, 1, torch.device(device)), options) == (network, mode)


def test_a_network_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Captured by the real compiler; its default backend needs a C compiler, which a test must not.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    result = run(tmp_path, replace(TINY, epochs=1), options=Options(workers=0, compile=True))

    assert result.weights.keys() == new_network(TINY).state_dict().keys()


@pytest.mark.parametrize(
    ("gpu", "computes", "precision"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_bf16_is_the_default_only_where_the_machine_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, computes: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: computes)

    assert train.fast_precision() == precision


def test_the_short_imagenet_recipe_learns_a_small_tree(tmp_path: Path, folders: Path) -> None:
    """As its error while training says: that of nine validation pictures, after so few steps, is up to rounding."""
    result = run(tmp_path, replace(FOLDERS, epochs=8), folders)

    assert result.history[-1].train_error <= 100 / 3
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.history[-1].val_images == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50-imagenet", "--data", "none"], "no train/ in none"),
        (["resnet20-cifar10", "--data", "none", "--set", "epoch=2"], "a recipe has no 'epoch'"),
        (["resnet20-cifar10", "--data", "none", "--set", "epoch=2", "--set", "seed=1"], "a recipe has no 'epoch'"),
        (["resnet20-cifar10", "--data", "none", "--set", "depth=21"], "resnet20-cifar10: a CIFAR network has 6n + 2"),
    ],
)
def test_mistakes_on_the_command_line_are_answered_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])

    with pytest.raises(SystemExit) as stopped:
        train.main()

    printed = stopped.value.code  # a text: Python prints it to stderr and exits with 1
    assert isinstance(printed, str)
    assert printed.startswith(message)
    assert len(printed.splitlines()) == 1
    assert capsys.readouterr().err == ""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | int | None]:
    """Train the tiny recipe as the command does, into `runs`. Returns what it exits with: a text means 1."""
    monkeypatch.setattr(train, "RECIPES", {"tiny": TINY})
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--data", "unused", "--out", str(tmp_path / "runs")])

    def train_and_exit() -> str | int | None:
        with pytest.raises(SystemExit) as stopped:
            train.main()
        return stopped.value.code

    return train_and_exit


def test_a_folder_that_can_t_be_written_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[], str | int | None]
) -> None:
    (tmp_path / "runs").touch()
    monkeypatch.delattr(train, "step")

    said = command()

    assert isinstance(said, str)
    assert "Not a directory: " in said
    assert said.endswith(
        "runs/tiny/checkpoint.safetensors'; run it again when this is solved: it goes on from what was saved"
    )


def test_a_full_disk_is_told_in_one_line_and_the_log_is_not_ahead_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[], str | int | None]
) -> None:
    flush, flushed = os.fsync, 0

    def fill_up(handle: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == 6:  # three files an epoch: the checkpoint of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(train, "evaluate", lambda *_: train.Errors(20.0, 0.0, VALIDATION))  # each epoch is the best
    monkeypatch.setattr(os, "fsync", fill_up)
    said = command()

    folder = tmp_path / "runs" / "tiny"
    assert isinstance(said, str)
    assert said.startswith("[Errno 28] No space left on device: ")
    assert len(said.splitlines()) == 1
    assert len(checkpoint.load(folder).history) == len(checkpoint.load(folder / "best.safetensors").history) == 1
    assert len((folder / "log.csv").read_text().splitlines()) == 2
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert run(folder).finished


def test_ctrl_c_ends_it_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Callable[[], str | int | None]
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):  # Python handles it between two steps of this thread, not within the call
            time.sleep(0.01)

    monkeypatch.setattr(train, "step", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have their background jobs ignore it
    try:
        assert command() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")
