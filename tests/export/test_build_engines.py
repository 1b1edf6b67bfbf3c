"""The command on copies of the shipped bundle: run as a person runs it once of each kind, its main() for the rest."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from resnet_ensemble.export import build_engines, declared, drawings, engines, to_onnx
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import EngineRunError
from resnet_ensemble.export.engines.openvino_cpu import OpenVinoEngine
from resnet_ensemble.export.triton_repository import Plan
from resnet_ensemble.training.model import cifar


@pytest.fixture
def bundle(pair: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.path, tmp_path / "cifar10"))


def build(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "export/build_engines.py", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def build_here(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What `build` does, in this process, which has imported everything; and each engine is timed for a moment only."""
    command, code = ["export/build_engines.py", *map(str, arguments)], 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as stdout,
        redirect_stderr(io.StringIO()) as stderr,
    ):
        patch.chdir(root)
        patch.setattr(sys, "argv", command)
        patch.setattr(build_engines, "SECONDS_PER_TIMING", 0.02)
        try:
            build_engines.main()
        except SystemExit as stopped:
            if isinstance(stopped.code, str):  # as Python ends a process with a text
                print(stopped.code, file=sys.stderr)
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def report(bundle: Path) -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, dict[str, object]]] = json.loads(
        (bundle.parent / "cifar10.engines" / "engines.json").read_text()
    )
    return content["engines"]


def test_it_builds_verifies_and_times_every_engine_and_reuses_what_is_valid(root: Path, bundle: Path) -> None:
    first = build(root, bundle)
    second = build(root, bundle)

    members = Bundle.open(bundle).manifest.members
    made = [v for v in engines.available() if v[1] not in engines.CALIBRATED or members[0].calibration]
    found = report(bundle)
    assert set(found) == {f"{member.name}/{b}/{p}" for member in members for b, p in made}
    assert all(engine["views_per_second"]["10"] > 0 for engine in found.values())
    assert all(engine["golden_difference"] < 1e-4 for key, engine in found.items() if key.endswith("fp32"))
    assert (first.returncode, first.stdout.count(", built")) == (0, len(found)), first.stderr
    assert (second.returncode, second.stdout.count(", reused")) == (0, len(found)), second.stderr
    assert first.stdout.count("chosen, ") == second.stdout.count("chosen, ") == len(members)
    told = "the chosen together, over ten crops: FP32's label on 8 of 8 pictures (100.0%)"
    assert told in first.stdout
    assert told in second.stdout


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures that look like something: drawings under small changes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in drawings.pictures().items():
        image = Image.open(io.BytesIO(content)).convert("RGB")
        for i in range(4):
            image.rotate(5 * i).resize((40 + i, 40)).save(folder / f"{name}-{i}.png")
    return folder


def test_with_pictures_int8_is_calibrated_gated_and_reused(root: Path, bundle: Path, photos: Path) -> None:
    member = Bundle.open(bundle).manifest.members[0].name
    options = (bundle, "--calibration", photos, "--only", member, "--precision", "int8")
    first, second = build_here(root, *options), build_here(root, *options)
    (photos / "another.png").write_bytes(drawings.pictures()["ship"])
    third = build_here(root, *options)

    found = report(bundle)
    int8 = [f"{member}/{b}/{p}" for b, p in engines.available() if p == "int8"]
    assert set(found) == set(int8)
    assert all(engine["gate_views"] == 33 * 3 + 16 and 0 < engine["difference"] < 1 for engine in found.values())
    assert (first.stdout.count(", built"), second.stdout.count(", reused")) == (len(int8), len(int8)), first.stderr
    assert third.stdout.count(", built") == len(int8)  # other pictures, other engines


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_dry_run_says_what_would_be_built_and_writes_nothing(
    root: Path, bundle: Path, options: tuple[str, ...]
) -> None:
    result = build(root, bundle, "--dry-run", "--precision", "fp32", *options)

    fp32 = [v for v in engines.available() if v[1] == "fp32"]
    assert result.stdout.count("would be built") == len(Bundle.open(bundle).manifest.members) * len(fp32), result.stderr
    assert ("nothing was written" in result.stdout) == (not options)
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_dry_run_tells_nothing_of_a_choice_of_engines_that_are_damaged(root: Path, bundle: Path) -> None:
    assert "the chosen together" in build_here(root, bundle, "--precision", "fp32").stdout
    assert "the chosen together" in build_here(root, bundle, "--precision", "fp32", "--dry-run").stdout
    for file in bundle.with_name("cifar10.engines").glob("*.engine"):
        file.write_bytes(b"damaged")

    result = build_here(root, bundle, "--precision", "fp32", "--dry-run")

    assert "would be built" in result.stdout
    assert "the chosen together" not in result.stdout


