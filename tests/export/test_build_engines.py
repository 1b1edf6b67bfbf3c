"""The command, run as a person runs it, on copies of the shipped bundle."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_ensemble.export.bundle import Bundle


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped.path, tmp_path / "cifar10"))


def build(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "export/build_engines.py", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_it_builds_verifies_and_times_every_member_and_reuses_what_is_valid(root: Path, bundle: Path) -> None:
    first = build(root, bundle)
    second = build(root, bundle)

    report = json.loads((bundle.parent / "cifar10.engines" / "engines.json").read_text())
    members = [member.name for member in Bundle.open(bundle).manifest.members]
    assert list(report["engines"]) == [f"{name}/onnxruntime" for name in sorted(members)]
    assert all(engine["golden_difference"] < 1e-4 for engine in report["engines"].values())
    assert all(engine["views_per_second"]["10"] > 0 for engine in report["engines"].values())
    assert (first.returncode, first.stdout.count(", built")) == (0, len(members)), first.stderr
    assert (second.returncode, second.stdout.count(", reused")) == (0, len(members)), second.stderr


def test_a_corrupted_member_stops_it_and_says_what_to_do(root: Path, bundle: Path) -> None:
    (bundle / Bundle.open(bundle).manifest.members[0].file).write_bytes(b"not a graph")

    result = build(root, bundle)

    assert result.returncode == 1
    assert "is not the file that bundle.json describes" in result.stderr
    assert "git checkout" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("after_a_good_run", [False, True])
def test_a_wrong_golden_value_stops_it_and_says_what_to_do(root: Path, bundle: Path, after_a_good_run: bool) -> None:
    if after_a_good_run:
        assert build(root, bundle).returncode == 0
    manifest = json.loads((bundle / "bundle.json").read_text())
    name = manifest["members"][0]["name"]
    manifest["golden"][1]["probabilities"][name][0] += 0.01
    (bundle / "bundle.json").write_text(json.dumps(manifest))

    result = build(root, bundle)

    assert result.returncode == 1
    assert f"{name} on onnxruntime" in result.stderr
    assert "differs from the golden probabilities" in result.stderr
    assert "restore" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_engine_is_built_again(root: Path, bundle: Path) -> None:
    build(root, bundle)
    engine = next((bundle.parent / "cifar10.engines").glob("*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1])

    result = build(root, bundle)

    assert (result.returncode, result.stdout.count(", built")) == (0, 1)


def test_a_folder_that_is_no_bundle_is_refused(root: Path, tmp_path: Path) -> None:
    result = build(root, tmp_path)

    assert result.returncode == 1
    assert "no bundle.json" in result.stderr
