import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.training import plot


@pytest.fixture(scope="module")
def logs(root: Path) -> list[Path]:
    return sorted((root / "training" / "results").glob("*.csv"))


def test_the_logs_in_the_repository_end_with_the_errors_that_are_told(
    logs: list[Path], shipped: Bundle, root: Path
) -> None:
    ends = {log.stem: plot.read(log)["val_error"][-1] for log in logs}

    trained = {
        f"{member.name}-cifar10": measured.top1_error
        for member in shipped.manifest.members
        for measured in member.measured
        if measured.protocol == "center"
    }
    assert ends == trained | {"resnet20-cifar10-paper": 8.34}
    assert "gave ResNet-20 8.34 % (7.61 to 9.14" in (root / "README.md").read_text()


def test_the_degradation_logs_show_what_the_paper_says_and_the_readme_quotes(root: Path) -> None:
    folder, readme = root / "training" / "results" / "degradation", (root / "README.md").read_text()
    ends = {}
    for kind, title in (("plain", "plain"), ("resnet", "ResNet")):
        for depth in (20, 56):
            log = plot.read(folder / f"{kind}{depth}-cifar10.csv")
            assert log["epoch"] == [1, 2, 3, 4, 5, 6]
            ends[kind, depth] = log["train_error"][-1], log["val_error"][-1]
            assert f"| {title}-{depth} | {ends[kind, depth][0]:.2f} % | {ends[kind, depth][1]:.2f} % |" in readme

    assert all(deep > shallow for deep, shallow in zip(ends["plain", 56], ends["plain", 20], strict=True))
    assert all(deep < shallow for deep, shallow in zip(ends["resnet", 56], ends["resnet", 20], strict=True))


def test_the_degradation_plot_is_drawn_from_its_logs(root: Path) -> None:
    results = root / "training" / "results"
    plain, residual = (
        plot.named([results / "degradation" / f"{kind}{depth}-cifar10.csv" for depth in (20, 56)])
        for kind in ("plain", "resnet")
    )

    drawn, committed = (
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.int16)
        for content in (plot.draw([plain, residual], 85), (results / "degradation.png").read_bytes())
    )
    # Another release of matplotlib may move a letter by a pixel, but not a line.
    assert drawn.shape == committed.shape
    assert np.mean(np.abs(drawn - committed).max(axis=2) > 32) < 0.02


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


def test_runs_of_one_recipe_are_told_apart(logs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / out / "plain20" / "log.csv" for out in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes(logs[0].read_bytes())

    assert list(plot.named(paths)) == [str(path) for path in paths]
    monkeypatch.chdir(paths[0].parent)
    assert list(plot.named([Path("log.csv")])) == ["plain20"]


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

    assert (tmp_path / "x.png").read_bytes() == plot.draw([plot.named(logs[:1]), plot.named(logs[1:2])])


def test_a_plot_that_can_t_be_written_is_told_in_one_line(
    logs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(logs[0]), "--out", str(tmp_path / "file" / "x.png")])

    with pytest.raises(SystemExit, match=r"^\[Errno \d+\] .*/file/x\.png'$"):
        plot.main()


@pytest.mark.parametrize(
    "content", [None, "a,b\n1,2\n", "epoch,train_error,val_error\n", "epoch,train_error,val_error\n1\n"]
)
def test_a_file_that_is_no_log_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.csv").write_text(content)

    with pytest.raises(plot.LogError, match=r"log\.csv (is no log|has no epochs)"):
        plot.read(tmp_path / "log.csv")


def test_without_a_highest_error_the_axis_fits_the_last_ones(logs: list[Path]) -> None:
    log = plot.read(logs[0])

    assert plot.draw([{"a": log}]) == plot.draw([{"a": log}], 3 * log["val_error"][-1])
    assert plot.draw([{"a": log | {"val_error": [0.0] * len(log["epoch"])}}])
