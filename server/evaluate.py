"""Accuracy and cost of a bundle, through the very code that serves it: encoded images in, predictions out.

    python -m resnet_ensemble.server.evaluate bundles/cifar10 DATA                 # every protocol and its stop rules
    python -m resnet_ensemble.server.evaluate bundles/cifar10 DATA --protocol 10crop --stop exact --limit 500
    python -m resnet_ensemble.server.evaluate bundles/cifar10 DATA --record       # and write it into bundle.json

DATA holds CIFAR's official files (`--split val` or `test`), or one folder of images for each label, or ImageNet's
folders (n01440764, ...). Prints, for each protocol and stop rule, the top-1 error of the ensemble with its 95 % Wilson
interval, of how many images the label is the one of all views, views used, their multiply-adds, what they cost by the
measured seconds of a view, and images per second. The errors of each member alone are those of all its views. `--plot`
draws error against multiply-adds. RESNET_ variables hold, as for the server.
"""

import argparse
import asyncio
import importlib.util
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from resnet_ensemble.export import labelled
from resnet_ensemble.export.bundle import MANIFEST, Bundle, BundleError, Measured, write
from resnet_ensemble.export.engines import BackendUnavailable
from resnet_ensemble.export.labelled import PictureUnreadable
from resnet_ensemble.server import ensemble
from resnet_ensemble.server.calibration import NotCalibrated
from resnet_ensemble.server.classifier import Classifier, Evaluated, load
from resnet_ensemble.server.drawing import draw
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.plan import Plan
from resnet_ensemble.server.schemas import Options
from resnet_ensemble.server.scores import Score
from resnet_ensemble.server.settings import SettingsError, from_environment
from resnet_ensemble.server.stopping import CALIBRATED, RULES
from resnet_ensemble.training import cifar
from resnet_ensemble.training.accuracy import wilson
from resnet_ensemble.training.cifar import DataError
from resnet_ensemble.training.files import check_writable, write_atomically
from resnet_ensemble.training.views import ALL_PROTOCOLS, block_pixels

IN_FLIGHT = 64
FULL = "full"
STOPS = (*RULES, CALIBRATED)
# What their messages say is all that a user needs.
_TOLD = (
    *(SettingsError, BundleError, BackendUnavailable, NotCalibrated),
    *(DataError, PictureUnreadable, ApiError, OSError),
)


@dataclass(frozen=True)
class Example:
    """A picture and its label. `read` gives it encoded, when its turn comes: 50,000 photographs have 7 GB.

    `name`: what it is called if it can't be answered.
    """

    read: Callable[[], bytes]
    label: int
    name: str = "a picture"


@dataclass(frozen=True)
class _Answer:
    """The class of an image, and of each member's views of it, how many views were used, and the picture's size."""

    index: int
    votes: list[int]
    used: int
    size: tuple[int, int]


