"""The gate: is an engine of lower precision still the same classifier? And the pictures that decide it.

An engine passes if, over the gate's views, its top-1 class is the FP32 engine's often enough, no probability differs by
more than a limit, the score of every class rises and falls with FP32's, no answer depends on the batch, and, where
labels are given, its error is not higher by more than a margin. The views come in batches of every size that engines
are built and timed for, and some are whole pictures of several shapes: a backend may have other kernels for each.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet_ensemble.export import golden, labelled
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engines import BUCKETS, Engine, Precision
from resnet_ensemble.export.labelled import PictureUnreadable
from resnet_ensemble.training import pixels
from resnet_ensemble.training.views import Preprocessing, make_blocks, make_views

_T = TypeVar("_T")
MOST_IMAGES = 512
# One of so many is what INT8 may disagree on.
FEWEST_IMAGES = 20
BATCHES = BUCKETS  # views in a run, in turn
WHOLE_IMAGES = 8
CALIBRATION_BATCH = 16
# INT8 is calibrated on about as many views: of few pictures several each, the centre first, then corners and mirrors
# in turn. On 72 photographs that it hadn't seen, a ResNet-18 calibrated on four views of 71 others differed from FP32
# by 0.011 (the mean of each picture's largest difference of a probability), on one view by 0.014.
CALIBRATION_VIEWS = 640
CALIBRATION_ORDER = (4, 0, 8, 2, 6, 1, 3, 5, 7, 9)  # of the protocol `10crop`


class CalibrationError(Exception):
    """The folder given for calibration has no pictures, or too few, or one of them can't be read."""


@dataclass(frozen=True)
class Limit:
    """What is allowed.

    - agreement: the lowest share of equal top-1 classes
    - difference: the largest of one probability
    - correlation: the lowest of one class's scores with FP32's
    - unsteadiness: the largest difference of one probability in batches of two sizes
    """

    agreement: float
    difference: float
    correlation: float
    unsteadiness: float = 0.05  # on CPUs it was 0; kernels of GPUs, and with them rounding, depend on the batch


# On 143 photographs, center view, BF16 agreed on 98.6 and 99.3 % (ResNet-18 and 50), with differences up to 0.033.
# FP16 differed by 0.0015 on the golden views of the shipped ResNet-20, through ONNX Runtime.
#
# Where two classes are exchanged that are rarely the first, agreement and difference pass: of the shipped networks'
# INT8 up to 6 of 45 pairs, on the golden pictures; of a ResNet-18's and 50's INT8 158 to 164 of 200 pairs, on 143
# photographs. The lowest correlation was 0.73 at most then, so none passed the limit; of the engines themselves it was
# 0.989 or more in INT8, and 0.9989 in BF16 (two Zen 4 cores, 2026-11-27).
LIMITS: dict[Precision, Limit] = {
    "fp32": Limit(0.999, 1e-3, 0.99, 1e-3),
    "fp16": Limit(0.99, 0.05, 0.98),
    "bf16": Limit(0.97, 0.15, 0.95),
    "int8": Limit(0.95, 0.35, 0.85),
    "fp8": Limit(0.95, 0.35, 0.85),
}
# Of what an ensemble of several members answers, over ten crops (choice.py). Each has passed by itself.
ENSEMBLE = Limit(0.98, 0.35, -1.0)
# The ten crops of so many pictures take a ResNet-50 in FP32 two minutes on two cores.
ENSEMBLE_IMAGES = 150
# Points by which the error on labelled pictures may be higher than FP32's.
ERROR_MARGIN = 1.0
# Probabilities below count as so much in the correlation, and scores that vary by less are taken for constant.
_LEAST = 1e-6
_STILL = 0.01


