"""Train one recipe, from the start or from where it stopped.

    python training/train.py --list                              # every recipe with its cost
    python training/train.py resnet20-cifar10 --data DIR         # DIR holds cifar-10-batches-bin or -py
    python training/train.py resnet20-cifar10 --data DIR         # again: goes on after the last finished epoch

Writes RUNS/RECIPE/checkpoint.safetensors after every epoch and the log beside it. Every random choice of an epoch
follows from the recipe's seed and the epoch's number, so a run that was killed and resumed repeats what it would
have done. bf16 autocast and channels_last on a CPU too: on one Zen 5 core, with another run on the other, an epoch of
ResNet-20 took 95 s and one of ResNet-32 151 s (medians of training/results).
"""

import argparse
import csv
import io
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from resnet_ensemble.training import augment, checkpoint, cifar10
from resnet_ensemble.training.checkpoint import Checkpoint, Epoch
from resnet_ensemble.training.files import write_atomically
from resnet_ensemble.training.model import multiply_adds, parameter_count
from resnet_ensemble.training.recipes import RECIPES, Recipe, new_network
from resnet_ensemble.training.views import mean_colour

CROP = 32
# Table 6, single view.
PAPER_ERRORS = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97}
EVALUATION_BATCH = 500


def train(recipe: Recipe, data: Path, folder: Path) -> Checkpoint:
    """Run the recipe's epochs that `folder` has not seen yet. Returns the last checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, validation = cifar10.read(data, "train"), cifar10.read(data, "val")
    padded = augment.pad(torch.from_numpy(training.images), recipe.padding, mean_colour(recipe.mean))
    labels = torch.from_numpy(training.labels)

    torch.manual_seed(recipe.seed)
    model = new_network(recipe).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, recipe)
    path = folder / "checkpoint.safetensors"
    history: tuple[Epoch, ...] = ()
    if path.exists():
        history = _resume(path, recipe, model, optimizer)

    steps_an_epoch = len(labels) // recipe.batch_size
    steps = recipe.epochs * steps_an_epoch
    saved = Checkpoint(recipe, model.state_dict(), _momentum(model, optimizer), history)
    for epoch in range(len(history), recipe.epochs):
        began = time.monotonic()
        model.train()
        loss_sum, wrong, rate = torch.zeros((), device=device), torch.zeros((), device=device), 0.0
        batches = _batches(padded, labels, recipe, epoch)
        progress = tqdm(
            batches,
            f"{recipe.name} {epoch + 1}/{recipe.epochs}",
            steps_an_epoch,
            unit="batch",
            leave=False,
            disable=None,
        )
        for i, (images, target) in enumerate(progress):
            step = epoch * steps_an_epoch + i
            rate = augment.one_cycle(step, steps=steps, peak=recipe.peak_learning_rate, warm_up=recipe.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = rate
            target = target.to(device)
            with _bf16(device):
                logits = model(augment.normalise(images.to(device), recipe.mean, recipe.std))
                loss = F.cross_entropy(logits.float(), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach()
            wrong += (logits.argmax(1) != target).sum()
        loss_mean = float(loss_sum) / steps_an_epoch
        if not torch.isfinite(loss_sum):
            raise SystemExit(f"the loss became {loss_mean} in epoch {epoch + 1}; {path} keeps epoch {epoch}")
        history += (
            Epoch(
                epoch=epoch + 1,
                learning_rate=rate,
                train_loss=loss_mean,
                train_error=100 * float(wrong) / (steps_an_epoch * recipe.batch_size),
                val_error=error(model, validation, recipe, device),
                val_images=len(validation.labels),
                seconds=time.monotonic() - began,
            ),
        )
        saved = Checkpoint(recipe, model.state_dict(), _momentum(model, optimizer), history)
        checkpoint.save(path, saved)
        write_log(folder / "log.csv", history)
        print(
            f"{recipe.name} epoch {epoch + 1}: train {history[-1].train_error:.2f} %, val {history[-1].val_error:.2f} %"
        )
    return saved


@torch.inference_mode()
def error(model: nn.Module, split: cifar10.Split, recipe: Recipe, device: torch.device) -> float:
    """Single-view (center) error in %, in float32."""
    model.eval()
    wrong = 0
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        images = torch.from_numpy(split.images[start : start + EVALUATION_BATCH]).to(device)
        predicted = model(augment.normalise(images, recipe.mean, recipe.std)).argmax(1).cpu()
        wrong += int((predicted != torch.from_numpy(split.labels[start : start + EVALUATION_BATCH])).sum())
    return 100 * wrong / len(split.labels)


def write_log(path: Path, history: tuple[Epoch, ...]) -> None:
    """The history as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(history[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in asdict(epoch).items()} for epoch in history)
    write_atomically(path, text.getvalue().encode())


def _batches(padded: Tensor, labels: Tensor, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images uint8 (batch, 32, 32, 3) and labels, in an order of this epoch's own."""
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    order = torch.randperm(len(labels), generator=generator)
    for indices in order.split(recipe.batch_size):  # type: ignore[no-untyped-call]
        if len(indices) == recipe.batch_size:
            yield augment.random_crops(padded, indices, CROP, generator), labels[indices]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # batch norm and biases
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=True)


def _momentum(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if p in optimizer.state}


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.SGD) -> tuple[Epoch, ...]:
    saved = checkpoint.load(path)
    if saved.recipe != recipe:
        raise SystemExit(f"{path} was made by another recipe ({saved.recipe}); give another --out or delete it")
    model.load_state_dict(saved.weights)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = saved.momentum[name].to(parameter.device)
    return saved.history


def _bf16(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16)


def listing() -> str:
    """Every recipe with what it costs and the error that the paper reached with its network."""
    lines = [f"{'recipe':<18}{'parameters':>12}{'multiply-adds':>15}{'epochs':>8}{'paper, test error':>19}"]
    for recipe in RECIPES.values():
        made = new_network(recipe).eval()
        paper = f"{PAPER_ERRORS[recipe.depth]:.2f} %" if recipe.shortcut == "A" else "not in a table"
        cost = f"{parameter_count(made):>12,}{multiply_adds(made, CROP) / 1e6:>13.1f} M"
        lines.append(f"{recipe.name:<18}{cost}{recipe.epochs:>8}{paper:>19}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--list", action="store_true", help="print every recipe with its cost, and stop")
    parser.add_argument("--data", type=Path, help="the folder with the official CIFAR-10 files")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="checkpoints go to OUT/RECIPE (default: runs)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    arguments = parser.parse_args()
    if arguments.list:
        print(listing())
        return
    if not arguments.recipe or not arguments.data:
        parser.error("give a RECIPE and --data DIR, or --list")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]
    try:
        result = train(recipe, arguments.data, arguments.out / recipe.name)
    except (cifar10.DataError, checkpoint.CheckpointError) as problem:
        raise SystemExit(str(problem)) from None
    print(f"{recipe.name}: {result.history[-1].val_error:.2f} % on {result.history[-1].val_images} validation images")


if __name__ == "__main__":
    main()