def read(data: Path, split: cifar.Split, labels: tuple[str, ...]) -> tuple[str, str, list[Example]]:
    """The names of the data set and of its split, and its pictures. Raises DataError.

    `split`: of CIFAR. A folder is a split if it is named like one, and otherwise "all" of what it is named.
    """
    if not data.exists():
        raise DataError(f"there is nothing at {data}")
    pictures = labelled.find(data, labels)
    examples = [Example(file.read, file.label, str(file.path)) for file in pictures if file.label is not None]
    unknown = [file.path for file in pictures if file.label is None]
    if unknown:  # the error of a part of the data would be taken for that of all
        raise DataError(
            f"{len(unknown)} of the {len(pictures)} pictures in {data} are in no folder that is named like a label of "
            f"the bundle; the first is {unknown[0]}"
        )
    if examples:
        name = labelled.name_of(data)
        return (labelled.name_of(data / ".."), name, examples) if name in cifar.SPLITS else (name, "all", examples)
    dataset = next((known for known in cifar.DATASETS.values() if known.labels == labels), None)
    if dataset is None:
        raise DataError(f"no folder in {data} is named like a label of the bundle ({', '.join(labels[:3])}, ...)")
    chosen = cifar.read(data, split, dataset)
    pairs = zip(chosen.images, chosen.labels, strict=True)
    return dataset.title, split, [Example(partial(_png, pixels), int(label)) for pixels, label in pairs]


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """At most so many examples, taken at equal distances, so that folders of all labels have their share."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i * len(examples) // limit] for i in range(limit)]


async def evaluate(
    classifier: Classifier,
    examples: list[Example],
    protocol: str,
    stop: str = FULL,
    labels_of_all_views: list[int] | None = None,
) -> tuple[Score, list[int]]:
    """Classify every example: the score, and the indices answered. Raises DataError for a picture that can't be."""
    options = Options.model_validate({"protocol": protocol, "stop": stop})
    progress = tqdm(total=len(examples), desc=f"{protocol} {stop}", unit="image", disable=None, leave=False)
    answers: dict[int, _Answer] = {}

    async def run(share: Iterator[tuple[int, Example]]) -> None:
        for place, example in share:
            content = await asyncio.to_thread(example.read)
            (answer,) = await classifier.evaluate([content], options, None, _answer)
            if isinstance(answer, ApiError):
                raise DataError(f"{example.name}: {answer}")
            answers[place] = answer
            progress.update()

    began = time.monotonic()
    shared = enumerate(examples)
    await asyncio.gather(*(run(shared) for _ in range(IN_FLIGHT)))
    seconds = time.monotonic() - began
    progress.close()

    found = [answers[place] for place in range(len(examples))]
    labels = [example.label for example in examples]
    indices = [answer.index for answer in found]
    members = None
    if stop == FULL:
        votes = [answer.votes for answer in found]
        names = [member.name for member in classifier.bundle.manifest.members]
        columns = zip(names, zip(*votes, strict=True), strict=True)
        members = {name: _differing(list(column), labels) for name, column in columns}
    plan = classifier.strategies.of(protocol, stop).plan
    used = [answer.used for answer in found]
    spent = sum(plan.seconds_between(0, views) for views in used)
    score = Score(
        protocol,
        stop,
        len(examples),
        _differing(indices, labels),
        members,
        None if labels_of_all_views is None else 100 - _differing(indices, labels_of_all_views),
        sum(used) / len(used),
        plan.views,
        spent / (len(used) * plan.seconds),
        len(examples) / seconds,
        _multiply_adds(classifier, plan, found),
    )
    return score, indices


def _answer(result: Evaluated) -> _Answer:
    mean = result.mean
    return _Answer(ensemble.top(mean.ensemble, 1)[0], mean.members.argmax(axis=1).tolist(), result.used, result.size)


def _multiply_adds(classifier: Classifier, plan: Plan, answers: list[_Answer]) -> float | None:
    """Of an image, on average, over the views that were used. Views of other sizes cost as their pixels."""
    members = classifier.bundle.manifest.members
    total = 0.0
    for (views, size), images in Counter((answer.used, answer.size) for answer in answers).items():
        for stage, low, high in plan.between(0, views):
            member = members[stage.member]
            if member.multiply_adds is None:
                return None
            pixels = block_pixels(member.preprocessing, plan.protocol, size)[stage.block]
            total += images * (high - low) * member.multiply_adds * pixels / member.preprocessing.crop**2
    return total / len(answers)


