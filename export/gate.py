"""The gate: is an engine of lower precision still the same classifier? And the pictures that decide it.

An engine passes if, over the gate's views, its top-1 class is the FP32 engine's often enough, no probability differs by
more than a limit, and, where labels are given, its error is not higher by more than a margin.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from resnet_ensemble.export import golden, labelled
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engines import Engine, Precision
from resnet_ensemble.export.labelled import SUFFIXES, PictureUnreadable
from resnet_ensemble.training.views import Preprocessing, make_views

_T = TypeVar("_T")
MOST_IMAGES = 512
BATCH = 16
# INT8 is calibrated on about as many views: of few pictures several each, the centre first, then corners and mirrors
# in turn. On 72 photographs that it hadn't seen, a ResNet-18 calibrated on four views of 71 others differed from FP32
# by 0.011 (the mean of each picture's largest difference of a probability), on one view by 0.014.
CALIBRATION_VIEWS = 640
CALIBRATION_ORDER = (4, 0, 8, 2, 6, 1, 3, 5, 7, 9)  # of the protocol `10crop`


class CalibrationError(Exception):
    """The folder given for calibration has no pictures, or one of them can't be read."""


@dataclass(frozen=True)
class Limit:
    """What is allowed: the lowest share of equal top-1 classes, the largest difference of one probability."""

    agreement: float
    difference: float


# On 143 photographs, center view, BF16 agreed on 98.6 and 99.3 % (ResNet-18 and 50), with differences up to 0.033.
# FP16 differed by 0.0015 on the golden views of the shipped ResNet-20, through ONNX Runtime.
LIMITS: dict[Precision, Limit] = {
    "fp32": Limit(0.999, 1e-3),
    "fp16": Limit(0.99, 0.05),
    "bf16": Limit(0.97, 0.15),
    "int8": Limit(0.95, 0.35),
    "fp8": Limit(0.95, 0.35),
}
# Of what an ensemble of several members answers, over ten crops (choice.py).
ENSEMBLE = Limit(0.98, 0.35)
# The ten crops of so many pictures take a ResNet-50 in FP32 two minutes on two cores.
ENSEMBLE_IMAGES = 150
# Points by which the error on labelled pictures may be higher than FP32's.
ERROR_MARGIN = 1.0


@dataclass(frozen=True)
class Pictures:
    """The views that an engine is compared on.

    - views: uint8 (n, h, w, 3); labels of each, where they are known
    - calibration: views of the same pictures to calibrate INT8 on, uint8 (m, h, w, 3)
    - identity: a hash of all that
    - encoded: up to 150 of the pictures, for the gate of the ensemble; labels of each, where they are known
    """

    views: NDArray[np.uint8]
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
    error: float | None
    reference_error: float | None

    def verdict(self, limit: Limit) -> str:
        """`passed`, or why not."""
        if not self.agreement >= limit.agreement:
            return f"top-1 agreement {self.agreement:.1%} is below {limit.agreement:.1%}"
        if not self.difference <= limit.difference:
            return f"a probability differs by {self.difference:.2f}, more than {limit.difference:g}"
        if self.error is not None and self.reference_error is not None:
            worse = self.error - self.reference_error
            if not worse <= ERROR_MARGIN:
                return f"its error is {worse:.1f} points higher than FP32's, more than {ERROR_MARGIN:g}"
        return "passed"


def from_folder(folder: Path, seen: Preprocessing, labels: tuple[str, ...]) -> Pictures:
    """Center views of up to 512 pictures of a folder, evenly chosen. Raises CalibrationError.

    They are labelled if all of them are in folders that tell their class (labelled.py).
    """
    files = labelled.find(folder, labels)
    if not files:
        raise CalibrationError(f"no pictures in {folder} ({', '.join(SUFFIXES)})")
    chosen = _evenly(files, MOST_IMAGES)
    each = max(1, min(len(CALIBRATION_ORDER), CALIBRATION_VIEWS // len(chosen)))
    digest = hashlib.sha256(f"{each}".encode())
    crops = []  # of each picture (each, h, w, 3), the centre first
    encoded = []
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
    known = [-1 if picture.label is None else picture.label for picture in chosen]
    found = np.array(known) if min(known) >= 0 else None
    digest.update(f"{None if found is None else known}".encode())
    return Pictures(
        views=np.stack([crop[0] for crop in crops]),
        labels=found,
        calibration=np.concatenate(crops),
        identity=digest.hexdigest(),
        encoded=tuple(_evenly(encoded, ENSEMBLE_IMAGES)),
        encoded_labels=None if found is None else np.array(_evenly(found.tolist(), ENSEMBLE_IMAGES)),
    )


def upright(encoded: bytes) -> Image.Image:
    """A picture as it is served: RGB, turned as its EXIF says. Decoders raise almost anything on damaged ones."""
    return ImageOps.exif_transpose(Image.open(BytesIO(encoded))).convert("RGB")


def _evenly(items: list[_T], most: int) -> list[_T]:
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items


def from_golden(bundle: Bundle, member: Member) -> Pictures:
    """All views of the bundle's golden pictures under its golden protocol."""
    pictures = bundle.manifest.golden
    views = np.concatenate([golden.views(bundle, picture, member) for picture in pictures])
    identity = hashlib.sha256("".join(picture.sha256 for picture in pictures).encode()).hexdigest()
    return Pictures(views, None, views, identity, tuple(map(bundle.read, pictures)), None)


def answers(engine: Engine, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities (n, classes) of every view."""
    return np.concatenate([engine.run(batch) for batch in batches(views)])


def batches(views: NDArray[np.uint8]) -> Iterable[NDArray[np.uint8]]:
    """The views in batches of 16."""
    return (views[i : i + BATCH] for i in range(0, len(views), BATCH))


def compare(found: NDArray[np.float32], reference: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Finding:
    """An engine's answers beside FP32's. One that is no number agrees with nothing, and differs by 1."""
    top, expected = np.where(np.isfinite(found).all(1), found.argmax(1), -1), reference.argmax(1)
    return Finding(
        views=len(found),
        agreement=float((top == expected).mean()),
        difference=float(np.nan_to_num(np.abs(found - reference), nan=1.0, posinf=1.0).max()),
        error=None if labels is None else 100 * float((top != labels).mean()),
        reference_error=None if labels is None else 100 * float((expected != labels).mean()),
    )
