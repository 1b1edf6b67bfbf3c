"""The scripts in clients/examples."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resnet_ensemble.client import ClassProbability, MemberVote, Prediction
from resnet_ensemble.client.batch._formats import FORMATS
from resnet_ensemble.client.batch._rows import Row, of_error, of_prediction


def row(path: Path, label: str, probability: float) -> Row:
    top = ClassProbability(label, 0, probability)
    votes = (MemberVote("resnet20", label, 0, probability),)
    prediction = Prediction(label, 0, probability, (top,), votes, "10crop", 20, 20, "cifar10-2-0", {}, "")
    return of_prediction(str(path), str(path), "", prediction, 1.0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_become_a_confusion_matrix_and_the_least_certain_pictures(root: Path, tmp_path: Path, kind: str) -> None:
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    rows = [
        row(tmp_path / "cat" / "1.png", "cat", 0.9),
        row(tmp_path / "dog" / "1.png", "cat", 0.4),
        row(tmp_path / "dog" / "in an archive.png", "dog", 0.6),
        of_error("x", "x", None, "corrupt_image", "cut off"),
    ]
    with (tmp_path / f"rows.{kind}").open("wb") as file:
        FORMATS[kind]().write(rows, file)

    command: list[Any] = [sys.executable, root / "clients" / "examples" / "confusion.py", f"rows.{kind}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout == "2 of 3 right; confusion.png\n"
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size == (1800, 840)