async def evaluate_all(
    classifier: Classifier, examples: list[Example], protocols: list[str], stops: list[str]
) -> list[Score]:
    """Every protocol with every stop rule that it has. Agreement is with `full` where that is one of them."""
    scores = []
    for protocol in protocols:
        all_views = None
        has = [stop for stop in stops if stop != CALIBRATED or protocol in classifier.strategies.calibrations]
        for stop in sorted(has, key=lambda name: name != FULL):  # what the others are compared with comes first
            score, indices = await evaluate(classifier, examples, protocol, stop, all_views)
            all_views = indices if stop == FULL else all_views
            scores.append(score)
    return scores


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    names = next((list(score.members) for score in scores if score.members is not None), [])
    columns = ["protocol", "stop", *names, "ensemble (95 % interval)", "agreement", "views", "multiply-adds", "cost"]
    columns += ["images/s"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for score in scores:
        low, high = wilson(score.ensemble, score.images)
        alone = ["" if score.members is None else f"{score.members[name]:.2f} %" for name in names]
        cells = [
            score.protocol,
            score.stop,
            *alone,
            f"**{score.ensemble:.2f} %** ({low:.2f} to {high:.2f})",
            "" if score.agreement is None else f"{score.agreement:.2f} %",
            f"{score.views_used:.1f} of {score.views_planned}",
            "" if score.multiply_adds is None else f"{score.multiply_adds / 1e6:,.0f} M",
            f"{score.cost:.2f}",
            f"{score.images_per_second:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(bundle: Bundle, scores: list[Score], dataset: str, split: str, engines: str) -> None:
    """Write the errors of all views into bundle.json; older ones of the same data, split and protocol are replaced.

    `engines`: what they were measured on.
    """

    def replaced(old: tuple[Measured, ...], errors: dict[str, float]) -> tuple[Measured, ...]:
        kept = tuple(m for m in old if (m.dataset, m.split) != (dataset, split) or m.protocol not in errors)
        return kept + tuple(
            Measured(
                dataset=dataset,
                split=split,
                protocol=protocol,
                images=scores[0].images,
                top1_error=round(error, 4),
                measured_by=f"python -m resnet_ensemble.server.evaluate on {engines}",
            )
            for protocol, error in errors.items()
        )

    manifest = bundle.manifest
    full = {score.protocol: score for score in scores if score.members is not None}
    members = tuple(
        member.model_copy(
            update={"measured": replaced(member.measured, {p: (s.members or {})[member.name] for p, s in full.items()})}
        )
        for member in manifest.members
    )
    measured = replaced(manifest.measured, {protocol: score.ensemble for protocol, score in full.items()})
    write(bundle.path, manifest.model_copy(update={"members": members, "measured": measured}), {})


def _differing(found: list[int], expected: list[int]) -> float:
    """In %."""
    return 100 * sum(a != b for a, b in zip(found, expected, strict=True)) / len(expected)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("data", type=Path, help="CIFAR's official files, or one folder of images a label")
    parser.add_argument("--split", default="val", choices=cifar.SPLITS, help="of CIFAR (default: val)")
    parser.add_argument("--protocol", action="append", choices=ALL_PROTOCOLS, help="may be repeated (default: all)")
    parser.add_argument("--stop", action="append", choices=STOPS, help="may be repeated (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="only N images, at equal distances")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw error against multiply-adds; needs matplotlib")
    parser.add_argument("--record", action="store_true", help="write the errors of all views into bundle.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    stops = arguments.stop or list(STOPS)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit {arguments.limit} leaves no image")
    if arguments.record and (arguments.limit is not None or FULL not in stops):
        parser.error("--record is of all images and all views: without --limit, and with --stop full")
    if arguments.plot and arguments.plot.suffix.lower() != ".png":
        parser.error(f"--plot writes a PNG; {arguments.plot.name} is named like something else")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'resnet-ensemble[plot]'")
    try:
        _run(arguments, stops)
    except _TOLD as problem:
        sys.exit(f"evaluate: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)  # as of a command that SIGINT ends


def _run(arguments: argparse.Namespace, stops: list[str]) -> None:
    # Nobody waits for an answer here, so nothing is refused.
    settings = from_environment().model_copy(update={"bundle": arguments.bundle, "max_wait_seconds": 3600.0})
    if arguments.record and settings.backend == "fake":
        raise SettingsError("errors of the fake backend would mean nothing; set RESNET_BACKEND to another one")
    for file in [arguments.plot] * bool(arguments.plot) + [arguments.bundle / MANIFEST] * arguments.record:
        check_writable(file)  # now, since evaluating may take long
    # Closed whatever happens: a process that ends while its engines run is aborted.
    with closing(load(settings, Metrics())) as classifier:
        manifest = classifier.bundle.manifest
        if arguments.plot and any(member.multiply_adds is None for member in manifest.members):
            raise BundleError("the bundle does not say its members' multiply-adds, so --plot can't; export it again")
        dataset, split, examples = read(arguments.data, arguments.split, manifest.labels)
        examples = spread(examples, arguments.limit)
        protocols = arguments.protocol or list(ALL_PROTOCOLS)
        if CALIBRATED in (arguments.stop or ()) and not set(protocols) & set(classifier.strategies.calibrations):
            classifier.strategies.of(protocols[0], CALIBRATED)
        scores = asyncio.run(evaluate_all(classifier, examples, protocols, stops))
    if arguments.json:
        print(json.dumps([asdict(score) for score in scores], indent=1))
    else:
        print(f"{classifier.bundle.identity} on {dataset} {split}, n = {len(examples)}, top-1 error\n")
        print(table(scores))
    if arguments.plot:
        write_atomically(arguments.plot, draw(scores, f"{classifier.bundle.identity}, {dataset} {split}"))
    if arguments.record:
        kinds = dict.fromkeys(f"{engine.info.backend} {engine.info.precision}" for engine in classifier.engines)
        record(classifier.bundle, scores, dataset, split, ", ".join(kinds))


if __name__ == "__main__":
    main()
