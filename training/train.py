"""Train one recipe, from the start or from where it stopped.

    python training/train.py --list                              # every recipe with its cost and the error to expect
    python training/train.py resnet20-cifar10 --data DIR         # DIR has the official files, or --download them there
    python training/train.py resnet20-cifar10 --data DIR         # again: goes on where it stopped
    python training/train.py resnet50-imagenet --data DIR        # DIR has train/ and val/, one folder a class
    torchrun --nproc-per-node 8 training/train.py resnet50-imagenet --data DIR

Writes OUT/RECIPE/checkpoint.safetensors before and after each epoch's evaluation, best.safetensors (the lowest
validation error so far: a choice made on the validation set) and the log, as log.csv and for TensorBoard; in the end
errors.png, a plot of it. SIGTERM saves in the middle of an epoch and exits with 143. Ctrl-C exits at once with 130 and
keeps what was saved last. Every random choice follows from the recipe's seed, the epoch and the step, so on one CPU
with the same number of processes and threads a run that was killed and resumed ends with the very weights that it would
have had. (cuDNN may choose other kernels, which round differently.)

Batch norm's statistics are each process's own, as in the paper; their running means are averaged over the processes
before each evaluation. Weights are float32; bf16 and fp16 are autocast only.
"""

import argparse
import importlib.util
import math
import os
import runpy
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

from resnet_ensemble.training import augment, checkpoint, cifar, processes, record, schedules
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError, Epoch, Origin, Progress
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.data import Batch, Data, open_data
from resnet_ensemble.training.files import check_writable
from resnet_ensemble.training.listing import listing
from resnet_ensemble.training.processes import Group
from resnet_ensemble.training.recipes import RECIPES, Recipe, RecipeError, changed, new_network