@dataclass(frozen=True)
class Pictures:
    """What an engine is compared on.

    - count: of the pictures
    - views: uint8 (n, h, w, 3), crops
    - whole: of some pictures, the views of `dense`, each uint8 (m, h, w, 3)
    - labels: of the crops and then of the whole views, where they are known
    - calibration: views of the same pictures to calibrate INT8 on, uint8 (k, h, w, 3)
    - identity: a hash of all that
    - encoded: up to 150 of the pictures, for the gate of the ensemble; labels of each, where they are known
    """

    count: int
    views: NDArray[np.uint8]
    whole: tuple[NDArray[np.uint8], ...]
    labels: NDArray[np.int64] | None
    calibration: NDArray[np.uint8]
    identity: str
    encoded: tuple[bytes, ...]
    encoded_labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Finding:
    """Answers beside FP32's: an engine's to the gate's views, an ensemble's to pictures. Errors in %, or None."""

    views: int
    agreement: float
    difference: float
    correlation: float
    error: float | None
    reference_error: float | None
    unsteadiness: float = 0.0

    def verdict(self, limit: Limit) -> str:
        """`passed`, or why not."""
        if not self.agreement >= limit.agreement:
            return f"top-1 agreement {self.agreement:.2%} is below {limit.agreement:.1%}"
        if not self.difference <= limit.difference:
            return f"a probability differs by {self.difference:.2f}, more than {limit.difference:g}"
        if not self.correlation >= limit.correlation:
            return f"a class's scores have a correlation of {self.correlation:.2f}, below {limit.correlation:g}"
        if not self.unsteadiness <= limit.unsteadiness:
            return f"a probability depends on the batch by {self.unsteadiness:.2g}, more than {limit.unsteadiness:g}"
        if self.error is not None and self.reference_error is not None:
            worse = self.error - self.reference_error
            if not worse <= ERROR_MARGIN:
                return f"its error is {worse:.1f} points higher than FP32's, more than {ERROR_MARGIN:g}"
        return "passed"


