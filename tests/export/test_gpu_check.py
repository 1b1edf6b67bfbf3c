"""What checks a GPU, on the fake one."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from resnet_ensemble.export import gpu_check
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import BUCKETS, onnx_runtime_cuda, tensorrt_builder, tensorrt_gpu
from resnet_ensemble.export.engines.tensorrt_builder import BuildFailed, Plan
from resnet_ensemble.export.gpu_check import SLOWEST_IN_TURN
from resnet_ensemble.export.gpu_report import Check, Report
from tests.export.engines import fake_gpu
from tests.export.engines.fake_gpu import Cudart, TensorRt
from tests.export.engines.fake_sessions import Sessions
from tests.export.engines.test_gpu_backends import built

CHECKS = [
    *("build", "load", "parity", "layers", "CUDA graphs", "side by side", "whole views", "sizes in turn", "rates"),
    "close",
]


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    made = Cudart()
    monkeypatch.setattr(tensorrt_gpu, "cudart", made)
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", made)
    monkeypatch.setitem(sys.modules, "tensorrt", TensorRt(made))
    monkeypatch.setattr(tensorrt_builder, "build", built)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Sessions())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(gpu_check, "SECONDS_PER_TIMING", 0.01)
    monkeypatch.setattr(gpu_check, "ROUNDS", 6)
    monkeypatch.setattr(gpu_check, "SLOWEST_IN_TURN", math.inf)  # on a busy machine the fake may take as long
    yield made
    assert made.leaks() == []


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    return fake_gpu.small_bundle(shipped, tmp_path / "small")


def check(bundle: Bundle, folder: Path, *precisions: Any) -> Report:
    members = [bundle.manifest.members[0].name]
    return gpu_check.check_all(bundle, members, list(precisions or ["fp32"]), folder, apart=within)


def within(report: Report, _title: str, work: Callable[..., Any], *given: Any) -> Any:
    """Instead of `apart`: another process would not have the fakes."""
    return work(report, *given)


def found(report: Report, name: str) -> Check:
    (one,) = [check for check in report.checks if check.name.endswith(name) and "onnxruntime-cuda/" not in check.name]
    return one


def test_where_all_holds_the_report_says_so_with_rates(cudart: Cudart, bundle: Bundle, tmp_path: Path) -> None:
    report = check(bundle, tmp_path, "fp32", "fp16")

    assert report.held, report.markdown()
    for precision in ("fp32", "fp16"):
        assert [found(report, f"{precision}: {name}").held for name in CHECKS] == [True] * len(CHECKS)
    assert found(report, "damaged plans").found == "refused: cut in half, of no known kind, empty"
    assert {len(rates) for rates in report.rates.values()} == {len(BUCKETS)}
    written = json.loads((tmp_path / "gpu-check.json").read_text())
    assert (written["held"], written["about"]["device"]) == (True, "Fake GPU, compute 8.9, driver of CUDA 13000")
    text = (tmp_path / "gpu-check.md").read_text()
    parity = "96 views, in batches of 1, 2, 5, 10, 20, 40 and whole: top-1 agreement 100.0%"
    assert f"| small/tensorrt/fp16: parity | holds | {parity}" in text
    assert "| engine | 1 | 2 | 5 | 10 | 20 | 40 |" in text


def test_where_tensorrt_is_missing_onnx_runtime_is_checked_nevertheless(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what makes an import fail
    report = check(bundle, tmp_path, "fp32", "fp16")

    assert not report.held
    (missing,) = [check for check in report.checks if not check.held]
    assert (missing.name, missing.held) == ("tensorrt: all", None)
    assert "pip install 'resnet-ensemble[tensorrt]'" in missing.found
    assert set(report.rates) == {"small/onnxruntime-cuda/fp32", "small/onnxruntime-cuda/fp16"}
    assert (report.about["device"], report.about["onnxruntime-cuda"]) == (
        "Fake GPU, compute 8.9, driver of CUDA 13000",
        onnxruntime.__version__,
    )


def test_what_can_t_be_built_is_said_and_the_other_precision_is_checked(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fp32(module: Any, graph: bytes, profiles: Any, *, timings: Any) -> Plan:
        if b"picture_to_fp16" not in graph:
            raise BuildFailed("TensorRT found no plan: no tactics")
        return built(module, graph, profiles, timings=timings)

    monkeypatch.setattr(tensorrt_builder, "build", no_fp32)
    report = check(bundle, tmp_path, "fp32", "fp16")

    assert not report.held
    assert "BuildFailed: TensorRT found no plan: no tactics" in found(report, "fp32: build").found
    assert found(report, "fp32: all else").held is None
    assert found(report, "fp16: parity").held


@pytest.mark.parametrize(
    ("refused", "name"), [({"capture"}, "fp32: CUDA graphs"), ({"create_execution_context"}, "fp32: load")]
)
def test_one_check_that_does_not_hold_hides_no_other(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: set[str], name: str
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "refused", refused, raising=False)
    report = check(bundle, tmp_path)

    assert [check.name for check in report.checks if check.held is False] == [f"small/tensorrt/{name}"]
    assert found(report, "damaged plans").held
    assert "**does not hold**" in (tmp_path / "gpu-check.md").read_text()


def test_wrong_answers_and_answers_that_depend_on_neighbours_are_found(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tensorrt_gpu.load

    def wrong(compiled: bytes, precision: Any) -> Any:
        engine = load(compiled, precision)
        run, runs = engine.run, iter(range(10**6))
        monkeypatch.setattr(engine, "run", lambda views: run(views)[:, ::-1] + 1e-3 * next(runs))
        return engine

    monkeypatch.setattr(tensorrt_gpu, "load", wrong)
    report = check(bundle, tmp_path)

    failed = {check.name.split(": ")[1] for check in report.checks if check.held is False}
    assert {"parity", "side by side"} <= failed
    assert "top-1 agreement" in found(report, "fp32: parity").found


def test_an_engine_that_is_slow_where_sizes_change_is_found(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tensorrt_gpu.load

    def planning(compiled: bytes, precision: Any) -> Any:
        engine = load(compiled, precision)
        run, last = engine.run, [0]

        def slow(views: Any) -> Any:
            if len(views) != last[0]:
                time.sleep(0.05)
            last[0] = len(views)
            return run(views)

        monkeypatch.setattr(engine, "run", slow)
        return engine

    monkeypatch.setattr(tensorrt_gpu, "load", planning)
    monkeypatch.setattr(gpu_check, "SLOWEST_IN_TURN", SLOWEST_IN_TURN)
    report = check(bundle, tmp_path)

    assert "small/tensorrt/fp32: sizes in turn" in [check.name for check in report.checks if not check.held]
    assert "1, 2, 5, 10, 20, 40 in turn take" in found(report, "sizes in turn").found


def test_a_damaged_plan_that_is_taken_is_found(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, plans = tensorrt_gpu.load, []

    def lenient(compiled: bytes, precision: Any) -> Any:
        plans.append(compiled)
        return load(plans[0], precision)

    monkeypatch.setattr(tensorrt_gpu, "load", lenient)
    report = check(bundle, tmp_path)

    assert found(report, "damaged plans").found == "a plan that is cut in half was taken"


def test_precisions_that_the_gpu_lacks_are_not_tried(
    cudart: Cudart, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_gpu, "SINCE", tensorrt_gpu.SINCE | {"fp8": (99, 0)})
    report = check(bundle, tmp_path, "fp8")

    assert found(report, "fp8: all").found.endswith("does not compute in fp8")
    assert not report.held


def test_without_a_gpu_the_command_says_so_and_ends_well(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "export/gpu_check.py", "--report", str(tmp_path)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU to check: ")
    assert not list(tmp_path.iterdir())


def test_a_driver_with_which_nothing_runs_is_no_missing_gpu(
    cudart: Cudart, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "has_driver", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(shipped.path)])
    with monkeypatch.context() as broken:
        for backend in (tensorrt_gpu, onnx_runtime_cuda):
            broken.setattr(backend, "cudart", Cudart(error=35))
        with pytest.raises(
            SystemExit, match=r"driver is here, but CUDA can't use a GPU here \(cudaError[^;]*; install[^;]*$"
        ):
            gpu_check.main()
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what makes an import fail
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])

    with pytest.raises(SystemExit, match=r"driver is here, but .*pip install 'resnet-ensemble\[tensorrt\]'"):
        gpu_check.main()


def test_a_member_that_is_not_there_is_an_error(
    cudart: Cudart, shipped: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(shipped.path), "--only", "resnet20", "--only", "nobody"])

    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "no member is named nobody; there are resnet20, resnet32" in capsys.readouterr().err


def test_a_bundle_that_is_none_is_an_error(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "export/gpu_check.py", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    assert "no bundle.json" in done.stderr
