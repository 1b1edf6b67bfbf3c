"""A run's folder: its checkpoints, and what shows how it goes, as log.csv, for TensorBoard and as a plot."""

import csv
import io
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from resnet_ensemble.training import checkpoint, plot
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError, Epoch
from resnet_ensemble.training.files import write_together


def write(folder: Path, saved: Checkpoint) -> None:
    """The last checkpoint; after an epoch the log too, and the best checkpoint if it is it; in the end a plot.

    If the disk is full, none of them is replaced: a log that is ahead would tell of what is then trained again.
    """
    files: dict[Path, bytes] = {}
    epoch_ended = saved.history and not saved.progress.steps
    if epoch_ended:
        files[folder / "log.csv"] = _log(saved.history)
        if saved.history[-1].val_error <= min(epoch.val_error for epoch in saved.history):
            best = replace(saved, momentum={}, trained={})
            files[folder / "best.safetensors"] = checkpoint.to_bytes(best)
        if saved.finished:
            columns = ("epoch", "train_error", "val_error")
            log = {name: [float(getattr(epoch, name)) for epoch in saved.history] for name in columns}
            files[folder / "errors.png"] = plot.draw([{saved.recipe.name: log}])
    files[folder / "checkpoint.safetensors"] = checkpoint.to_bytes(saved)
    write_together(files)
    if epoch_ended:
        last = saved.history[-1]
        # One event file an epoch: what is there of a run that was begun anew is replaced.
        with SummaryWriter(str(folder / "tensorboard"), purge_step=last.epoch) as board:
            for name in ("learning_rate", "train_loss", "train_error", "val_error", "val_top5_error"):
                board.add_scalar(name, getattr(last, name), last.epoch)
        print(
            f"{saved.recipe.name} epoch {last.epoch}: train {last.train_error:.2f} %, val {last.val_error:.2f} %",
            flush=True,
        )


def finish(folder: Path) -> None:
    """Let the best checkpoint say, too, that its run has come to its end, if it does not yet."""
    with suppress(CheckpointError):  # it was removed, or damaged, as whoever reads it is told
        best = checkpoint.load(folder / "best.safetensors")
        if not best.finished:
            checkpoint.save(folder / "best.safetensors", replace(best, finished=True))


def _log(history: tuple[Epoch, ...]) -> bytes:
    """The history as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(history[0])), lineterminator="\n")
    writer.writeheader()
    for epoch in history:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in asdict(epoch).items()})
    return text.getvalue().encode()
