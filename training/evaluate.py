"""Errors of checkpoints under test-time protocols, with 95 % intervals, beside the paper's.

    python training/evaluate.py runs/resnet20-cifar10 runs/resnet56-cifar10 --data DIR
    python training/evaluate.py runs/resnet50-imagenet --data DIR --protocol 10crop --protocol multiscale

A run's folder means its last checkpoint; runs/NAME/best.safetensors its best one, which was chosen on the validation
set. With several checkpoints of one data set, their averaged ensemble is evaluated too. Softmax vectors are averaged
over views, then over networks, in float64. In float32, on a GPU if there is one.
"""

import argparse
import importlib.util
import runpy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from resnet_ensemble.training import augment, checkpoint, cifar, paper
from resnet_ensemble.training.accuracy import wilson
from resnet_ensemble.training.checkpoint import Checkpoint, CheckpointError
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.data import decode, scan_folders
from resnet_ensemble.training.model import FullyConvolutional
from resnet_ensemble.training.recipes import Recipe, new_network
from resnet_ensemble.training.views import (
    ALL_PROTOCOLS,
    DENSE_PROTOCOLS,
    Preprocessing,
    make_views,
    make_whole_views,
)

IMAGES_A_BATCH = 16  # 160 views of ten crops
Pictures = Sequence[str] | Sequence[NDArray[np.uint8]]  # paths, or uint8 (h, w, 3)


@dataclass(frozen=True)
class Score:
    """Errors in % of one network, or of the ensemble, under one protocol."""

    network: str
    protocol: str
    images: int
    top1: float
    top5: float
    published: paper.Row | None = None


class Network:
    """A checkpoint's network, ready to give probabilities."""

    def __init__(self, saved: Checkpoint, device: torch.device) -> None:
        self.recipe = saved.recipe
        self.labels = saved.labels
        self._device = device
        network = new_network(saved.recipe)
        network.load_state_dict(saved.weights)
        self._network = FullyConvolutional(network, saved.recipe.test_crop)
        self._network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean_image = saved.mean_image

    @torch.inference_mode()
    def probabilities(self, views: Tensor) -> Tensor:
        """uint8 (n, h, w, 3) → float64 (n, classes)."""
        x = augment.normalise(views.to(self._device), (self._mean(*views.shape[1:3]),), self.recipe.std)
        return torch.softmax(self._network(x).double(), 1).cpu()

    def _mean(self, height: int, width: int) -> Tensor:
        """The mean image of this size, as the exported graph has it, or the mean colour."""
        if self._mean_image is None:
            return torch.tensor(self.recipe.mean)
        planes = self._mean_image.permute(2, 0, 1)[None]
        return F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


class _Examples(Dataset[tuple[list[NDArray[np.uint8]], int]]):
    """Each picture's views and its label."""

    def __init__(self, pictures: Pictures, labels: Sequence[int], seen: Preprocessing, protocol: str) -> None:
        self._pictures = pictures
        self._labels = labels
        self._seen = seen
        self._protocol = protocol

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[list[NDArray[np.uint8]], int]:
        source = self._pictures[index]
        image = decode(source) if isinstance(source, str) else Image.fromarray(source)
        if self._protocol in DENSE_PROTOCOLS:
            return make_whole_views(image, self._seen, self._protocol), self._labels[index]
        return list(make_views(image, self._seen, self._protocol)), self._labels[index]


def read(networks: Sequence[Network], data: Path, split: cifar.Split) -> tuple[Pictures, Sequence[int]]:
    """The pictures and labels of a split that all the networks know. Raises DataError."""
    recipe, labels = networks[0].recipe, networks[0].labels
    if len({(other.recipe.dataset, other.recipe.classes, other.labels) for other in networks}) > 1:
        raise DataError("these networks were trained on different data sets; evaluate them one by one")
    if recipe.dataset == "imagenet":
        # By the names that it was trained with: a split may lack a class, and must not shift the others.
        found, files = scan_folders(data, split, labels or None)
        if len(found) != recipe.classes:
            raise DataError(f"{data / split} has {len(found)} classes, the network {recipe.classes}")
        return [path for path, _ in files], [label for _, label in files]
    images = cifar.read(data, split, cifar.DATASETS[recipe.dataset])
    return list(images.images), images.labels.tolist()


