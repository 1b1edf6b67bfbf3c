import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.training import plot


@pytest.fixture(scope="module")
def logs(root: Path) -> list[Path]:
    return sorted((root / "training" / "results").glob("*.csv"))


def test_the_logs_in_the_repository_end_with_the_bundle_s_errors(logs: list[Path], shipped: Bundle) -> None:
    ends = {log.stem: plot.read(log)["val_error"][-1] for log in logs}

    trained = {
        f"{member.name}-cifar10": measured.top1_error
        for member in shipped.manifest.members
        for measured in member.measured
        if measured.protocol == "center"
    }
    assert ends == trained


def test_the_same_logs_give_the_same_picture_and_others_another(logs: list[Path]) -> None:
    everything, one = plot.named(logs), plot.named(logs[:1])

    first, again = plot.draw([everything], 25), plot.draw([everything], 25)

    assert first == again != plot.draw([one], 25)
    assert Image.open(io.BytesIO(first)).size == (770, 495)


def test_two_groups_are_drawn_beside_each_other(logs: list[Path]) -> None:
    drawn = plot.draw([plot.named(logs[:1]), plot.named(logs[1:])], 25)

    assert Image.open(io.BytesIO(drawn)).size == (1100, 495)


def test_a_run_s_log_is_named_after_its_folder(logs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "plain20").mkdir()
    (tmp_path / "plain20" / "log.csv").write_bytes(logs[0].read_bytes())

    assert list(plot.named([tmp_path / "plain20" / "log.csv", logs[0]])) == ["plain20", logs[0].stem]


def test_the_command_draws_what_the_function_does(logs: list[Path], root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "training/plot.py",
        str(logs[0]),
        "--beside",
        str(logs[1]),
        "--out",
        str(tmp_path / "x.png"),
    ]

    subprocess.run(command, cwd=root, check=True)

    assert (tmp_path / "x.png").read_bytes() == plot.draw([plot.named(logs[:1]), plot.named(logs[1:2])], 25)
