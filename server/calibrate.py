"""Find the thresholds of the stop rule `calibrated`, with a guarantee, and the temperatures of a bundle.

    python -m resnet_ensemble.server.calibrate bundles/cifar10 IMAGES --disagreement 0.005 --confidence 0.95

Every view of every image is run once, on the engines that the server would take (RESNET_BACKEND). On a random third of
the images, the order of the views and the thresholds are searched; on the others they are certified: with the stated
confidence, the label is not the one of all views for at most the share --disagreement of images like these. See
server/thresholds.py for the method and for what is not promised. The result is written to stopping.json in the bundle;
it belongs to these weights, backends and precisions.

IMAGES holds pictures, in one folder for each label or not, or CIFAR's official files, of which the validation images
are taken. They must be drawn like those to be served, and independently: frames of one film are not. Decide on
--disagreement before: who tries several on the same images and keeps the best has less confidence than it says. With
labels, one temperature for each stop rule is fitted too, and errors are reported.

With --draft, `calibrated` decodes large JPEGs smaller, which is faster and changes views a bit (server/images.py). It
is then followed on such drafts and compared with all views of the pictures decoded whole, so the guarantee is for both
together; and for the pictures that are made smaller alone, too, so enough of IMAGES must be that large. If drafts can't
be certified even where only proofs stop, `calibrated` decodes whole and stops at proofs only, since thresholds without
drafts would be a second try on the same images.
"""

import argparse
import logging
import math
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from resnet_ensemble.export import engine_store, host, labelled
from resnet_ensemble.export.bundle import Bundle, BundleError
from resnet_ensemble.export.engines import ON, BackendUnavailable, Engine
from resnet_ensemble.export.labelled import PictureUnreadable
from resnet_ensemble.server import calibration, images, temperature, thresholds
from resnet_ensemble.server.calibration import Calibration, Draft, RuleCost, Temperature
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.plan import Step
from resnet_ensemble.server.settings import Settings, SettingsError, from_environment
from resnet_ensemble.server.thresholds import Answers, Certificate, Drafts, Stops, TooFewImages
from resnet_ensemble.training import cifar
from resnet_ensemble.training.files import check_writable
from resnet_ensemble.training.pixels import SUFFIXES
from resnet_ensemble.training.views import ALL_PROTOCOLS, block_sizes, largest_side, make_blocks

log = logging.getLogger(__name__)

SEED = 0
DRAFT = 2  # the least that a draft has of the shorter side of what views are cut from, so that resizing still averages
_IMAGES_A_RUN = 8  # 80 views of ten crops
_FEWEST = 3  # one of three searches
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Pictures:
    """What to calibrate on.

    - decode: gives one as RGB
    - labels: int64 (images,), if all are known
    - drafted: whether one can be decoded with so many pixels left on its shorter side; draft: that
    """

    name: str
    count: int
    decode: Callable[[int], Image.Image]
    labels: NDArray[np.int64] | None
    drafted: Callable[[int, int], bool] = lambda *_: False
    draft: Callable[[int, int], Image.Image] | None = None

    def drafts(self, chosen: NDArray[np.int64], shorter_side: int) -> "Pictures":
        """Some, decoded smaller."""
        assert self.draft
        decode = self.draft
        return Pictures(self.name, len(chosen), lambda i: decode(chosen[i], shorter_side), None)