def evaluate(
    networks: Sequence[Network],
    pictures: Pictures,
    labels: Sequence[int],
    protocol: str,
    *,
    workers: int = 0,
) -> list[Score]:
    """One score a network and, with several, the ensemble's."""
    sums = [_sums(network, pictures, labels, protocol, workers) for network in networks]
    scores = [
        _score(network.recipe.network, protocol, rows, labels, _of_paper(network.recipe, protocol))
        for network, rows in zip(networks, sums, strict=True)
    ]
    if len(networks) > 1:
        scores.append(_score("ensemble", protocol, torch.stack(sums).sum(0), labels))
    return scores


def _sums(network: Network, pictures: Pictures, labels: Sequence[int], protocol: str, workers: int) -> Tensor:
    """Probabilities summed over each picture's views: float64 (images, classes)."""
    examples = _Examples(pictures, labels, network.recipe.preprocessing, protocol)
    loader = DataLoader(examples, batch_size=IMAGES_A_BATCH, num_workers=workers, collate_fn=list)
    sums = torch.zeros(len(labels), network.recipe.classes, dtype=torch.float64)
    start = 0
    for batch in tqdm(loader, f"{network.recipe.name} {protocol}", unit="batch", leave=False, disable=None):
        for rows, views in _by_shape(views for views, _ in batch):
            sums.index_add_(0, start + rows, network.probabilities(views))
        start += len(batch)
    return sums


def _by_shape(pictures: Iterator[list[NDArray[np.uint8]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The views of several pictures, put together by their shapes: whose they are, and uint8 (n, h, w, 3)."""
    groups: defaultdict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)
    for i, views in enumerate(pictures):
        for view in views:
            groups[view.shape].append((i, view))
    for group in groups.values():
        yield torch.tensor([i for i, _ in group]), torch.from_numpy(np.stack([view for _, view in group]))


def _of_paper(recipe: Recipe, protocol: str) -> paper.Row | None:
    return paper.row(recipe.dataset, recipe.classes, recipe.network, protocol)


def _score(
    network: str, protocol: str, sums: Tensor, labels: Sequence[int], published: paper.Row | None = None
) -> Score:
    hits = sums.topk(min(5, sums.shape[1])).indices == torch.tensor(labels)[:, None]  # (images, 5)
    top1, top5 = 100 * float((~hits[:, 0]).double().mean()), 100 * float((~hits.any(1)).double().mean())
    return Score(network, protocol, len(labels), top1, top5, published)


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table, the paper's beside ours."""
    lines = [
        "| network | protocol | n | top-1 error, 95 % interval | top-5 error, 95 % interval | the paper's |",
        "|---" * 6 + "|",
    ]
    for score in scores:
        low, high = wilson(score.top1, score.images)
        low5, high5 = wilson(score.top5, score.images)
        lines.append(
            f"| {score.network} | {score.protocol} | {score.images:,} | {score.top1:.2f} % ({low:.2f} to {high:.2f}) "
            f"| {score.top5:.2f} % ({low5:.2f} to {high5:.2f}) | {_published(score.published)} |"
        )
    return "\n".join(lines)


def _published(row: paper.Row | None) -> str:
    if row is None:
        return ""
    return f"{row.top1:.2f}" + (f" / {row.top5:.2f}" if row.top5 is not None else "") + f" % ({row.source})"


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a run's folder, or a file")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data set")
    parser.add_argument("--split", choices=cifar.SPLITS, default="val", help="(default: val)")
    parser.add_argument("--protocol", action="append", choices=ALL_PROTOCOLS, help="may be repeated (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode and cut (default: 0, here)")
    arguments = parser.parse_args()
    if arguments.workers < 0:
        parser.error(f"--workers {arguments.workers}: there can't be fewer than none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # torch's default rounds the factors of convolutions to 10 bits
    try:
        networks = [Network(checkpoint.load(path), device) for path in arguments.checkpoints]
        pictures, labels = read(networks, arguments.data, arguments.split)
        scores = [
            score
            for protocol in arguments.protocol or ALL_PROTOCOLS
            for score in evaluate(networks, pictures, labels, protocol, workers=arguments.workers)
        ]
    except (DataError, CheckpointError, OSError) as problem:
        raise SystemExit(f"evaluate: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as of a command that SIGINT ends
    print(table(scores))


if __name__ == "__main__":
    main()
