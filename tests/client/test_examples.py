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


def confusion(root: Path, folder: Path, name: str) -> "subprocess.CompletedProcess[str]":
    command: list[Any] = [sys.executable, root / "clients" / "examples" / "confusion.py", name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_become_a_confusion_matrix_and_the_least_certain_pictures(root: Path, tmp_path: Path, kind: str) -> None:
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    first = row(tmp_path / "cat" / "1.png", "cat", 0.9) | {"bundle": "x" * 100_000}
    rows = [
        *[first] * 12,  # more than the megabyte that Arrow tells types from
        row(tmp_path / "cat" / "1.png", "cat", 0.9),
        row(tmp_path / "dog" / "1.png", "cat", 0.4),
        row(tmp_path / "dog" / "in an archive.png", "dog", 0.6),
        of_error("x", "x", None, "corrupt_image", "cut off"),
    ]
    with (tmp_path / f"rows.{kind}").open("wb") as file:
        FORMATS[kind]().write(rows, file)

    done = confusion(root, tmp_path, f"rows.{kind}")

    assert done.stdout == "14 of 15 right; confusion.png\n", done.stderr
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size == (1800, 840)


def test_rows_without_a_prediction_are_told(root: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        FORMATS["jsonl"]().write([of_error("x", "x", None, "corrupt_image", "cut off")], file)

    done = confusion(root, tmp_path, "rows.jsonl")

    assert (done.returncode, done.stderr) == (1, "there are no predictions in rows.jsonl\n")
