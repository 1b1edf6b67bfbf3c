"""The whole command, in its quick mode, and the pictures that it sends."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import contestants, pictures, serving
from benchmarks.contestants import BUILT, EVERY, FP32, FULL, ONE
from benchmarks.measure import turns
from benchmarks.summary import OURS, PIPELINE, Cell
from resnet_ensemble.export import engine_store
from resnet_ensemble.export.bundle import Bundle
from tests.conftest import until


def test_pictures_are_the_same_again_and_differ_from_each_other() -> None:
    drawn = pictures.draw(3)

    assert drawn == pictures.draw(3)
    assert len(set(drawn)) == 3


def test_pictures_are_as_large_as_photographs() -> None:
    (content,) = pictures.draw(1)
    image = Image.open(io.BytesIO(content))

    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert 90_000 < len(content) < 130_000


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(SystemExit, match="no pictures in"):
        pictures.read(tmp_path)


def test_one_member_and_all_are_bundles_of_their_own(shipped: Bundle, tmp_path: Path) -> None:
    found = contestants.bundles(shipped.path, tmp_path)

    one, everyone = Bundle.open(found[ONE]).manifest, Bundle.open(found[FP32]).manifest
    assert one.members == shipped.manifest.members[:1]
    assert everyone == shipped.manifest
    assert [golden.probabilities.keys() for golden in one.golden] == [{one.members[0].name}] * len(one.golden)


def test_engines_that_were_built_are_measured_too(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_store.EngineStore, "best", lambda *_: "a record")

    assert contestants.bundles(shipped.path, tmp_path)[BUILT] == shipped.path


@pytest.mark.parametrize(
    ("others", "quick", "folder"),
    [(0.01, False, "benchmarks/results"), (0.06, False, "build/benchmark"), (0.01, True, "build/benchmark")],
)
def test_only_what_was_measured_alone_lies_with_the_results(
    root: Path, others: float, quick: bool, folder: str
) -> None:
    assert serving.destination(None, quick=quick, others=others) == root / folder


def test_a_folder_that_is_given_is_used(tmp_path: Path) -> None:
    assert serving.destination(tmp_path, quick=True, others=1.0) == tmp_path


def test_single_views_are_measured_in_every_part_of_a_round_and_others_in_one() -> None:
    single = [Cell(EVERY, OURS, 8), Cell(EVERY, PIPELINE, 8)]
    others = [Cell(FULL, OURS, 8), Cell(FULL, OURS, 32)]

    found = turns([*single, *others], rounds=2, parts=3)

    assert [set(turn) for turn in found] == 2 * [{*single, *others}, set(single), set(single)]
    assert [len(turn) for turn in found] == 2 * [4, 2, 2]
    assert len({tuple(turn) for turn in found}) > 3
    assert found == turns([*single, *others], rounds=2, parts=3)


def test_the_quick_mode_measures_everything_once(root: Path, tmp_path: Path) -> None:
    """LitServe is left out. What the numbers are is not looked at: other tests run on this machine."""
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--out", str(tmp_path)]

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "serving-cifar10.json").read_text())
    measured = {(cell["workload"], cell["system"], cell["clients"]) for cell in content["closed"]}
    center = "one member, center, FP32"
    assert {(center, name, n) for name in ("pipeline", "this server", "naive server") for n in (1, 8)} <= measured
    assert {("10crop full, FP32", "this server", 8), ("10crop exact, FP32", "this server", 8)} <= measured
    for cell in content["closed"]:
        (only,) = cell["rounds"]
        assert only["rate"] > 0
        assert only["errors"] == 0
    assert {one["system"] for one in content["open"]} == {"this server", "naive server"}
    assert {one["share"] for one in content["sustained"]} == {0.8}
    assert [(one["workload"], one["system"].split(",")[0]) for one in content["sustained"]] == [
        (workload, system)
        for workload in (center, "10crop full, FP32")
        for system in ("this server", "this server", "a perfect queue")
    ]
    assert content["overload"]["accepted"] > 0
    assert content["ceiling"].keys() == {"1", "8"}
    assert (tmp_path / "serving-cifar10.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "serving-cifar10.md").read_text() == done.stdout.removesuffix("\n")


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_sigterm_ends_the_servers_too(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--quick"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as benchmark:
        children = Path(f"/proc/{benchmark.pid}/task/{benchmark.pid}/children")
        until(lambda: len(children.read_text().split()) >= 2)
        started = children.read_text().split()
        benchmark.terminate()
        _, printed = benchmark.communicate(timeout=60)

    assert printed.splitlines()[-1] == "ended by SIGTERM"
    until(lambda: not [pid for pid in started if Path("/proc", pid).exists()])