def find_pictures(folder: Path, labels: tuple[str, ...], max_pixels: int) -> Pictures:
    """A folder's pictures, or CIFAR's validation images. Raises DataError."""
    if files := labelled.find(folder, labels):

        def decode(index: int, draft: int | None = None) -> Image.Image:
            with _named(files[index].path):
                return images.decode(files[index].read(), max_pixels=max_pixels, draft=draft)

        def drafted(index: int, draft: int) -> bool:
            with _named(files[index].path):
                return images.is_drafted(files[index].read(), draft)

        known, found = [file.label is not None for file in files], None
        if all(known):
            found = np.array([file.label for file in files])
        elif any(known):
            log.warning(
                "%d of the %d pictures in %s are in no folder that is named like a label, the first of them %s: "
                "there will be no errors and no temperatures",
                known.count(False),
                len(files),
                folder,
                files[known.index(False)].path,
            )
        return Pictures(labelled.name_of(folder), len(files), decode, found, drafted, decode)
    dataset = next((known for known in cifar.DATASETS.values() if known.labels == labels), None)
    if dataset is None:
        raise cifar.DataError(f"no pictures in {folder} ({', '.join(SUFFIXES)})")
    chosen = cifar.read(folder, "val", dataset)
    name = f"{dataset.title} val"
    return Pictures(name, len(chosen.images), lambda i: Image.fromarray(chosen.images[i]), chosen.labels)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise cifar.DataError(f"{file}: {error}; remove it from the folder") from None
    except PictureUnreadable as error:
        raise cifar.DataError(str(error)) from None


def steps(members: int, protocol: str) -> list[Step]:
    """Every view of every member, in the order in which `run` gives their answers."""
    sizes = block_sizes(protocol)
    return [Step(m, b, v) for m in range(members) for b, size in enumerate(sizes) for v in range(size)]


