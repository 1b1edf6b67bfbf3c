"""A run's folder: its checkpoints, and what shows how it goes, as log.csv, for TensorBoard and as a plot."""

import csv
import io
from dataclasses import asdict, replace
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from resnet_ensemble.training import checkpoint, plot
from resnet_ensemble.training.checkpoint import Checkpoint, Epoch
from resnet_ensemble.training.files import write_atomically


def write(folder: Path, saved: Checkpoint) -> None:
    """The last checkpoint; after an epoch the log too, and the best checkpoint if it is it."""
    if saved.history and not saved.progress.steps:
        last = saved.history[-1]
        _write_log(folder / "log.csv", saved.history)
        # One event file an epoch: what was written before a kill, and is trained again, is replaced.
        with SummaryWriter(str(folder / "tensorboard"), purge_step=last.epoch) as board:
            for name in ("learning_rate", "train_loss", "train_error", "val_error", "val_top5_error"):
                board.add_scalar(name, getattr(last, name), last.epoch)
        if last.val_error <= min(epoch.val_error for epoch in saved.history):
            checkpoint.save(folder / "best.safetensors", replace(saved, momentum={}, trained={}))
        if saved.finished:
            drawn = plot.draw([{saved.recipe.name: plot.read(folder / "log.csv")}])
            write_atomically(folder / "errors.png", drawn)
        print(
            f"{saved.recipe.name} epoch {last.epoch}: train {last.train_error:.2f} %, val {last.val_error:.2f} %",
            flush=True,
        )
    checkpoint.save(folder / "checkpoint.safetensors", saved)


def _write_log(path: Path, history: tuple[Epoch, ...]) -> None:
    """The history as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(history[0])), lineterminator="\n")
    writer.writeheader()
    for epoch in history:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in asdict(epoch).items()})
    write_atomically(path, text.getvalue().encode())
