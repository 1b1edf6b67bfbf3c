"""Sessions on a fake GPU, one a size of views. `make gpu-check` is what runs them on a GPU."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from resnet_ensemble.export import engine_store, engines
from resnet_ensemble.export.build_engines import build_all
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import BackendUnavailable, EngineLoadError, EngineRunError, onnx_runtime_cuda
from resnet_ensemble.training.views import Preprocessing
from tests.conftest import until
from tests.export.engines import fake_gpu
from tests.export.engines.fake_gpu import Cudart
from tests.export.engines.fake_sessions import SESSION, SHAPES, Sessions


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    return fake_gpu.small_bundle(shipped, tmp_path / "small")


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    made = Cudart()
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", made)
    return made


def test_the_cpu_s_onnx_runtime_is_not_taken_for_the_gpu_s(cudart: Cudart) -> None:
    with pytest.raises(BackendUnavailable, match=r"the CPU's; pip uninstall onnxruntime .*\[gpu\]"):
        onnx_runtime_cuda.precisions()


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
    monkeypatch.setattr(onnx_runtime_cuda, "cudart", Cudart(error=35))
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