def from_folder(folder: Path, seen: Preprocessing, labels: tuple[str, ...]) -> Pictures:
    """Views of up to 512 pictures of a folder, evenly chosen. Raises CalibrationError.

    The centres are compared, and of few pictures further crops. They are labelled if all of them are in folders that
    tell their class (labelled.py).
    """
    if not folder.is_dir():
        raise CalibrationError(f"there is no folder {folder}")
    files = labelled.find(folder, labels)
    if not files:
        raise CalibrationError(f"no pictures in {folder} ({', '.join(pixels.SUFFIXES)})")
    if len(files) < FEWEST_IMAGES:
        raise CalibrationError(f"{len(files)} pictures in {folder} are too few; give {FEWEST_IMAGES} or more")
    chosen = _evenly(files, MOST_IMAGES)
    each = max(1, min(len(CALIBRATION_ORDER), CALIBRATION_VIEWS // len(chosen)))
    compared = min(each, math.ceil(sum(BATCHES) / len(chosen)))
    digest = hashlib.sha256(f"{each}".encode())
    crops, encoded = [], []  # crops: of each picture (each, h, w, 3), the centre first
    whole: list[NDArray[np.uint8]] = []
    for picture in chosen:
        try:
            content = picture.read()
        except PictureUnreadable as error:
            raise CalibrationError(str(error)) from None
        encoded.append(content)
        digest.update(hashlib.sha256(content).digest())
        try:
            image = upright(content)
        except Exception as error:  # noqa: BLE001  # decoders raise almost anything when fed damaged files
            raise CalibrationError(f"{picture.path} can't be decoded ({error}); remove it from the folder") from None
        crops.append(make_views(image, seen, "10crop")[list(CALIBRATION_ORDER[:each])])
        if len(whole) < WHOLE_IMAGES:
            whole += make_blocks(image, seen, "dense")
    known = [-1 if picture.label is None else picture.label for picture in chosen]
    found = np.array(known) if min(known) >= 0 else None
    digest.update(f"{None if found is None else known}".encode())
    return Pictures(
        count=len(chosen),
        views=np.concatenate([crop[:compared] for crop in crops]),
        whole=tuple(whole),
        labels=None if found is None else np.concatenate([found.repeat(compared), *_of_whole(found, whole)]),
        calibration=np.concatenate(crops),
        identity=digest.hexdigest(),
        encoded=tuple(_evenly(encoded, ENSEMBLE_IMAGES)),
        encoded_labels=None if found is None else np.array(_evenly(found.tolist(), ENSEMBLE_IMAGES)),
    )


def _of_whole(labels: NDArray[np.int64], whole: list[NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
    return [label.repeat(len(views)) for label, views in zip(labels, whole, strict=False)]  # of the first pictures


def upright(encoded: bytes) -> Image.Image:
    """A picture as it is served: RGB, turned as its EXIF says. Decoders raise almost anything on damaged ones."""
    image = Image.open(BytesIO(encoded), formats=pixels.FORMATS)
    if pixels.is_extreme(image.size):
        raise ValueError(f"it is {image.width} x {image.height}, too long for its width")
    image.load()
    return pixels.to_rgb(image)


def _evenly(items: list[_T], most: int) -> list[_T]:
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items


def from_golden(bundle: Bundle, member: Member) -> Pictures:
    """All views of the bundle's golden pictures under its golden protocol, and their whole views."""
    pictures = bundle.manifest.golden
    views = np.concatenate([golden.views(bundle, picture, member) for picture in pictures])
    encoded = tuple(map(bundle.read, pictures))
    whole = [block for content in encoded for block in make_blocks(upright(content), member.preprocessing, "dense")]
    identity = hashlib.sha256("".join(picture.sha256 for picture in pictures).encode()).hexdigest()
    return Pictures(len(pictures), views, tuple(whole), None, views, identity, encoded, None)


def examine(engine: Engine, pictures: Pictures, reference: NDArray[np.float32]) -> Finding:
    """An engine beside FP32's answers to the same pictures."""
    found = answers(engine, pictures)
    again = pictures.views[: sum(BATCHES)]  # each in a batch of another size than before
    others = np.concatenate([engine.run(views) for views in _batches(again, BATCHES[::-1])])
    unsteadiness = float(_differences(found[: len(again)], others).max())
    return replace(compare(found, reference, pictures.labels), unsteadiness=unsteadiness)


def answers(engine: Engine, pictures: Pictures) -> NDArray[np.float32]:
    """Probabilities (n, classes) of every crop, in batches of every size, and then of every whole view."""
    return np.concatenate([engine.run(views) for views in (*_batches(pictures.views, BATCHES), *pictures.whole)])


def _batches(views: NDArray[np.uint8], sizes: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """The views, in batches of these sizes in turn."""
    starts = itertools.accumulate(itertools.cycle(sizes), initial=0)
    for start, stop in itertools.pairwise(starts):
        if start >= len(views):
            return
        yield views[start:stop]


def calibration_batches(views: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The views in batches of 16."""
    return [views[i : i + CALIBRATION_BATCH] for i in range(0, len(views), CALIBRATION_BATCH)]


def compare(found: NDArray[np.float32], reference: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Finding:
    """An engine's answers beside FP32's. One that is no number agrees with nothing, and differs by 1."""
    top, expected = _top(found), reference.argmax(1)
    return Finding(
        views=len(found),
        agreement=float((top == expected).mean()),
        difference=float(_differences(found, reference).max()),
        correlation=_correlation(found, reference),
        error=None if labels is None else 100 * float((top != labels).mean()),
        reference_error=None if labels is None else 100 * float((expected != labels).mean()),
    )


def agreement(found: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """That part of `compare` which tells most of those that will not pass, in a hundredth of the time."""
    return float((_top(found) == reference.argmax(1)).mean())


def _top(answers: NDArray[np.float32]) -> NDArray[np.int64]:
    top: NDArray[np.int64] = np.where(np.isfinite(answers).all(1), answers.argmax(1), -1)
    return top


def _differences(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    differences: NDArray[np.float32] = np.nan_to_num(np.abs(one - other), nan=1.0, posinf=1.0)
    return differences


def _correlation(found: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The lowest of any class, over the views; of the logarithms of probabilities beside their mean over classes."""
    a, b = _scores(found), _scores(reference)  # (n, classes), each class around its mean
    covariance = (a * b).mean(axis=0) + _STILL**2
    deviations = np.sqrt(((a * a).mean(axis=0) + _STILL**2) * ((b * b).mean(axis=0) + _STILL**2))
    return float((covariance / deviations).min())


def _scores(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    scores = np.log(np.clip(probabilities.astype(np.float64), _LEAST, 1.0))
    scores -= scores.mean(axis=1, keepdims=True)
    centred: NDArray[np.float64] = scores - scores.mean(axis=0)
    return centred
