"""The backends for GPUs on a machine without one, and on a fake. `make gpu-check` is what runs them on a GPU."""

import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_ensemble.export import engine_store, engines, golden
from resnet_ensemble.export.build_engines import Row, build_all
from resnet_ensemble.export.bundle import Bundle, BundleError
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import (
    BackendUnavailable,
    onnx_runtime_cuda,
    tensorrt_builder,
    tensorrt_gpu,
)
from resnet_ensemble.export.engines.tensorrt_builder import INNER, BuildFailed, Plan
from tests.export.engines import fake_gpu
from tests.export.engines.fake_gpu import Cudart, TensorRt

NO_GPU = Cudart(error=35)


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    return fake_gpu.small_bundle(shipped, tmp_path / "small")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_gpu, "cudart", NO_GPU)
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", NO_GPU)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # with nothing in it to touch


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    """A GPU, on which TensorRT `builds` whatever it is given."""
    made = Cudart()
    monkeypatch.setattr(tensorrt_gpu, "cudart", made)
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", made)
    monkeypatch.setitem(sys.modules, "tensorrt", TensorRt(made))
    monkeypatch.setattr(tensorrt_builder, "build", built)
    monkeypatch.setattr("resnet_ensemble.export.build_engines.SECONDS_PER_TIMING", 0.01)
    yield made
    assert made.leaks() == []


def built(module: Any, graph: bytes, profiles: Any, *, timings: Any) -> Plan:
    """A plan of the fake. The graph's own types say what its layers are computed in."""
    assert module.__version__ == TensorRt.__version__
    marks = {b"float8": "FP8", b".int8": "INT8", b"picture_to_bf16": "BF16", b"picture_to_fp16": "HALF"}
    inner = next((kind for mark, kind in marks.items() if mark in graph), "FLOAT")
    rest = "HALF" if inner in ("FP8", "INT8") else inner
    content = fake_gpu.plan(graph, [astuple(profile) for profile in profiles])
    return Plan(content, {"first": rest, "inner": inner, "last": rest})


@pytest.mark.parametrize("name", engines.ON["cuda"])
def test_without_a_gpu_nothing_is_claimed_and_the_reason_is_said(name: str, no_gpu: None, pair: Bundle) -> None:
    member = pair.manifest.members[0]
    backend = engines.backend(name)

    assert name not in {found for found, _ in engines.available()}
    for use in (
        backend.precisions,
        lambda: backend.identity(member.preprocessing),
        lambda: backend.load(b"", "fp32"),
        lambda: engine_store.open_engine(pair, member, name),
    ):
        with pytest.raises(BackendUnavailable, match=r"driver, r580|cudaErrorInsufficientDriver"):
            use()


def test_asking_for_a_gpu_that_is_not_there_says_what_each_backend_lacks(no_gpu: None, pair: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match=r"nothing runs on cuda here\. onnxruntime-cuda: .* tensorrt: "):
        build_all(pair, device="cuda")
    assert {name for name, _ in engines.available("cpu")} == {"onnxruntime", "openvino"}