def test_what_the_table_says_can_be_printed_as_json(root: Path, bundle: Path) -> None:
    member = Bundle.open(bundle).manifest.members[0].name

    result = build_here(root, bundle, "--only", member, "--precision", "fp32", "--json")

    printed = json.loads(result.stdout)
    assert {key: engine | {"note": "built"} for key, engine in report(bundle).items()} == printed["engines"]
    assert (list(printed["chosen"]), printed["without"]) == ([member], {})
    assert set(printed["chosen"].values()) <= set(printed["engines"])
    assert (list(printed["choice"]["engines"]), printed["choice"]["agreement"]) == ([member], 1)


def test_a_member_without_an_engine_that_passed_is_a_failure(root: Path, bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    for member in manifest["members"]:
        member["calibration"] = None
    del manifest["sha256"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))

    result = build_here(root, bundle, "--precision", "int8", "--only", "resnet20")

    assert (result.returncode, result.stdout.count("needs pictures: --calibration DIR")) == (1, 2)
    assert "no engine of resnet20 passed" in result.stderr


def test_without_onnx_runtime_it_says_what_to_install(root: Path, bundle: Path) -> None:
    code = "import runpy, sys; sys.modules['onnxruntime'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, "export/build_engines.py", str(bundle), "--precision", "fp32"]

    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)

    assert result.returncode == 1
    assert "pip install 'resnet-ensemble[cpu]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "resnet1000"], "no member named resnet1000; there are resnet20"),
        (["--calibration", "nowhere"], "there is no folder nowhere"),
        (["--precision", "fp8", "--device", "cpu"], "nothing here computes in fp8; there are onnxruntime fp32, "),
        (["--triton", "models", "--dry-run"], "--dry-run writes nothing"),
        (["--labels", "labels.txt"], "--labels goes with --weights"),
        (["--weights", "a.pth", "--ensemble", "b"], "--weights or --ensemble, not both"),
    ],
)
def test_mistakes_are_named(root: Path, bundle: Path, arguments: list[str], message: str) -> None:
    result = build_here(root, bundle, *arguments)

    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_why_nothing_is_built_for_a_gpu_that_is_there_is_told(
    root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (bundle, "--only", "resnet20", "--precision", "fp32")
    assert "GPU" not in build_here(root, *options).stderr
    monkeypatch.setattr(build_engines, "has_driver", lambda: True)

    result = build_here(root, *options)

    assert result.returncode == 0
    assert "build_engines: not built for the GPU: onnxruntime-cuda: " in result.stderr
    assert "build_engines: not built for the GPU: tensorrt: " in result.stderr


def test_an_engine_that_fails_while_it_runs_does_not_stop_the_others(
    root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EngineRunError("OpenVINO failed: out of memory")

    monkeypatch.setattr(OpenVinoEngine, "run", fail)
    result = build_here(root, bundle, "--only", "resnet20", "--precision", "fp32")

    assert result.returncode == 0, result.stderr
    assert "failed: OpenVINO failed: out of memory" in result.stdout
    assert "chosen, built" in result.stdout


def test_an_interrupt_ends_it_quietly(root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_engines, "build_all", interrupt)
    result = build_here(root, bundle)

    assert (result.returncode, result.stderr) == (130, "")


def test_with_weights_the_bundle_is_made_first_and_only_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(cifar(8, classes=3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    options = ("--weights", tmp_path / "mine.pth", "--labels", tmp_path / "labels.txt", "--precision", "fp32")

    first = build_here(root, tmp_path / "made", *options)
    written = (tmp_path / "made" / "bundle.json").stat().st_mtime_ns
    with monkeypatch.context() as without_torch:  # which takes seconds to load
        without_torch.setitem(sys.modules, "resnet_ensemble.export.to_onnx", None)
        without_torch.delattr("resnet_ensemble.export.to_onnx")
        second = build_here(root, tmp_path / "made", *options)
    dry = build(root, tmp_path / "other", *options, "--dry-run")

    manifest = Bundle.open(tmp_path / "made").manifest
    assert (manifest.labels, [member.name for member in manifest.members]) == (("red", "green", "blue"), ["resnet8"])
    assert first.stdout.count(", built") == second.stdout.count(", reused") == 2, first.stderr
    assert (tmp_path / "made" / "bundle.json").stat().st_mtime_ns == written
    note = f"{tmp_path / 'other'} would be made first, and then its engines"
    assert (dry.returncode, dry.stdout) == (0, f"{note}\n")
    as_json = json.loads(build_here(root, tmp_path / "other", *options, "--dry-run", "--json").stdout)
    assert as_json == {"bundle": None, "chosen": {}, "choice": None, "engines": {}, "without": {}, "note": note}
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("label", ["größer", 7], ids=["of other weights", "of no known shape"])
def test_a_bundle_that_can_t_be_used_is_left_alone_if_it_is_not_of_the_weights(
    root: Path, bundle: Path, tmp_path: Path, label: object
) -> None:
    """A label that was corrected by hand breaks the seal; the networks are still somebody's."""
    torch.save(cifar(8).state_dict(), tmp_path / "mine.pth")
    edited = json.loads((bundle / "bundle.json").read_text())
    edited["labels"][0] = label
    (bundle / "bundle.json").write_text(json.dumps(edited))
    before = sorted(bundle.rglob("*"))

    result = build_here(root, bundle, "--weights", tmp_path / "mine.pth")

    assert (result.returncode, result.stdout) == (1, "")
    assert f"{bundle} holds a bundle that can't be used (" in result.stderr
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_bundle_that_is_not_made_of_the_weights_is_left_alone(
    root: Path, bundle: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    torch.save(cifar(8).state_dict(), tmp_path / "mine.pth")
    (bundle / Bundle.open(bundle).manifest.members[1].file).write_bytes(b"damaged, but somebody's")

    result = build_here(root, bundle, "--weights", tmp_path / "mine.pth", *options)

    there = f"{bundle} holds {Bundle.open(bundle).identity}, which is not made of these weights"
    assert result.stderr == f"build_engines: {there}; give another folder, or remove it\n"
    assert (result.returncode, result.stdout) == (1, "")
    assert not (bundle / "members" / "resnet8.onnx").exists()


@pytest.mark.parametrize("file", ["bundle.json", "members/resnet8.onnx"])
def test_a_damaged_bundle_is_made_again_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    torch.save(cifar(8, classes=3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    monkeypatch.setattr(to_onnx, "to_onnx", lambda graph: b"a graph")  # the writing is what matters
    chosen = declared.choose([str(tmp_path / "mine.pth")], None, tmp_path / "labels.txt")
    made = partial(to_onnx.export_declared, chosen, tmp_path / "made")
    made()
    before = (tmp_path / "made" / file).read_bytes()
    (tmp_path / "made" / file).write_bytes(before[:-9])

    made().verify()

    assert (tmp_path / "made" / file).read_bytes() == before


def test_the_same_weights_under_another_version_are_another_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(cifar(8, classes=3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    monkeypatch.setattr(to_onnx, "to_onnx", lambda graph: b"a graph")
    chosen = declared.choose([str(tmp_path / "mine.pth")], None, tmp_path / "labels.txt")

    first, second = (to_onnx.export_declared(chosen, tmp_path / "made", version=version) for version in "12")

    assert (first.manifest.version, second.manifest.version) == ("1", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundles/x", "--weights", "none.pth"], "no weights at none.pth"),
        (["bundles/x", "--ensemble", "none"], "no ensemble none"),
        (["--weights", "none.pth"], "name the bundle's folder"),
        (["bundles/cifar10", "--weights", "none.pth"], "name the bundle's folder"),
    ],
)
def test_weights_that_can_t_be_had_are_named(root: Path, arguments: list[str], message: str) -> None:
    result = build_here(root, *arguments)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_triton_repository_is_written_when_it_is_asked_for(root: Path, bundle: Path, tmp_path: Path) -> None:
    member = Bundle.open(bundle).manifest.members[0].name

    result = build_here(root, bundle, "--only", member, "--precision", "fp32", "--triton", tmp_path / "models")

    assert f"Triton model repository: {tmp_path / 'models'}" in result.stdout, result.stderr
    assert {path.name for path in (tmp_path / "models").iterdir()} >= {"cifar10", f"cifar10-{member}", "README.md"}


def test_triton_gets_the_plan_of_a_member_whose_best_engine_is_one_and_the_onnx_file_of_others(shipped: Bundle) -> None:
    tensorrt, cpu = (SimpleNamespace(record=SimpleNamespace(backend=b), content=b"a plan") for b in ("tensorrt", "x"))
    best: list[Any] = [tensorrt, cpu, None, tensorrt]

    assert build_engines.plans(shipped, best) == {
        "resnet20": Plan(b"a plan", max_batch=40),
        "resnet56": Plan(b"a plan", max_batch=40),
    }


def test_a_folder_that_is_no_triton_repository_is_refused_before_anything_is_built(root: Path, bundle: Path) -> None:
    result = build_here(root, bundle, "--triton", bundle)

    assert (result.returncode, result.stdout) == (1, "")
    assert "is not ours; name another folder" in result.stderr
    assert not (bundle.parent / "cifar10.engines").exists()


def test_two_builders_at_once_give_one_good_store(root: Path, bundle: Path) -> None:
    command = [sys.executable, "export/build_engines.py", str(bundle), "--precision", "fp32"]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]

    built = len(Bundle.open(bundle).manifest.members) * sum(p == "fp32" for _, p in engines.available())
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count(", built") for text in printed) == [0, built]
    assert len(report(bundle)) == built


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
        assert build_here(root, bundle).returncode == 0
    manifest = json.loads((bundle / "bundle.json").read_text())
    name = manifest["members"][0]["name"]
    manifest["golden"][1]["probabilities"][name][0] += 0.01
    del manifest["sha256"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))

    result = build_here(root, bundle)

    assert result.returncode == 1
    assert f"{name} on onnxruntime" in result.stderr
    assert "differs from the golden probabilities" in result.stderr
    assert "restore" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_engine_is_built_again(root: Path, bundle: Path) -> None:
    build_here(root, bundle, "--precision", "fp32")
    engine = min((bundle.parent / "cifar10.engines").glob("*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1])

    result = build_here(root, bundle, "--precision", "fp32")

    assert (result.returncode, result.stdout.count(", built")) == (0, 1)


def test_a_folder_that_is_no_bundle_is_refused(root: Path, tmp_path: Path) -> None:
    result = build_here(root, tmp_path)

    assert result.returncode == 1
    assert "no bundle.json" in result.stderr
