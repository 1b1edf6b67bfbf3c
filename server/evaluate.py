"""Accuracy of a bundle, through the very code that serves it: encoded images in, predictions out.

    python -m resnet_ensemble.server.evaluate bundles/cifar10 DATA                 # every protocol
    python -m resnet_ensemble.server.evaluate bundles/cifar10 DATA --record       # and write it into bundle.json

DATA holds CIFAR's official files (`--split val` or `test`), or one folder of images for each label. Prints the
top-1 error of the ensemble and of each member with its 95 % Wilson interval, and images per second.
"""

import argparse
import asyncio
import io
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from resnet_ensemble.export.bundle import Bundle, BundleError, Measured, write
from resnet_ensemble.export.engines import BackendUnavailable
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options, Prediction
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training import cifar
from resnet_ensemble.training.accuracy import wilson
from resnet_ensemble.training.views import PROTOCOLS

IN_FLIGHT = 64


@dataclass(frozen=True)
class Score:
    """Top-1 errors in % under one protocol: of the ensemble and of each member alone."""

    protocol: str
    images: int
    ensemble: float
    members: dict[str, float]
    images_per_second: float


def read(data: Path, split: cifar.Split, labels: tuple[str, ...]) -> tuple[str, list[tuple[bytes, int]]]:
    """The data set's name, and its encoded images with their labels. Raises DataError."""
    folders = {label: data / label for label in labels if (data / label).is_dir()}
    if folders:
        files = [(file, labels.index(label)) for label, folder in folders.items() for file in sorted(folder.iterdir())]
        return data.name, [(file.read_bytes(), index) for file, index in files]
    dataset = next((known for known in cifar.DATASETS.values() if known.labels == labels), None)
    if dataset is None:
        raise cifar.DataError(f"no folder in {data} is named like a label of the bundle ({', '.join(labels[:3])}, ...)")
    chosen = cifar.read(data, split, dataset)
    pairs = zip(chosen.images, chosen.labels, strict=True)
    return dataset.title, [(_png(Image.fromarray(pixels)), int(label)) for pixels, label in pairs]


async def evaluate(classifier: Classifier, examples: list[tuple[bytes, int]], protocol: str) -> Score:
    """Classify every example. Raises ApiError for an image that can't be."""
    options = Options.model_validate({"protocol": protocol, "top_k": 1})
    progress = tqdm(total=len(examples), desc=protocol, unit="image", disable=None, leave=False)
    wrong = [0] * (1 + len(classifier.engines))

    async def run(share: Iterator[tuple[bytes, int]]) -> None:
        for content, label in share:
            (answer,) = await classifier.classify([content], options)
            if isinstance(answer, ApiError):
                raise answer
            _count(answer, label, wrong)
            progress.update()

    began = time.monotonic()
    shared = iter(examples)
    await asyncio.gather(*(run(shared) for _ in range(IN_FLIGHT)))
    seconds = time.monotonic() - began
    progress.close()
    errors = [100 * count / len(examples) for count in wrong]
    names = [member.name for member in classifier.bundle.manifest.members]
    members = dict(zip(names, errors[1:], strict=True))
    return Score(protocol, len(examples), errors[0], members, len(examples) / seconds)


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    names = list(scores[0].members)
    lines = [
        "| protocol | " + " | ".join([*names, "ensemble (95 % interval)", "images/s"]) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for score in scores:
        low, high = wilson(score.ensemble, score.images)
        cells = [f"{score.members[name]:.2f} %" for name in names]
        cells += [f"**{score.ensemble:.2f} %** ({low:.2f} to {high:.2f})", f"{score.images_per_second:.0f}"]
        lines.append(f"| {score.protocol} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(bundle: Bundle, scores: list[Score], dataset: str, split: str) -> None:
    """Write the errors into bundle.json, in place of older ones of the same data set, split and protocol."""

    def replaced(old: tuple[Measured, ...], errors: dict[str, float]) -> tuple[Measured, ...]:
        kept = tuple(m for m in old if (m.dataset, m.split) != (dataset, split) or m.protocol not in errors)
        return kept + tuple(
            Measured(
                dataset=dataset,
                split=split,
                protocol=protocol,
                images=scores[0].images,
                top1_error=round(error, 4),
                measured_by="python -m resnet_ensemble.server.evaluate",
            )
            for protocol, error in errors.items()
        )

    manifest = bundle.manifest
    members = tuple(
        member.model_copy(
            update={"measured": replaced(member.measured, {s.protocol: s.members[member.name] for s in scores})}
        )
        for member in manifest.members
    )
    measured = replaced(manifest.measured, {score.protocol: score.ensemble for score in scores})
    write(bundle.path, manifest.model_copy(update={"members": members, "measured": measured}), {})


def _count(answer: Prediction, label: int, wrong: list[int]) -> None:
    wrong[0] += answer.index != label
    for i, vote in enumerate(answer.members):
        wrong[1 + i] += vote.index != label


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("data", type=Path, help="CIFAR's official files, or one folder of images a label")
    parser.add_argument("--split", default="val", choices=cifar.SPLITS, help="of CIFAR (default: val)")
    parser.add_argument("--protocol", action="append", choices=list(PROTOCOLS), help="default: every protocol")
    parser.add_argument("--record", action="store_true", help="write the result into bundle.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    # Nobody waits for an answer here, so nothing is refused.
    settings = Settings(bundle=arguments.bundle, max_wait_seconds=3600)
    try:
        classifier = load(settings, Metrics())
        manifest = classifier.bundle.manifest
        dataset, examples = read(arguments.data, arguments.split, manifest.labels)
        protocols = arguments.protocol or list(PROTOCOLS)
        scores = [asyncio.run(evaluate(classifier, examples, protocol)) for protocol in protocols]
    except (BundleError, BackendUnavailable, cifar.DataError, ApiError) as problem:
        sys.exit(f"evaluate: {problem}")
    classifier.close()
    print(f"{classifier.bundle.identity} on {dataset} {arguments.split}, n = {len(examples)}, top-1 error\n")
    print(table(scores))
    if arguments.record:
        record(classifier.bundle, scores, dataset, arguments.split)


if __name__ == "__main__":
    main()
