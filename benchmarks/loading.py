"""Training images per second and core of the loader, beside torchvision's usual pipeline and the training step.

    python benchmarks/loading.py FOLDER [--crop 160]

FOLDER holds photographs, in it or in folders below it. In one process, without workers, in interleaved rounds with
medians, because machines drift:

    ImageFolder  what torchvision's references do: Pillow, RandomResizedCrop, flip, floats, normalised
    loader       ours for the short ImageNet recipe: TorchCodec's decoder, the same crops of bytes (floats are made on
                 the device, by the batch)
    loader, scale  ours for the paper's recipe: shorter side 256 to 480, a crop of 224

and, on the CPU, forward and backward of ResNet-18 and ResNet-50 on batches of 16 such crops in bf16.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from tqdm import tqdm

from resnet_ensemble.export import host
from resnet_ensemble.training.data import Key, TrainingFiles
from resnet_ensemble.training.model import imagenet
from resnet_ensemble.training.recipes import RECIPES

ROUNDS = 7


def usual(files: list[str], crop: int) -> Callable[[], int]:
    """What torchvision gives from `ImageFolder` with the transforms of its documentation."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def run() -> int:
        for file in files:
            transform(pil_loader(file))
        return len(files)

    return run


def ours(files: list[str], recipe_name: str, crop: int) -> Callable[[], int]:
    """The loader's own data set."""
    recipe = replace(RECIPES[recipe_name], first_crop=0, crop=crop, test_crop=crop)
    examples = TrainingFiles([(file, 0) for file in files], recipe)

    def run() -> int:
        for picture in range(len(files)):
            examples[Key(picture, seed=picture, crop=crop)]
        return len(files)

    return run


def step(depth: int, crop: int) -> Callable[[], int]:
    """One forward and backward pass."""
    network = imagenet(depth).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, crop, crop).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (16,))

    def run() -> int:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        network.zero_grad()
        return len(images)

    return run


def main() -> None:
    """Parse the command line, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, in it or in folders below it")
    parser.add_argument("--crop", type=int, default=160, help="side of the crops (default: 160)")
    arguments = parser.parse_args()
    files = sorted(str(path) for path in arguments.folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise SystemExit(f"no images in {arguments.folder} ({', '.join(IMG_EXTENSIONS)})")
    torch.set_num_threads(1)
    crop = arguments.crop
    runs = {
        "ImageFolder": usual(files, crop),
        "loader": ours(files, "resnet50-imagenet", crop),
        "loader, scale": ours(files, "resnet50-imagenet-paper", 224),
        "step of ResNet-18": step(18, crop),
        "step of ResNet-50": step(50, crop),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(ROUNDS), "rounds", disable=None):
        for name, run in runs.items():
            # CPU time, so that what else runs on the machine counts less.
            began = time.process_time()
            rates[name].append(run() / (time.process_time() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("| | images/s of one core | of ImageFolder |\n|---|---|---|")
    for name, rate in medians.items():
        print(f"| {name} | {rate:.0f} | {rate / medians['ImageFolder']:.2f} |")
    print(
        f"\n{len(files)} photographs, crops of {crop}; {host.cpu().split(' avx')[0]}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}, CPU time, median of {ROUNDS} interleaved rounds"
    )


if __name__ == "__main__":
    main()
