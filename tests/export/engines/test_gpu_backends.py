"""The backends for GPUs on a machine without one, and on a fake. `make gpu-check` is what runs them on a GPU."""

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from resnet_ensemble.export import engine_store, engines
from resnet_ensemble.export.build_engines import Row, build_all
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import (
    BackendUnavailable,
    EngineLoadError,
    EngineRunError,
    onnx_runtime_cuda,
    tensorrt_builder,
    tensorrt_gpu,
)
from resnet_ensemble.export.engines.tensorrt_builder import INNER, BuildFailed, Plan
from resnet_ensemble.training.views import Preprocessing
from tests.conftest import until
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


# ONNX Runtime


def test_the_cpu_s_onnx_runtime_is_not_taken_for_the_gpu_s(cudart: Cudart) -> None:
    with pytest.raises(BackendUnavailable, match=r"the CPU's; pip uninstall onnxruntime .*\[gpu\]"):
        onnx_runtime_cuda.precisions()


SHAPES = frozenset({"Shape", "Range", "Min", "Clip"})  # what works out sizes, on the CPU


class Sessions:
    """Sessions that say what they run on, `left` on the CPU, and whose second size would take long on a GPU.

    They run on the CPU. `sizes`: what each that is still held was given; `full`: a GPU with memory for so many.
    """

    def __init__(self, used: str = "CUDAExecutionProvider", left: frozenset[str] = SHAPES) -> None:
        self.used = used
        self.left = left
        self.full: int | None = None
        self.providers: list[dict[str, str]] = []
        self._open: weakref.WeakSet[_Session] = weakref.WeakSet()

    def __call__(self, graph: bytes, options: Any = None, providers: Any = ()) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return SESSION(graph, options, providers=providers)
        ((name, chosen),) = providers
        assert name == "CUDAExecutionProvider"
        self.providers.append(chosen)
        made = _Session(self, SESSION(graph, options, providers=["CPUExecutionProvider"]))
        self._open.add(made)
        return made

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        gc.collect()
        return sorted(size for session in self._open for size in session.sizes)


class _Session:
    def __init__(self, all_: Sessions, session: Any) -> None:
        self.all = all_
        self.session = session
        self.sizes: set[tuple[int, ...]] = set()
        self.threads: set[int] = set()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=providers[node.op_type in self.all.left], get_nodes=lambda node=node: [node])
            for part in self.session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            for providers in [self.get_providers()]
        ]

    def get_providers(self) -> list[str]:
        return [self.all.used, "CPUExecutionProvider"]

    def run(self, names: Any, inputs: dict[str, Any]) -> Any:
        new = {inputs["views"].shape} - self.sizes
        self.sizes |= new  # it keeps what it has allocated
        if new and self.all.full is not None and len(self.all.sizes) > self.all.full:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer")
        self.threads.add(threading.get_ident())
        assert len(self.sizes) == len(self.threads) == 1
        return self.session.run(names, inputs)


SESSION = onnxruntime.InferenceSession


