"""Which classes are taken for which, and the pictures that the ensemble is least sure of, from a job's rows.

    resnet-batch photos/ --output predictions.parquet --top-k 10
    python clients/examples/confusion.py predictions.parquet --output confusion.png

The right class of a picture is the name of its folder (photos/cat/1.jpg). Needs pyarrow, matplotlib and Pillow.
The cells (# %%) run one by one in an editor or in Jupyter, too.
"""

# %% What there is
import argparse
import sys
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import matplotlib as mpl
import pyarrow as pa
import pyarrow.dataset as ds

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

# Said, because the first rows of JSON lines may have no error, or no prediction, for Arrow to tell the types from.
COLUMNS = pa.schema(
    {
        "path": pa.string(),
        "label": pa.string(),
        "probability": pa.float64(),
        "entropy": pa.float64(),
        "error_code": pa.string(),
    }
)
SHOWN = 12  # least certain pictures


# %% Read: one file, or a folder of shards
def read(path: Path) -> list[dict[str, Any]]:
    """Rows with a prediction."""
    files = ds.dataset(path, schema=COLUMNS, format="json" if path.suffix == ".jsonl" else "parquet")
    rows: list[dict[str, Any]] = files.to_table().to_pylist()
    return [row for row in rows if row["error_code"] is None]


# %% Count
def confusion(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[int]]]:
    """The classes, and for each right class (row) how often each was answered (column)."""
    pairs = Counter((PurePath(row["path"]).parent.name, row["label"]) for row in rows)
    classes = sorted({name for pair in pairs for name in pair})
    return classes, [[pairs[right, answered] for answered in classes] for right in classes]


def least_certain(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Highest entropy first, or lowest probability where the server gave no entropy."""

    def doubt(row: dict[str, Any]) -> float:
        return float(row["entropy"] if row["entropy"] is not None else 1 - row["probability"])

    return sorted(rows, key=doubt, reverse=True)[:count]


# %% Draw
def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """The matrix on the left, the pictures on the right."""
    classes, counts = confusion(rows)
    figure = plt.figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    axes.imshow(counts, cmap="Blues")
    axes.set(xlabel="answered", ylabel="right (the folder)", title=f"{len(rows):,} pictures")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(
                    x, y, str(count), ha="center", va="center", color="white" if count > len(rows) / 20 else "black"
                )
    for place, row in zip(right.subplots(3, SHOWN // 3).flat, least_certain(rows, SHOWN), strict=False):
        place.set_axis_off()
        place.set_title(f"{PurePath(row['path']).parent.name} → {row['label']}\n{row['probability']:.0%}", fontsize=9)
        if Path(row["path"]).is_file():  # not one that was in an archive
            place.imshow(Image.open(row["path"]).convert("RGB"))
    figure.savefig(output, dpi=120)


# %% Run
def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a .parquet or .jsonl file, or a folder of .parquet shards")
    parser.add_argument("--output", type=Path, default=Path("confusion.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    rows = read(arguments.rows)
    if not rows:
        sys.exit(f"there are no predictions in {arguments.rows}")
    draw(rows, arguments.output)
    right = sum(PurePath(row["path"]).parent.name == row["label"] for row in rows)
    print(f"{right:,} of {len(rows):,} right; {arguments.output}")


if __name__ == "__main__":
    main()
