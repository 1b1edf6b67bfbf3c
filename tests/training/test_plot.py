import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from resnet_ensemble.training import plot


@pytest.fixture(scope="module")
def logs(root: Path) -> list[Path]:
    return sorted((root / "training" / "results").glob("*.csv"))


def test_the_logs_in_the_repository_end_with_the_bundle_s_errors(logs: list[Path]) -> None:
    ends = {log.stem: plot.read(log)["val_error"][-1] for log in logs}

    assert (ends["resnet20-cifar10"], ends["resnet32-cifar10"]) == (7.84, 8.34)


def test_the_same_logs_give_the_same_picture_and_others_another(logs: list[Path]) -> None:
    both = {log.stem: plot.read(log) for log in logs}

    first, again = plot.draw(both, 25), plot.draw(both, 25)

    assert first == again != plot.draw({logs[0].stem: both[logs[0].stem]}, 25)
    assert Image.open(io.BytesIO(first)).size == (770, 495)


def test_the_command_names_the_lines_after_the_logs(logs: list[Path], root: Path, tmp_path: Path) -> None:
    out = tmp_path / "errors.png"

    subprocess.run([sys.executable, "training/plot.py", *map(str, logs), "--out", str(out)], cwd=root, check=True)

    assert out.read_bytes() == plot.draw({log.stem: plot.read(log) for log in logs}, 25)