@pytest.fixture
def sessions(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    found = Sessions()
    monkeypatch.setattr(onnxruntime, "InferenceSession", found)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    return found


def opened(graph: bytes, precision: engines.Precision = "fp32", crop: int = 32) -> engines.Engine:
    seen = Preprocessing(crop, crop, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return onnx_runtime_cuda.load(onnx_runtime_cuda.compile(graph, precision, seen), precision)


def noise(*size: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


def test_a_session_that_fell_back_to_the_cpu_is_refused(pair: Bundle, sessions: Sessions) -> None:
    sessions.used = "CPUExecutionProvider"

    with pytest.raises(EngineLoadError, match="instead of CUDAExecutionProvider on Fake GPU"):
        opened(pair.read(pair.manifest.members[0]))


def test_a_session_that_leaves_a_layer_on_the_cpu_is_refused(pair: Bundle, sessions: Sessions) -> None:
    sessions.left = SHAPES | {"Conv", "Relu"}

    with pytest.raises(EngineLoadError, match="runs Conv, Relu on the CPU, not on Fake GPU"):
        opened(pair.read(pair.manifest.members[0]))


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_the_real_onnx_runtime_of_cpus_is_refused_at_its_first_session(cudart: Cudart, pair: Bundle) -> None:
    with pytest.raises(EngineLoadError, match="ONNX Runtime"):
        opened(pair.read(pair.manifest.members[0]))


def test_what_is_no_engine_is_refused(cudart: Cudart) -> None:
    with pytest.raises(EngineLoadError, match="no engine of ONNX Runtime's for GPUs"):
        onnx_runtime_cuda.load(b"\x08\n", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_session_on_the_gpu_answers(pair: Bundle, sessions: Sessions, precision: engines.Precision) -> None:
    assert precision in onnx_runtime_cuda.precisions()
    engine = opened(pair.read(pair.manifest.members[0]), precision)

    answers = engine.run(np.zeros((2, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    assert (engine.info.backend, engine.info.device) == ("onnxruntime-cuda", "Fake GPU")
    assert {chosen["use_tf32"] for chosen in sessions.providers} == {"0" if precision == "fp32" else "1"}
    engine.close()
    engine.close()
    assert sessions.sizes == []


def test_each_session_sees_one_size_and_batches_are_padded_or_split(sessions: Sessions) -> None:
    graph = fake_gpu.member()
    engine, alone = opened(graph), SESSION(graph, providers=["CPUExecutionProvider"])
    ready = [(n, 32, 32, 3) for n in engines.BUCKETS]
    assert sessions.sizes == ready

    with ThreadPoolExecutor(4) as pool:
        for views in [noise(n, 32, 32) for n in (1, 3, 10, 40, 41, 97)] + [noise(n, 32, 48) for n in (1, 2, 9)]:
            for answers in pool.map(engine.run, [views] * 3):
                np.testing.assert_allclose(answers, alone.run(None, {"views": views})[0], atol=1e-6)

    assert sessions.sizes == sorted([*ready, (1, 32, 48, 3), (4, 32, 48, 3)])


def test_sizes_of_whole_views_that_were_not_used_for_long_go(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime_cuda, "_MOST", 2)
    engine = opened(fake_gpu.member())

    for width in (40, 48, 40, 56):
        engine.run(noise(1, 32, width))

    others = [size for size in sessions.sizes if size[2] != 32]
    assert others == [(1, 32, 40, 3), (1, 32, 56, 3)]


def test_where_memory_is_full_other_sizes_of_whole_views_make_room(sessions: Sessions) -> None:
    engine = opened(fake_gpu.member())
    sessions.full = len(engines.BUCKETS) + 1

    for width in (40, 48, 56):
        assert engine.run(noise(1, 32, width)).shape == (1, 10)
        assert [size for size in sessions.sizes if size[2] != 32] == [(1, 32, width, 3)]

    sessions.full = 0
    with pytest.raises(EngineRunError, match="Failed to allocate"):
        engine.run(noise(1, 32, 64))
    assert engine.run(noise(7, 32, 32)).shape == (7, 10)


def test_where_nothing_was_built_the_gpu_is_used_if_it_can_be(
    sessions: Sessions, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = bundle.manifest.members[0]

    engine = engine_store.open_engine(bundle, member)
    asked = engine_store.open_engine(bundle, member, "onnxruntime")
    assert (engine.info.backend, asked.info.backend) == ("onnxruntime-cuda", "onnxruntime")
    engine.close()

    sessions.used = "CPUExecutionProvider"
    with pytest.raises(BackendUnavailable, match=r"CUDA or cuDNN is missing .*ask for the backend onnxruntime$"):
        engine_store.open_engine(bundle, member)
    sessions.used, sessions.full = "CUDAExecutionProvider", 0
    with pytest.raises(BackendUnavailable, match=r"^small can't run .*Failed to allocate .*the backend onnxruntime$"):
        engine_store.open_engine(bundle, member)
    sessions.used = "CPUExecutionProvider"
    with pytest.raises(EngineLoadError, match=r"CUDA or cuDNN is missing .*\[gpu\]'\)$"):
        engine_store.open_engine(bundle, member, "onnxruntime-cuda")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert engine_store.open_engine(bundle, member).info.backend == "onnxruntime"


def test_where_memory_is_full_other_members_make_room_too(sessions: Sessions) -> None:
    first, second = opened(fake_gpu.member()), opened(fake_gpu.member())
    first.run(noise(1, 32, 40))
    sessions.full = 2 * len(engines.BUCKETS) + 1

    assert second.run(noise(1, 32, 48)).shape == (1, 10)
    assert [size for size in sessions.sizes if size[2] != 32] == [(1, 32, 48, 3)]
    assert first.run(noise(1, 32, 40)).shape == (1, 10)


def test_an_engine_that_is_closed_or_forgotten_leaves_no_thread(sessions: Sessions) -> None:
    before = set(threading.enumerate())
    closed, forgotten = opened(fake_gpu.member()), opened(fake_gpu.member())
    threads = set(threading.enumerate()) - before
    assert [thread.daemon for thread in threads] == [True, True]  # one that hangs must not keep the process from ending

    closed.close()
    with pytest.raises(EngineRunError, match="the engine is closed"):
        closed.run(noise(1, 32, 32))
    del forgotten
    until(lambda: gc.collect() >= 0 and not any(thread.is_alive() for thread in threads))


def test_an_unusable_gpu_is_told_once_where_its_package_is_installed(
    cudart: Cudart, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", NO_GPU)
    engine_store._warn.cache_clear()
    assert engine_store.open_engine(bundle, bundle.manifest.members[0]).info.backend == "onnxruntime"
    assert not [message for message in caplog.messages if "runs on the CPU" in message]  # nobody asked for a GPU

    monkeypatch.setattr(onnxruntime, "get_device", lambda: "GPU")
    for _ in range(2):
        assert engine_store.open_engine(bundle, bundle.manifest.members[0]).info.backend == "onnxruntime"
    (told,) = [message for message in caplog.messages if "runs on the CPU" in message]
    assert "cudaErrorInsufficientDriver" in told


def test_a_member_that_was_left_out_runs_on_what_others_were_chosen_for(sessions: Sessions, bundle: Bundle) -> None:
    member = bundle.manifest.members[0]
    build_all(bundle, precisions=["fp32"], device="cpu")
    store = EngineStore(bundle)
    for record in store.records().values():
        (store.folder / record.file).unlink()

    assert engine_store.open_engine(bundle, member).info.backend == "onnxruntime"


def test_a_gpu_without_memory_for_crops_is_a_reason_not_to_load(sessions: Sessions) -> None:
    sessions.full = 3

    with pytest.raises(EngineRunError, match="Failed to allocate"):
        opened(fake_gpu.member())
    assert sessions.sizes == []
