"""Draw training and validation error against epochs, as in the paper's Figures 4 and 6.

    python training/plot.py training/results/resnet20-cifar10.csv training/results/resnet56-cifar10.csv --out errors.png
    python training/plot.py plain20.csv plain56.csv --beside resnet20.csv resnet56.csv --out degradation.png

Thin lines are training error (on augmented images, while the weights change), bold ones validation error. With --beside
there are two panels with the same axes.
"""

import argparse
import csv
import importlib.util
import io
import runpy
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

from matplotlib.figure import Figure

from resnet_ensemble.training.files import write_atomically

Log = dict[str, list[float]]


class LogError(Exception):
    """The file is missing, or not a log of ours."""


def read(path: Path) -> Log:
    """The columns of a log that training/train.py wrote. Raises LogError."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        log = {name: [float(row[name]) for row in rows] for name in ("epoch", "train_error", "val_error")}
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise LogError(f"{path} is no log of training/train.py ({problem}); give runs/RECIPE/log.csv") from None
    if not rows:
        raise LogError(f"{path} has no epochs yet")
    return log


def draw(panels: Sequence[dict[str, Log]], highest_error: float | None = None) -> bytes:
    """A PNG with a panel for each group of logs, two lines a log.

    The error axis ends at `highest_error` %, or at three times the highest of the last validation errors.
    """
    if highest_error is None:
        highest_error = min(100.0, max(5.0, *(3 * log["val_error"][-1] for logs in panels for log in logs.values())))
    figure = Figure(figsize=(7 if len(panels) == 1 else 5 * len(panels), 4.5), layout="constrained")
    for axes, logs in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, log in logs.items():
            (bold,) = axes.plot(
                log["epoch"], log["val_error"], linewidth=2.2, label=f"{name}: {log['val_error'][-1]:.2f} %"
            )
            axes.plot(log["epoch"], log["train_error"], linewidth=0.8, color=bold.get_color())
        axes.set(xlabel="epoch", ylabel="error (%)", ylim=(0, highest_error), xlim=(1, None))
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(title="bold: validation, thin: training")
    content = io.BytesIO()
    # Without the software's version in the file, the same logs give the same bytes.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def named(paths: Sequence[Path]) -> dict[str, Log]:
    """Logs by the names that the legend shows: the run's folder, or the file's own name; its path where two are one."""
    names = [path.resolve().parent.name if path.stem == "log" else path.stem for path in paths]
    return {name if names.count(name) == 1 else str(path): read(path) for name, path in zip(names, paths, strict=True)}


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="log.csv files; the names become the legend")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="LOG", help="logs of a second panel")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--highest", type=float, help="end of the error axis in %% (default: 3 times the last errors)")
    arguments = parser.parse_args()
    try:
        panels = [named(logs) for logs in (arguments.logs, arguments.beside) if logs]
        write_atomically(arguments.out, draw(panels, arguments.highest))
    except (LogError, OSError) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    main()