def run(
    bundle: Bundle, engines: Sequence[Engine], pictures: Pictures, protocol: str
) -> tuple[NDArray[np.float32], list[list[float]]]:
    """Every view of every image on every member.

    Returns softmax vectors (images, steps, classes), and seconds of one view for each member and block: the median over
    all runs, since plans and thresholds outlive the moment in which this host was busy with something else.
    """
    members = bundle.manifest.members
    sizes = block_sizes(protocol)
    vectors = np.empty((pictures.count, len(members) * sum(sizes), len(bundle.manifest.labels)), np.float32)
    timed: list[list[list[float]]] = [[[] for _ in sizes] for _ in members]
    gpu = threading.Lock()  # runs side by side would wait for each other, and all seem as slow as the slowest
    turns = [gpu if engine.info.backend in ON["cuda"] else nullcontext() for engine in engines]

    def run_some(start: int) -> int:
        chosen = range(start, min(start + _IMAGES_A_RUN, pictures.count))
        decoded = [pictures.decode(index) for index in chosen]
        for place, (member, engine) in enumerate(zip(members, engines, strict=True)):
            images_blocks = [make_blocks(image, member.preprocessing, protocol) for image in decoded]
            step = place * sum(sizes)
            for block, size in enumerate(sizes):
                groups: defaultdict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)
                for index, blocks in zip(chosen, images_blocks, strict=True):
                    groups[blocks[block].shape].append((index, blocks[block]))
                for group in groups.values():
                    views = np.concatenate([views for _, views in group])
                    with turns[place]:
                        began = time.perf_counter()
                        answers = engine.run(views)
                        seconds = time.perf_counter() - began
                    timed[place][block].append(seconds / len(views))
                    indices = [index for index, _ in group]
                    vectors[indices, step : step + size] = answers.reshape(len(group), size, -1)
                step += size
        return len(chosen)

    starts = range(0, pictures.count, _IMAGES_A_RUN)
    progress = tqdm(total=pictures.count, desc=f"{protocol}, every view", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor(host.cores()) as streams, progress:
        for done in streams.map(run_some, starts):
            progress.update(done)
    return vectors, [[statistics.median(seconds) for seconds in blocks] for blocks in timed]


def check_count(count: int, planned: int, disagreement: float, confidence: float) -> None:
    """Raise TooFewImages if so many can't show what is asked."""
    if planned < 2:
        raise TooFewImages("the plan has a single view, which no stop rule can save; choose a protocol with more")
    needed = max(_FEWEST, thresholds.images_needed(disagreement, confidence))
    if count < needed:
        reachable = math.ceil(1e4 * thresholds.smallest_disagreement(count, confidence)) / 1e4
        possible = count >= _FEWEST and reachable < 1
        raise TooFewImages(
            f"{count} images can't certify a disagreement of at most {disagreement:g} with confidence {confidence:g}: "
            f"it takes at least {needed}" + (f"; with these, ask for --disagreement {reachable:g} or more" * possible)
        )


def draft_side(bundle: Bundle, protocol: str) -> int:
    """Pixels of the shorter side that a draft must keep for every member's views."""
    return DRAFT * max(largest_side(member.preprocessing, protocol) for member in bundle.manifest.members)


def find_drafted(pictures: Pictures, shorter_side: int, disagreement: float, confidence: float) -> NDArray[np.bool_]:
    """Which pictures can be decoded smaller, (images,). Raises TooFewImages if they can't show what is asked."""
    drafted = np.array([pictures.drafted(index, shorter_side) for index in range(pictures.count)])
    _, to_certify = thresholds.split(pictures.count, SEED)
    count, needed = int(drafted[to_certify].sum()), thresholds.certifying_needed(disagreement, confidence)
    if count < needed:
        raise TooFewImages(
            f"{count} of the {len(to_certify)} images that certify can be decoded smaller: JPEGs with even sides, the "
            f"shorter one of {2 * shorter_side} pixels or more. It takes at least {needed} to certify drafts; add such "
            "images, or calibrate without --draft"
        )
    return drafted


def calibrate(
    bundle: Bundle,
    engines: Sequence[Engine],
    pictures: Pictures,
    protocol: str,
    *,
    disagreement: float,
    confidence: float,
    draft: bool = False,
) -> Calibration:
    """Run, search, certify. Raises TooFewImages before anything is run, and DataError.

    - draft: certify drafts too; what is returned has none if they can't be
    """
    every = steps(len(engines), protocol)
    check_count(pictures.count, len(every), disagreement, confidence)
    shorter_side = draft_side(bundle, protocol)
    drafted = find_drafted(pictures, shorter_side, disagreement, confidence) if draft else None
    vectors, seconds = run(bundle, engines, pictures, protocol)
    whole = Answers(
        vectors,
        np.array([step.member for step in every]),
        np.array([seconds[step.member][step.block] for step in every]),
    )
    seen = whole
    if drafted is not None:
        (chosen,) = drafted.nonzero()
        changed = vectors.copy()  # what no draft changes is not run again
        changed[chosen], _ = run(bundle, engines, pictures.drafts(chosen, shorter_side), protocol)
        labels = vectors.sum(axis=1, dtype=np.float64).argmax(axis=1)
        seen = replace(whole, vectors=changed, drafts=Drafts(drafted, labels))
    to_search, to_certify = thresholds.split(pictures.count, SEED)
    found = thresholds.search(seen.of(to_search), disagreement)
    walks = thresholds.walk(seen.of(to_certify), found.order, found.checkpoints)
    certificate = thresholds.certify(walks, found.thresholds, disagreement, confidence)
    exact = _Way(whole, thresholds.cheapest_first(whole.seconds), found.checkpoints, found.thresholds[0])
    if certificate is None:  # proofs on whole pictures need none
        certificate, calibrated = Certificate(0, len(to_certify), 0), exact
    else:
        calibrated = _Way(seen, found.order, found.checkpoints, found.thresholds[certificate.chosen])
        proven = replace(exact, answers=seen)
        # Careful thresholds may stop later, in the order that was found, than proofs do in the cheapest one. Without
        # any, that order has no advantage.
        if not certificate.chosen or calibrated.seconds(to_search) >= proven.seconds(to_search):
            calibrated, certificate = proven, thresholds.certify(walks, found.thresholds[:1], disagreement, confidence)
            assert certificate is not None  # it passed before the others
    drafts = None
    if calibrated.answers.drafts:
        drafts = Draft(
            shorter_side=shorter_side, images=certificate.drafted, disagreements=certificate.drafted_disagreements
        )
    stops = {"exact": exact.stops(to_certify), "calibrated": calibrated.stops(to_certify)}
    errors, temperatures = None, None
    if pictures.labels is not None:
        truth = pictures.labels[to_certify]
        given = {"full": walks.expected, "calibrated": stops["calibrated"].labels}
        errors = {name: 100 * float((labels != truth).mean()) for name, labels in given.items()}
        means = {
            "full": whole.vectors.mean(axis=1, dtype=np.float64),
            "exact": exact.means(),
            "calibrated": calibrated.means(),
        }
        labels = pictures.labels
        temperatures = {
            name: _temperature(mean, labels)
            for name, mean in means.items()
            if (mean.argmax(axis=1) != labels).sum() >= temperature.FEWEST_WRONG
        }
    return Calibration(
        protocol=protocol,
        engines=calibration.kinds(bundle, [engine.info for engine in engines]),
        plan=tuple(every[step] for step in calibrated.order),
        checkpoints=found.checkpoints,
        thresholds=tuple(None if math.isinf(value) else float(value) for value in calibrated.thresholds),
        disagreement=disagreement,
        confidence=confidence,
        images=pictures.name,
        images_searched=len(to_search),
        images_certified=certificate.images,
        disagreements=certificate.disagreements,
        planned=len(every),
        seconds=tuple(tuple(row) for row in seconds),
        costs={
            name: RuleCost(
                views=float(stop.views.mean()), cost=min(1.0, float(stop.seconds.mean() / walks.seconds[-1]))
            )
            for name, stop in stops.items()
        },
        errors=errors,
        temperatures=temperatures,
        draft=drafts,
    )


@dataclass(frozen=True)
class _Way:
    """A plan with thresholds, and what it is followed on."""

    answers: Answers
    order: NDArray[np.int64]
    checkpoints: tuple[int, ...]
    thresholds: NDArray[np.float64]

    def stops(self, images: NDArray[np.int64]) -> Stops:
        return thresholds.follow(
            thresholds.walk(self.answers.of(images), self.order, self.checkpoints), self.thresholds
        )

    def seconds(self, images: NDArray[np.int64]) -> float:
        """Of an image, on average."""
        return float(self.stops(images).seconds.mean())

    def means(self) -> NDArray[np.float64]:
        """Of all images."""
        views = self.stops(np.arange(len(self.answers.vectors))).views
        return thresholds.means(self.answers, self.order, views)


def _temperature(means: NDArray[np.float64], labels: NDArray[np.int64]) -> Temperature:
    after = temperature.held_out(means, labels)
    return Temperature(
        temperature=temperature.fit(means, labels),
        images=len(labels),
        folds=temperature.FOLDS,
        bins=temperature.BINS,
        error_before=temperature.calibration_error(means, labels),
        error_after=temperature.calibration_error(after, labels),
        loss_before=temperature.loss(means, labels),
        loss_after=temperature.loss(after, labels),
    )


def report(found: Calibration) -> str:
    """What was found, for people."""
    exact, calibrated = found.costs["exact"], found.costs["calibrated"]
    parts = f"{found.images_searched} images to search, {found.images_certified} to certify"
    other = f"{found.disagreements} of {found.images_certified}"
    guarantee = (
        f"With confidence {found.confidence:g}, `calibrated` gives another label than all views to at most "
        f"{100 * found.disagreement:g} % of such images."
    )
    lines = [
        f"{found.protocol} on {found.images}: {parts}",
        "",
        "| stop rule | views | cost | other label than full |",
        "|---|---|---|---|",
        f"| full | {found.planned} | 1 | |",
        f"| exact | {exact.views:.2f} | {exact.cost:.3f} | 0 |",
        f"| calibrated | {calibrated.views:.2f} | {calibrated.cost:.3f} | {other} |",
        "",
        guarantee,
    ]
    if found.rule.checkpoints:
        pairs = zip(found.rule.checkpoints, found.rule.thresholds, strict=True)
        lines.append("Stops after " + ", ".join(f"{views} from a lead of {value:.4f}" for views, value in pairs) + ".")
    else:
        where = " on drafts" if found.draft else ""
        lines.append(f"Nothing cheaper than `exact` could be certified: `calibrated` is `exact`{where}.")
    if found.draft:
        lines.append(
            f"JPEGs are decoded smaller, to no less than {found.draft.shorter_side} pixels on the shorter side. Of the "
            f"images that certify {found.draft.images} were, and {found.draft.disagreements} of these got another "
            "label: the guarantee is for such images alone, too."
        )
    if found.errors is not None:
        lines.append(
            f"Top-1 error on the images that certify: full {found.errors['full']:.2f} %, "
            f"calibrated {found.errors['calibrated']:.2f} %."
        )
        lines.extend(_told(rule, (found.temperatures or {}).get(rule)) for rule in ("full", *found.costs))
    return "\n".join(lines)


def _told(rule: str, fit: Temperature | None) -> str:
    if fit is None:
        return f"No temperature of {rule}: fewer than {temperature.FEWEST_WRONG} of its labels are wrong."
    return (
        f"Temperature of {rule}: {fit.temperature:.3f}; on images that it was not fitted on, calibration error "
        f"{fit.error_before:.4f} before, {fit.error_after:.4f} after ({fit.bins} bins of equal width); loss "
        f"{fit.loss_before:.4f}, {fit.loss_after:.4f}" + ("." if fit.helps else ": it does not help, and is not used.")
    )


def _share(text: str) -> float:
    value = float(text)
    if not _LEAST_SHARE <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between {_LEAST_SHARE:g} and 1")
    return value


def _settings() -> Settings:
    settings = from_environment()
    if settings.backend == "fake":
        raise SettingsError("thresholds of the fake backend would mean nothing; set RESNET_BACKEND to another one")
    return settings


def main() -> None:
    """Parse the command line and calibrate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle's folder; stopping.json is written into it")
    parser.add_argument("images", type=Path, help="pictures, or CIFAR's official files")
    parser.add_argument(
        "--disagreement", type=_share, default=0.005, help="share of images that may get another label (default: 0.005)"
    )
    parser.add_argument("--confidence", type=_share, default=0.95, help="that it is no more (default: 0.95)")
    parser.add_argument("--protocol", choices=ALL_PROTOCOLS, help="(default: the bundle's)")
    parser.add_argument("--draft", action="store_true", help="large JPEGs may be decoded smaller; certify that, too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        settings = _settings()
        bundle = Bundle.open(arguments.bundle)
        protocol = arguments.protocol or bundle.manifest.protocol
        calibration.read(bundle)  # a damaged file is found before the long part, and one that can't be written
        check_writable(bundle.path / calibration.FILE)
        pictures = find_pictures(arguments.images, bundle.manifest.labels, settings.max_image_pixels)
        backend = settings.asked_backend
        engines = [engine_store.open_engine(bundle, member, backend) for member in bundle.manifest.members]
        found = calibrate(
            bundle,
            engines,
            pictures,
            protocol,
            disagreement=arguments.disagreement,
            confidence=arguments.confidence,
            draft=arguments.draft,
        )
        for engine in engines:
            engine.close()
        calibration.write(bundle, found)
    except (SettingsError, BundleError, BackendUnavailable, TooFewImages, cifar.DataError, OSError) as problem:
        sys.exit(f"calibrate: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)  # as of a command that SIGINT ends
    print(report(found))
    if arguments.draft and not found.draft:
        print(
            "Drafts could not be certified, whatever the thresholds: `calibrated` decodes everything whole. To have "
            "thresholds, calibrate without --draft, on other images: on these it would be a second try."
        )
    print(f"Written to {bundle.path / calibration.FILE}.")


if __name__ == "__main__":
    main()