Precision = Literal["bf16", "fp16", "fp32"]
Tensors = tuple[Tensor, ...] | list[Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Times log(classes), the loss of a network that knows nothing. The first steps of a small data set may reach 10 times.
DIVERGED = 100
# Steps between two looks at SIGTERM and at the loss: each look waits for the device and for the other processes.
LOOK_EVERY = 8


class Stopped(SystemExit):
    """SIGTERM came, and the run was saved; or it diverged, and the last checkpoint was kept."""


def fast_precision() -> Precision:
    """BF16 where this machine computes in it: a CPU that does not takes 11 times as long as in FP32 (ResNet-18)."""
    supported = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  # no other says
    return "bf16" if supported else "fp32"


@dataclass(frozen=True)
class Options:
    """What depends on the machine and not on the recipe.

    - workers: processes that decode and augment pictures of folders, for each training process
    - accumulate: parts in which a process's share of a batch is run, one after another, if memory is short; batch norm
      then has the statistics of a part
    """

    workers: int = min(8, os.cpu_count() or 1)
    precision: Precision = field(default_factory=fast_precision)
    accumulate: int = 1
    compile: bool = False


DEFAULTS = Options()


def train(recipe: Recipe, root: Path, folder: Path, options: Options = DEFAULTS) -> Checkpoint:  # noqa: C901  # the loop, down the page
    """Run what `folder` has not seen yet of the recipe. Returns the last checkpoint.

    Raises DataError, CheckpointError, OSError; Stopped, when SIGTERM came or the loss diverged.
    """
    with processes.join() as group, _sigterm() as stopping:
        device = group.device
        data = open_data(recipe, root, group, workers=options.workers)
        if recipe.batch_size % (group.world * options.accumulate):
            raise DataError(
                f"a batch of {recipe.batch_size} can't be cut into {group.world} x {options.accumulate} equal parts"
            )
        torch.manual_seed(recipe.seed)
        network = new_network(recipe).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = sgd(network, recipe)
        average = _average(network, recipe)
        scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        saved = _resume(folder, recipe, data, network, average, optimizer, scaler)
        if group.first and not (saved and saved.finished):
            check_writable(folder / "checkpoint.safetensors")  # now, and not after the first epoch
        if saved is None:
            saved = Checkpoint(recipe, {}, labels=data.labels, origin=_origin(data, group, options))
            if recipe.per_pixel_mean:
                saved = replace(saved, mean_image=data.mean_image())
        mean = torch.tensor(recipe.mean) if saved.mean_image is None else saved.mean_image
        evaluated: nn.Module = average.module if average else network
        model = _wrap(network, group, options)
        # After _wrap, which gives all processes the statistics of the first.
        if saved.statistics is not None and saved.statistics.shape[1] == group.world:
            for part, everyone in zip((network, evaluated), saved.statistics.to(device), strict=True):
                group.set_statistics(part, everyone)

        steps_an_epoch = data.train_images // recipe.batch_size
        steps = recipe.iterations or recipe.epochs * steps_an_epoch
        epochs = math.ceil(steps / steps_an_epoch)

        def snapshot(history: tuple[Epoch, ...], progress: Progress) -> Checkpoint:
            within = group.world > 1 and progress.steps > 0
            return replace(
                saved,
                statistics=torch.stack([group.statistics(part) for part in (network, evaluated)]) if within else None,
                weights=evaluated.state_dict(),
                trained=network.state_dict() if average else {},
                momentum=_momentum(network, optimizer),
                history=history,
                progress=progress,
                loss_scale=scaler.state_dict(),
                finished=len(history) == epochs,
            )

        history = saved.history
        for epoch in range(len(history), epochs):
            began = time.monotonic()
            done = saved.progress if epoch == len(saved.history) else Progress()
            sums = torch.tensor([done.loss_sum, done.wrong, done.waited] if group.first else [0.0] * 3, device=device)
            stop = min(steps_an_epoch, steps - epoch * steps_an_epoch)
            crop = schedules.crop_size(epoch, epochs=epochs, first=recipe.first_crop or recipe.crop, last=recipe.crop)
            network.train()
            batches = data.batches(epoch, crop=crop, mean=mean, start=done.steps, stop=stop)
            bar = tqdm(
                range(done.steps, stop),
                f"{recipe.name} {epoch + 1}/{epochs}",
                unit="batch",
                leave=False,
                disable=None if group.first else True,
            )
            rate = learning_rate(recipe, epoch * steps_an_epoch + stop - 1, steps, history)  # if no step is left
            for i in bar:
                asked = time.monotonic()
                batch = next(batches)
                sums[2] += time.monotonic() - asked
                rate = learning_rate(recipe, epoch * steps_an_epoch + i, steps, history)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                loss = step(model, batch, recipe, scaler, options, sums)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if average:
                    average.update_parameters(network)
                told = group.world == 1 and stopping.is_set()  # several processes must all look at the same step
                if i % LOOK_EVERY and i + 1 < stop and not told:
                    continue
                last = i + 1 == stop
                lost = not loss < DIVERGED * math.log(max(recipe.classes, 2))
                # What the last step made of the weights no loss has shown yet.
                if last or stopping.is_set():
                    lost |= not all(bool(p.isfinite().all()) for p in network.parameters())
                sigterm, diverged = group.any(torch.tensor([stopping.is_set(), lost]))
                if diverged:
                    raise Stopped(
                        f"the loss became {loss:.3g}, or weights not finite, in step {i + 1} of epoch {epoch + 1}; "
                        f"{folder} keeps the last checkpoint. Try a lower peak_learning_rate or, with fp16, bf16"
                    )
                if not sigterm and not last:
                    continue
                loss_sum, wrong, waited = group.sum(sums).tolist()
                seconds = done.seconds + time.monotonic() - began
                # Also the last step's: a damaged validation picture, or a kill meanwhile, must not cost the epoch.
                _save(folder, snapshot(history, Progress(i + 1, loss_sum, wrong, seconds, waited)), group)
                if not last:
                    _exit(group, f"{recipe.name}: saved after step {i + 1} of epoch {epoch + 1}; run it again to go on")

            group.average_statistics(network)
            if average:
                group.average_statistics(average)
            if recipe.bn_images and epoch + 1 == epochs:
                reestimate(evaluated, data, recipe, mean, group, epoch=epochs)
            errors = evaluate(evaluated, data, recipe, mean, group)
            loss_sum, wrong, waited = group.sum(sums).tolist()
            history += (
                Epoch(
                    epoch=epoch + 1,
                    learning_rate=rate,
                    train_loss=loss_sum / (stop * group.world),
                    train_error=100 * wrong / (stop * recipe.batch_size),
                    val_error=errors.top1,
                    val_images=errors.images,
                    seconds=done.seconds + time.monotonic() - began,
                    val_top5_error=errors.top5,
                    waited=waited / group.world,
                ),
            )
            _save(folder, snapshot(history, Progress()), group)
            if epoch + 1 < epochs and group.any(torch.tensor([stopping.is_set()]))[0]:
                _exit(group, f"{recipe.name}: saved after epoch {epoch + 1}; run it again to go on")
        if group.first:
            record.finish(folder)
        return snapshot(history, Progress())


def step(
    model: nn.Module, batch: Batch, recipe: Recipe, scaler: torch.amp.GradScaler, options: Options, sums: Tensor
) -> Tensor:
    """Add one batch's gradients to the parameters', and its loss and number of errors to `sums`. Returns its loss."""
    device = sums.device
    x = augment.normalise(batch.images.to(device, non_blocking=True), batch.shifts, recipe.std)
    y = batch.labels.to(device, non_blocking=True)
    total = torch.zeros((), device=device)
    parts = options.accumulate
    for i, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        with _gradients_stay_here(model, unless=i + 1 == parts):
            with torch.autocast(device.type, DTYPES[options.precision], enabled=options.precision != "fp32"):
                logits = model(images).float()  # (n, classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / parts
        sums[1] += (logits.argmax(1) != labels).sum()
    sums[0] += total
    return total


def learning_rate(recipe: Recipe, step: int, steps: int, history: tuple[Epoch, ...]) -> float:
    """The recipe's rate at one of its steps, after the epochs in `history`."""
    peak, warm_up = recipe.peak_learning_rate, recipe.warm_up
    if recipe.schedule == "one-cycle":
        return schedules.one_cycle(step, steps=steps, peak=peak, warm_up=warm_up)
    if recipe.schedule == "staircase":
        return schedules.staircase(step, steps=steps, peak=peak, warm_up=warm_up, drops=recipe.drops)
    return schedules.plateau([epoch.val_error for epoch in history], peak=peak, patience=recipe.patience)


def sgd(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Weight decay on convolution and linear weights; on batch norm and biases only if the recipe says so."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    rest = recipe.weight_decay if recipe.decay_all else 0.0
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": rest}]
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov)


@dataclass(frozen=True)
class Errors:
    """Single-view (center) errors in %, and the number of images that they were counted on."""

    top1: float
    top5: float
    images: int


@torch.inference_mode()
def evaluate(network: nn.Module, data: Data, recipe: Recipe, mean: Tensor, group: Group) -> Errors:
    """Errors on the validation set, in float32. Each process counts its own images, none is counted twice."""
    network.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=group.device)  # images, wrong at top 1, wrong at top 5
    for images, labels in data.validation():
        labels = labels.to(group.device)
        logits = network(augment.normalise(images.to(group.device), (mean,), recipe.std))  # (n, classes)
        hits = logits.topk(min(5, recipe.classes)).indices == labels[:, None]  # (n, 5)
        counts += torch.stack(
            [torch.tensor(len(labels), device=group.device), (~hits[:, 0]).sum(), (~hits.any(1)).sum()]
        )
    images_, top1, top5 = group.sum(counts).tolist()
    return Errors(100 * top1 / images_, 100 * top5 / images_, images_)


