"""The model that the peers serve, as one writes it by hand: Pillow, the views, ONNX Runtime, a mean.

The geometry of views and the graphs are ours, so that every server computes the same answer and only serving differs.
What it needs besides is numpy, pillow and onnxruntime.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from resnet_ensemble.training.views import Preprocessing, make_views

_QUIET = 3  # errors only


class Model:
    """All members of a bundle in FP32.

    - threads: of one run; 0 is ONNX Runtime's own default, which is what people leave it at
    """

    def __init__(self, bundle: Path, protocol: str, threads: int) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads
        self._labels = manifest["labels"]
        self._protocol = protocol
        self._members = [
            (
                Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])}),
                onnxruntime.InferenceSession(str(bundle / member["file"]), options, providers=["CPUExecutionProvider"]),
            )
            for member in manifest["members"]
            for values in [member["preprocessing"]]
        ]

    def views(self, content: bytes) -> list[NDArray[np.uint8]]:
        """Of each member, (views, h, w, 3) of an encoded picture."""
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [make_views(image, preprocessing, self._protocol) for preprocessing, _ in self._members]

    def run(self, pictures: list[list[NDArray[np.uint8]]]) -> list[dict[str, Any]]:
        """Answers for several pictures, in one run a member."""
        sums = np.zeros((len(pictures), len(self._labels)))
        for position, (_, session) in enumerate(self._members):
            batch = np.concatenate([views[position] for views in pictures])  # (pictures * views, h, w, 3)
            rows = session.run(None, {"views": batch})[0]
            sums += rows.reshape(len(pictures), -1, len(self._labels)).mean(axis=1, dtype=np.float64)
        return [self._answer(row / len(self._members)) for row in sums]

    def _answer(self, probabilities: NDArray[np.float64]) -> dict[str, Any]:
        index = int(probabilities.argmax())
        return {"label": self._labels[index], "index": index, "probability": float(probabilities[index])}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What both peers are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--protocol", default="center")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="of one engine run (default: ONNX Runtime's own)")
    return parser