def test_a_gpu_without_tensorrt_says_what_to_install(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what makes an import fail

    with pytest.raises(BackendUnavailable, match=r"pip install 'resnet-ensemble\[tensorrt\]'"):
        tensorrt_gpu.precisions()


@pytest.mark.parametrize(
    ("major", "minor", "missing"), [(7, 5, {"bf16", "fp8"}), (8, 0, {"fp8"}), (8, 9, set()), (12, 0, set())]
)
def test_the_precisions_are_those_of_the_gpu(
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch, major: int, minor: int, missing: set[str]
) -> None:
    about = SimpleNamespace(name=b"x", major=major, minor=minor, totalGlobalMem=1)
    monkeypatch.setattr(cudart, "cudaGetDeviceProperties", lambda _: (0, about))

    assert set(INNER) - set(tensorrt_gpu.precisions()) == missing


def rows_of(rows: list[Row]) -> dict[str, str]:
    return {row.precision: row.note if row.record is None else row.record.verdict for row in rows}


def test_every_engine_of_a_gpu_is_built_checked_timed_stored_and_opened(cudart: Cudart, bundle: Bundle) -> None:
    member = bundle.manifest.members[0]

    rows = build_all(bundle, members=[member.name], precisions=["fp32", "fp16"], device="cuda")
    again = build_all(bundle, members=[member.name], precisions=["fp32", "fp16"], device="cuda")

    assert rows_of(rows) == {"fp32": "passed", "fp16": "passed"}
    assert [row.note for row in again] == ["reused", "reused"]
    best = EngineStore(bundle).best(member, "tensorrt")
    assert best is not None
    engine = engine_store.open_engine(bundle, member, "tensorrt")
    assert (engine.info.backend, engine.info.precision, engine.info.device) == (
        "tensorrt",
        best.record.precision,
        "Fake GPU",
    )
    engine.close()


def test_an_engine_that_fails_its_golden_check_keeps_no_memory_of_the_gpu(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all(bundle, precisions=["fp32"], device="cuda")

    def refuse(*_: object, **__: object) -> float:
        raise BundleError("golden values differ")

    monkeypatch.setattr(golden, "check", refuse)
    with pytest.raises(BundleError, match="golden values differ"):
        engine_store.open_engine(bundle, bundle.manifest.members[0], "tensorrt")
    assert cudart.leaks() == []


def test_the_fastest_that_passed_is_served_on_whatever_device(cudart: Cudart, bundle: Bundle) -> None:
    member = bundle.manifest.members[0]
    rows = build_all(bundle, members=[member.name], precisions=["fp32"])

    records = [row.record for row in rows if row.record]
    assert {record.backend for record in records} == {"onnxruntime", "openvino", "tensorrt"}
    fastest = max(records, key=lambda record: record.views_per_second["10"])
    best = EngineStore(bundle).best(member)
    assert best is not None
    assert best.record == fastest


@pytest.mark.parametrize("change", ["another GPU", "another driver", "another TensorRT", "other sizes", "flipped"])
def test_a_plan_that_is_not_of_this_host_is_never_given_to_tensorrt(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    member = bundle.manifest.members[0]
    build_all(bundle, members=[member.name], precisions=["fp32"], device="cuda")
    store = EngineStore(bundle)
    stored = store.find(member, "tensorrt", "fp32")
    assert stored is not None

    if change == "another GPU":
        about = SimpleNamespace(name=b"Another", major=8, minor=9, totalGlobalMem=1)
        monkeypatch.setattr(cudart, "cudaGetDeviceProperties", lambda _: (0, about))
    elif change == "another driver":
        monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (0, 14000))
    elif change == "another TensorRT":
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.5.0", raising=False)
    elif change == "other sizes":
        monkeypatch.setattr(tensorrt_gpu, "BUCKETS", (1, 3))
    else:
        (store.folder / stored.record.file).write_bytes(stored.content[:-1] + bytes([stored.content[-1] ^ 1]))

    assert EngineStore(bundle).find(member, "tensorrt", "fp32") is None


def test_an_engine_that_can_t_be_built_does_not_stop_the_others(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fp16(module: Any, graph: bytes, profiles: Any, *, timings: Any) -> Plan:
        if b"picture_to_fp16" in graph:
            raise BuildFailed("TensorRT found no plan: no tactics")
        return built(module, graph, profiles, timings=timings)

    monkeypatch.setattr(tensorrt_builder, "build", no_fp16)
    rows = build_all(bundle, members=[bundle.manifest.members[0].name], precisions=["fp16", "fp32"], device="cuda")

    assert rows_of(rows) == {"fp32": "passed", "fp16": "failed: TensorRT found no plan: no tactics"}


def test_an_engine_that_loses_the_gpu_ends_it_all_and_what_was_built_before_is_kept(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever came after it would fail, too, and be taken for bad."""
    member = bundle.manifest.members[0]
    load = tensorrt_gpu.load

    def breaking(compiled: bytes, precision: engines.Precision, threads: int = 1) -> engines.Engine:
        cudart.lost = precision == "fp16"
        return load(compiled, precision, threads)

    monkeypatch.setattr(tensorrt_gpu, "load", breaking)
    with pytest.raises(engines.DeviceLost, match=r"over small/tensorrt/fp16 \(cudaErrorIllegalAddress.*--precision"):
        build_all(bundle, members=[member.name], precisions=["fp32", "fp16", "bf16"], device="cuda")

    cudart.lost = False
    store = EngineStore(bundle)
    assert store.find(member, "tensorrt", "fp32")
    assert not store.find(member, "tensorrt", "fp16")
    assert not store.find(member, "tensorrt", "bf16")


@pytest.mark.parametrize("answer", [float("nan"), 1.0])
def test_an_engine_that_computes_nonsense_is_not_chosen_and_does_not_stop_the_others(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, answer: float
) -> None:
    member = bundle.manifest.members[0]
    load = tensorrt_gpu.load

    def wrong(compiled: bytes, precision: engines.Precision, threads: int = 1) -> engines.Engine:
        engine = load(compiled, precision)
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda views: run(views) * 0 + answer)
        return engine

    monkeypatch.setattr(tensorrt_gpu, "load", wrong)
    rows = build_all(bundle, members=[member.name], precisions=["fp16", "fp32"])

    refused = [row.record.verdict for row in rows if row.record and row.backend == "tensorrt"]
    assert len(refused) == 2
    assert all("is below" in verdict or "differs by 1" in verdict for verdict in refused)
    best = EngineStore(bundle).best(member)
    assert best is not None
    assert best.record.backend in engines.ON["cpu"]


def test_a_plan_in_the_wrong_precision_is_never_stored(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_floats(module: Any, graph: bytes, profiles: Any, *, timings: Any) -> Plan:
        return Plan(b"", {"first": "FLOAT", "inner": "FLOAT", "last": "FLOAT"})

    monkeypatch.setattr(tensorrt_builder, "build", in_floats)
    (row,) = build_all(bundle, members=[bundle.manifest.members[0].name], precisions=["fp16"], device="cuda")

    assert row.record is None
    assert "3 of 3 layers are computed in another type" in row.note
    assert not list(EngineStore(bundle).folder.glob("*.engine"))


@pytest.mark.parametrize("stored", [True, False])
def test_a_gpu_without_memory_is_a_reason_not_to_serve_that_names_the_member(
    cudart: Cudart, bundle: Bundle, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = bundle.manifest.members[0]
    if stored:
        build_all(bundle, precisions=["fp32"], device="cuda")
    full = (fake_gpu.CudaErrorCode.cudaErrorMemoryAllocation, None)
    monkeypatch.setattr(cudart, "cudaMalloc", lambda size: full)

    with pytest.raises(BackendUnavailable, match="small can't run on tensorrt: cudaErrorMemoryAllocation"):
        engine_store.open_engine(bundle, member, "tensorrt")