def reestimate(network: nn.Module, data: Data, recipe: Recipe, mean: Tensor, group: Group, *, epoch: int) -> None:
    """Make batch norm's statistics a true average over `recipe.bn_images` training images, as the authors did."""
    stop = min(data.train_images, recipe.bn_images) // recipe.batch_size
    batches = data.batches(epoch, crop=recipe.crop, mean=mean, start=0, stop=stop)
    update_bn(
        (augment.normalise(batch.images.to(group.device), batch.shifts, recipe.std) for batch in batches), network
    )
    group.average_statistics(network)


def _save(folder: Path, saved: Checkpoint, group: Group) -> None:
    """The first process writes, and no other goes on before: it may end, or be asked to resume."""
    if group.first:
        record.write(folder, saved)
    group.wait()


def _resume(
    folder: Path,
    recipe: Recipe,
    data: Data,
    network: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.SGD,
    scaler: torch.amp.GradScaler,
) -> Checkpoint | None:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    saved = checkpoint.load(path)
    if saved.recipe != recipe:
        raise CheckpointError(f"{path} was made by another recipe ({saved.recipe}); give another --out or delete it")
    if saved.origin.data not in ("", data.fingerprint):
        raise CheckpointError(f"{path} was trained on other data; give the same --data, another --out, or delete it")
    network.load_state_dict(saved.trained or saved.weights)
    if average:
        average.module.load_state_dict(saved.weights)
        average.n_averaged.fill_(len(saved.history) * (data.train_images // recipe.batch_size) + saved.progress.steps)
    for name, parameter in network.named_parameters():
        if name in saved.momentum:
            optimizer.state[parameter]["momentum_buffer"] = saved.momentum[name].to(parameter.device)
    if saved.loss_scale:
        scaler.load_state_dict(saved.loss_scale)
    return saved


def _average(network: nn.Module, recipe: Recipe) -> AveragedModel | None:
    if not recipe.ema_decay:
        return None

    def blend(averaged: Tensors, new: Tensors, updates: Tensor | int) -> None:
        # Of the CPU; to read `updates` would wait for the device.
        decay = schedules.ema_decay(int(average.n_averaged), decay=recipe.ema_decay)
        get_ema_multi_avg_fn(decay)(averaged, new, updates)  # type: ignore[no-untyped-call]

    average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    return average


def _momentum(network: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    state = optimizer.state
    return {name: state[p]["momentum_buffer"] for name, p in network.named_parameters() if p in state}


def _wrap(network: nn.Module, group: Group, options: Options) -> nn.Module:
    """The network as the loop calls it: compiled, if asked, and sharing its gradients, if it is not alone."""
    alone = group.world == 1
    # CUDA graphs, which do not add up the gradients of several parts.
    graphs = alone and options.accumulate == 1 and group.device.type == "cuda"
    mode = "reduce-overhead" if graphs else None
    model = cast("nn.Module", torch.compile(network, mode=mode)) if options.compile else network
    return model if alone else DistributedDataParallel(model, forward_sync_buffers=False)


def _gradients_stay_here(model: nn.Module, *, unless: bool) -> AbstractContextManager[object]:
    """Processes exchange gradients only with the last part of a batch."""
    return nullcontext() if unless or not isinstance(model, DistributedDataParallel) else model.no_sync()


def _origin(data: Data, group: Group, options: Options) -> Origin:
    gpu = group.device.type == "cuda"
    return Origin(
        code=_revision(),
        data=data.fingerprint,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(group.device) if gpu else "cpu",
        precision=options.precision,
        processes=group.world,
    )


def _revision() -> str:
    """The commit that this file belongs to, with a + if files were changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()  # noqa: S603
        status = subprocess.check_output([*git, "status", "--porcelain"], text=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return ""
    return commit + ("+" if status.strip() else "")


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(group: Group, message: str) -> None:
    if group.first:
        print(message, flush=True)
    raise Stopped(128 + signal.SIGTERM)


def _at_least(lowest: int) -> Callable[[str], int]:
    """A type of argparse's for whole numbers."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {text}")
        return int(text)

    return number


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", choices=RECIPES, metavar="RECIPE", help="one of those that --list prints")
    parser.add_argument("--list", action="store_true", help="print every recipe with its cost, and stop")
    parser.add_argument("--data", type=Path, help="the folder with the data set")
    parser.add_argument("--download", action="store_true", help="get CIFAR's archive into --data, if it is not there")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="checkpoints go to OUT/RECIPE (default: runs)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="change fields of the recipe: --set epochs=2 batch_size=64",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=DEFAULTS.precision,
        help=f"bf16 where this machine computes in it, otherwise fp32 (default here: {DEFAULTS.precision})",
    )
    parser.add_argument(
        "--accumulate", type=_at_least(1), default=1, metavar="N", help="run each process's share of a batch in N parts"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, on one GPU with CUDA graphs")
    parser.add_argument(
        "--workers", type=_at_least(0), default=DEFAULTS.workers, help=f"loader processes (default: {DEFAULTS.workers})"
    )
    parser.add_argument("--threads", type=_at_least(1), help="CPU threads of each process (default: torch's)")
    arguments = parser.parse_args()
    if arguments.list:
        print(listing())
        return
    if not arguments.recipe or not arguments.data:
        parser.error("give a RECIPE and --data DIR, or --list")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = Options(arguments.workers, arguments.precision, arguments.accumulate, arguments.compile)
    try:
        recipe = changed(RECIPES[arguments.recipe], arguments.set)
        if arguments.download and recipe.dataset in cifar.DATASETS:
            cifar.download(arguments.data, cifar.DATASETS[recipe.dataset])
        result = train(recipe, arguments.data, arguments.out / recipe.name, options)
    except (DataError, CheckpointError, RecipeError) as problem:
        raise SystemExit(str(problem)) from None
    except OSError as problem:
        raise SystemExit(f"{problem}; run it again when this is solved: it goes on from what was saved") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as of a command that SIGINT ends
    last = result.history[-1]
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{recipe.name}: {last.val_error:.2f} % (top-5 {last.val_top5_error:.2f} %) on {last.val_images} images")


if __name__ == "__main__":
    main()
