"""The golden check: does an engine still give the probabilities that torch gave when the bundle was exported?"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet_ensemble.export.bundle import Bundle, BundleError, Golden, Member
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.training.views import make_views


class GoldenMismatch(BundleError):
    """An engine is not the classifier that the bundle describes."""


def views(bundle: Bundle, golden: Golden, member: Member) -> NDArray[np.uint8]:
    """A golden picture as a member sees it under the golden protocol: uint8 (n, h, w, 3)."""
    image = Image.open(io.BytesIO(bundle.read(golden)), formats=["PNG"]).convert("RGB")
    return make_views(image, member.preprocessing, bundle.manifest.golden_protocol)


def difference(engine: Engine, bundle: Bundle, member: Member) -> tuple[float, str]:
    """The largest difference from a golden probability, 1 where an answer is no number, and the picture's file."""
    worst, worst_file = 0.0, ""
    for golden in bundle.manifest.golden:
        mean = engine.run(views(bundle, golden, member)).astype(np.float64).mean(axis=0)  # (classes,)
        found = float(np.nan_to_num(np.abs(mean - golden.probabilities[member.name]), nan=1.0, posinf=1.0).max())
        if found > worst:
            worst, worst_file = found, golden.file
    return worst, worst_file


def check(engine: Engine, bundle: Bundle, member: Member, *, allowed: float) -> float:
    """The largest difference from a golden probability. Raises GoldenMismatch above what is allowed."""
    worst, worst_file = difference(engine, bundle, member)
    if worst > allowed:
        info = engine.info
        raise GoldenMismatch(
            f"{member.name} on {info.backend} {info.version} ({info.precision}) differs from the golden probabilities "
            f"of {worst_file} by {worst:.3g}; allowed: {allowed:g}. Either bundle.json was changed "
            f"(restore {bundle.path} or export it again with export/to_onnx.py) or this backend computes wrongly on "
            "this host (install another version of it)"
        )
    return worst
