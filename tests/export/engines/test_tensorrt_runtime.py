"""The runtime on a strict fake. Not yet run on a GPU: `make gpu-check` is what runs it there."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnet_ensemble.export import engines
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import BUCKETS, BackendUnavailable, EngineLoadError, gpu, tensorrt_builder
from resnet_ensemble.export.engines.gpu import CudaError
from resnet_ensemble.export.engines.tensorrt_profiles import profiles
from resnet_ensemble.export.engines.tensorrt_runtime import TensorRtEngine, TensorRtError
from resnet_ensemble.training.views import SCALES, Preprocessing, make_whole_views, shorter_side
from tests.export.engines import fake_gpu
from tests.export.engines.fake_gpu import CudaErrorCode, Cudart, TensorRt

OUT_OF_MEMORY = CudaErrorCode.cudaErrorMemoryAllocation


@pytest.fixture
def seen(shipped: Bundle) -> Preprocessing:
    return shipped.manifest.members[0].preprocessing


@pytest.fixture(scope="module")
def graph() -> bytes:
    return fake_gpu.member()


@pytest.fixture
def plan(graph: bytes, seen: Preprocessing) -> bytes:
    return fake_gpu.plan(graph, [astuple(profile) for profile in profiles(seen)])


@pytest.fixture(scope="module")
def reference(graph: bytes) -> engines.Engine:
    return engines.backend("onnxruntime").load(graph, "fp32")


@pytest.fixture
def cudart() -> Cudart:
    return Cudart()


@pytest.fixture
def trt(cudart: Cudart) -> TensorRt:
    return TensorRt(cudart)


@pytest.fixture
def engine(trt: TensorRt, cudart: Cudart, plan: bytes) -> Iterator[TensorRtEngine]:
    made = opened(trt, cudart, plan)
    yield made
    made.close()
    assert cudart.leaks() == []


def opened(trt: TensorRt, cudart: Cudart, plan: bytes, **options: Any) -> TensorRtEngine:
    return TensorRtEngine(trt, cudart, plan, "fp32", **options)  # type: ignore[arg-type]


def views(n: int, height: int = 32, width: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def test_batches_of_every_size_are_answered(engine: TensorRtEngine, reference: engines.Engine) -> None:
    for n in (1, 2, 3, 5, 6, 10, 11, 39, 40, 41, 95, 7):
        np.testing.assert_allclose(engine.run(views(n)), reference.run(views(n)), atol=1e-5)
    assert engine.run(views(0)).shape == (0, 10)


def test_every_bucket_runs_as_a_graph_and_others_are_padded_to_one(engine: TensorRtEngine, cudart: Cudart) -> None:
    assert engine.captured == BUCKETS
    for n, launches in ((1, 1), (3, 1), (10, 1), (40, 1), (41, 2), (100, 3)):
        before = cudart.launches
        engine.run(views(n))
        assert cudart.launches - before == launches


def test_whole_views_of_every_size_are_answered(
    engine: TensorRtEngine, reference: engines.Engine, seen: Preprocessing, cudart: Cudart
) -> None:
    launches = cudart.launches
    for i, (height, width) in enumerate([(32, 48), (48, 32), (36, 36), (92, 184), (32, 48), (184, 92), (32, 64)] * 2):
        some = views(1 + i % 6, height, width, seed=i)
        np.testing.assert_allclose(engine.run(some), reference.run(some), atol=1e-5)
    assert cudart.launches == launches
    np.testing.assert_allclose(engine.run(views(3)), reference.run(views(3)), atol=1e-5)  # crops are as before


@pytest.mark.parametrize(
    "seen",
    [
        Preprocessing(256, 224, (0.5, 0.5, 0.5), (1, 1, 1)),
        Preprocessing(32, 32, (0.5, 0.5, 0.5), (1, 1, 1), padding=2),
        Preprocessing(232, 224, (0.5, 0.5, 0.5), (1, 1, 1)),
        Preprocessing(900, 224, (0.5, 0.5, 0.5), (1, 1, 1)),
        Preprocessing(908, 224, (0.5, 0.5, 0.5), (1, 1, 1)),  # its longest side is no multiple of the quantum
    ],
    ids=str,
)
def test_the_profiles_take_every_view_of_every_protocol(seen: Preprocessing) -> None:
    taken = profiles(seen)
    for size in ((60, 60), (8, 180), (180, 8), (66, 100)):
        for protocol in ("dense", "multiscale"):
            for view in make_whole_views(Image.new("RGB", size), seen, protocol):
                assert any(profile.accepts((1, *view.shape[:2])) for profile in taken), (size, view.shape)
    assert all(any(p.accepts((n, seen.crop, seen.crop)) for p in taken if p.crops) for n in BUCKETS)
    assert all(taken[0].accepts((n, seen.crop, seen.crop)) for n in range(1, BUCKETS[-1] + 1))  # as Triton needs it
    for profile in taken:
        assert profile.accepts(profile.best)
    largest = 2 * max(shorter_side(scale, seen) for scale in (None, *SCALES))
    assert max(profile.most[1] for profile in taken) < largest + seen.quantum


def test_few_crops_run_on_the_profile_that_is_tuned_for_few(engine: TensorRtEngine) -> None:
    program = engine._program

    tuned = {n: program.profiles[program.profile((n, 32, 32))].best[0] for n in BUCKETS}
    assert tuned == {1: 1, 2: 1, 5: 1, 10: 40, 20: 40, 40: 40}


@pytest.mark.parametrize("size", [(20, 20), (161, 160), (32, 400)])
def test_views_that_no_profile_takes_are_refused(engine: TensorRtEngine, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the plan takes views of"):
        engine.run(views(1, *size))


@pytest.mark.parametrize("wrong", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8)])
def test_what_is_no_batch_of_views_is_refused(engine: TensorRtEngine, wrong: Any) -> None:
    with pytest.raises(ValueError, match="views are uint8"):
        engine.run(wrong)


def test_views_that_lie_apart_in_memory_are_answered(engine: TensorRtEngine, reference: engines.Engine) -> None:
    mirrored = views(3)[:, :, ::-1]

    np.testing.assert_allclose(engine.run(mirrored), reference.run(np.ascontiguousarray(mirrored)), atol=1e-5)


def test_many_threads_get_their_own_answers(engine: TensorRtEngine) -> None:
    some = [views(1 + i % 12, *((32, 32) if i % 3 else (32, 48)), seed=i) for i in range(24)]
    alone = [engine.run(one) for one in some]

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(engine.run, some))

    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_runs_go_side_by_side(engine: TensorRtEngine, monkeypatch: pytest.MonkeyPatch, cudart: Cudart) -> None:
    both = Barrier(2, timeout=10)
    launch = cudart.cudaGraphLaunch

    def together(executable: int, stream: fake_gpu.Stream) -> tuple[Any, ...]:
        both.wait()  # only passed if two slots run at once
        return launch(executable, stream)

    monkeypatch.setattr(cudart, "cudaGraphLaunch", together)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(engine.run, [views(2), views(2)]))) == 2


def test_it_says_what_it_is(engine: TensorRtEngine) -> None:
    assert (engine.info.backend, engine.info.version) == ("tensorrt", "11.4.0.106")
    assert (engine.info.device, engine.info.precision) == ("Fake GPU", "fp32")
    assert "node_conv2d" in engine.layers()


def test_closing_frees_everything_and_waits_for_what_is_running(trt: TensorRt, cudart: Cudart, plan: bytes) -> None:
    engine = opened(trt, cudart, plan)
    engine.run(views(2, 32, 48))
    with engine._slot():
        closing = Thread(target=engine.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert cudart.leaks()
    closing.join(10)

    assert cudart.leaks() == []
    with pytest.raises(TensorRtError, match="closed"):
        engine.run(views(1))
    engine.close()


def test_without_a_driver_tensorrt_is_never_touched(plan: bytes) -> None:
    cudart = Cudart(error=35)
    trt = TensorRt(cudart)

    with pytest.raises(BackendUnavailable, match=r"cudaErrorInsufficientDriver.*driver, r580"):
        opened(trt, cudart, plan)
    assert not trt.touched


@pytest.mark.parametrize("function", ["cudaGetDeviceProperties", "cudaDriverGetVersion"])
def test_a_gpu_that_is_hidden_or_does_not_answer_is_no_gpu(function: str) -> None:
    with pytest.raises(BackendUnavailable, match="CUDA_VISIBLE_DEVICES"):
        gpu.probe(Cudart(count=0))  # type: ignore[arg-type]
    broken = Cudart()
    broken.fails = {function: {0: OUT_OF_MEMORY}}
    with pytest.raises(BackendUnavailable, match="does not answer"):
        gpu.probe(broken)  # type: ignore[arg-type]


def test_a_gpu_is_described_by_what_an_engine_depends_on(
    cudart: Cudart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DRIVER_FILE", tmp_path / "version")
    assert gpu.probe(cudart).identity == "Fake GPU, compute 8.9, driver of CUDA 13000"  # type: ignore[arg-type]
    (tmp_path / "version").write_text("580.95.05\n")
    assert gpu.probe(cudart).identity == "Fake GPU, compute 8.9, driver 580.95.05"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": b"noise"}, "magicTag.*build_engines"),
        ({"device": "Another GPU"}, "incompatible device.*build_engines"),
        ({"kind": "INT8"}, "not of a member"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_leaks(
    trt: TensorRt, cudart: Cudart, graph: bytes, change: dict[str, Any], message: str
) -> None:
    content = change.pop("content", None) or fake_gpu.plan(graph, [], **change)

    with pytest.raises(EngineLoadError, match=message):
        opened(trt, cudart, content)
    assert cudart.leaks() == []


def test_all_have_one_logger_which_forgets_what_went_wrong_before(trt: TensorRt, cudart: Cudart, plan: bytes) -> None:
    logger = tensorrt_builder.logger_of(trt)
    with pytest.raises(EngineLoadError, match="magicTag"):
        TensorRtEngine(trt, cudart, b"noise", "fp32")
    assert "magicTag" in logger.explain()

    engine = TensorRtEngine(trt, cudart, plan, "fp32")

    assert tensorrt_builder.logger_of(trt) is logger
    assert logger.explain() == "it does not say why"
    engine.close()


def test_a_library_that_makes_no_runtime_is_an_error(trt: TensorRt, cudart: Cudart, plan: bytes) -> None:
    def factory(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Runtime = factory  # type: ignore[method-assign]

    with pytest.raises(EngineLoadError, match="returned nullptr"):
        opened(trt, cudart, plan)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("create_execution_context", "makes no context"),
        ("set_optimization_profile_async", "refuses profile 1"),
        ("set_input_shape", r"refuses views of \(1, 32, 32\)"),
        ("infer_shapes", r"infers no shapes from views of \(1, 32, 32\) \(infer_shapes error code: -1\)"),
        ("update_device_memory_size_for_shapes", "to count its memory: .*nobody returns"),
        ("set_device_memory", "the memory to compute in: .*nobody returns"),
        ("set_tensor_address", "the address of views"),
        ("execute_async_v3", "refuses a run"),
    ],
)
def test_every_call_that_is_refused_is_an_error_and_nothing_leaks(
    trt: TensorRt, cudart: Cudart, plan: bytes, method: str, message: str
) -> None:
    trt.refused = {method}

    with pytest.raises(TensorRtError, match=message):
        opened(trt, cudart, plan)
    assert cudart.leaks() == []


@pytest.mark.parametrize(
    "method", ["infer_shapes", "update_device_memory_size_for_shapes", "set_device_memory", "set_tensor_address"]
)
def test_after_a_change_of_size_that_was_refused_the_size_before_is_answered_rightly(
    trt: TensorRt, cudart: Cudart, plan: bytes, reference: engines.Engine, method: str
) -> None:
    engine = opened(trt, cudart, plan, slots=1)
    first, second = views(2, 32, 64), views(2, 32, 48, seed=1)
    engine.run(first)
    trt.refused = {method}
    with pytest.raises(TensorRtError):
        engine.run(second)
    trt.refused = set()

    for batch in (first, second):
        np.testing.assert_allclose(engine.run(batch), reference.run(batch), atol=1e-5)
    engine.close()


# Which call fails, of those that opening an engine with one slot and a few runs make.
FALLIBLE = [
    *[("cudaMalloc", i) for i in range(3)],
    *[("cudaMallocHost", i) for i in range(2)],
    *[("cudaMemcpyAsync", i) for i in (0, 1, 3)],
    *[("cudaStreamSynchronize", i) for i in (0, 6, 12, 15)],
    *[(f"cuda{name}", i) for name in ("StreamBeginCapture", "GraphInstantiate", "GraphUpload") for i in (0, 5)],
    ("cudaGraphLaunch", 1),
    ("cudaStreamCreateWithFlags", 0),
]


@pytest.mark.parametrize(("function", "call"), FALLIBLE)
def test_every_failure_of_cuda_is_an_error_and_nothing_leaks(
    trt: TensorRt, cudart: Cudart, plan: bytes, function: str, call: int
) -> None:
    cudart.fails = {function: {call: OUT_OF_MEMORY}}

    def use() -> None:
        engine = opened(trt, cudart, plan, slots=1)
        try:
            for _ in range(4):
                engine.run(views(2))
        finally:
            engine.close()

    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        use()
    assert cudart.leaks() == []


def test_where_nothing_can_be_captured_it_runs_without_graphs_and_says_so(
    trt: TensorRt, cudart: Cudart, plan: bytes, reference: engines.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    trt.refused = {"capture"}
    engine = opened(trt, cudart, plan)

    assert engine.captured == ()
    assert "batches of 40 run without a CUDA graph" in caplog.text
    np.testing.assert_allclose(engine.run(views(7)), reference.run(views(7)), atol=1e-5)
    engine.close()
    assert cudart.leaks() == []


def test_a_capture_that_cuda_breaks_off_is_no_failure(trt: TensorRt, cudart: Cudart, plan: bytes) -> None:
    cudart.fails = {"cudaStreamEndCapture": {0: CudaErrorCode.cudaErrorStreamCaptureUnsupported}}
    engine = opened(trt, cudart, plan, slots=1)

    assert engine.captured == BUCKETS[1:]
    engine.run(views(1))
    engine.close()
    assert cudart.leaks() == []


def test_after_a_run_without_memory_the_next_ones_are_right(
    engine: TensorRtEngine, cudart: Cudart, reference: engines.Engine
) -> None:
    small, large = views(1, 32, 48), views(4, 92, 184)
    engine._slots, spare = engine._slots, engine._idle.pop()  # so that all runs are in one slot
    engine.run(small)
    done = cudart._calls["cudaMalloc"]
    for failing in range(3):
        cudart.fails = {"cudaMalloc": {done + failing: OUT_OF_MEMORY}}
        with pytest.raises(CudaError):
            engine.run(large)
        done = cudart._calls["cudaMalloc"]
    cudart.fails = {}
    for some in (small, large, small):
        np.testing.assert_allclose(engine.run(some), reference.run(some), atol=1e-5)
    engine._idle.append(spare)


# The fake is strict: each of these would be a crash, or nonsense, on a GPU


@pytest.fixture
def context(trt: TensorRt, cudart: Cudart, plan: bytes) -> Any:
    runtime = trt.Runtime(fake_gpu.ILogger())
    made = runtime.deserialize_cuda_engine(plan).create_execution_context(
        TensorRt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    made.nvtx_verbosity = TensorRt.ProfilingVerbosity.NONE
    assert made.set_input_shape("views", (1, 32, 32, 3))
    return made


def ready(context: Any, cudart: Cudart) -> fake_gpu.Stream:
    stream: fake_gpu.Stream = cudart.cudaStreamCreateWithFlags(1)[1]
    context.set_device_memory(cudart.cudaMalloc(fake_gpu.SCRATCH)[1], fake_gpu.SCRATCH)
    context.set_tensor_address("views", cudart.cudaMalloc(32 * 32 * 3)[1])
    context.set_tensor_address("probabilities", cudart.cudaMalloc(40)[1])
    return stream


def test_the_fake_runs_what_is_right(context: Any, cudart: Cudart) -> None:
    stream = ready(context, cudart)

    assert context.execute_async_v3(int(stream))
    cudart.cudaStreamSynchronize(stream)


def test_the_fake_refuses_a_shape_outside_the_profile(context: Any) -> None:
    assert not context.set_input_shape("views", (41, 32, 32, 3))
    assert not context.set_input_shape("pixels", (1, 32, 32, 3))


def test_the_fake_refuses_a_run_without_addresses(context: Any, cudart: Cudart) -> None:
    stream = ready(context, cudart)
    context.addresses.clear()

    assert not context.execute_async_v3(int(stream))


@pytest.mark.parametrize("stream", [0, 7])
def test_the_fake_refuses_the_default_stream_and_unknown_ones(context: Any, cudart: Cudart, stream: int) -> None:
    ready(context, cudart)

    with pytest.raises(fake_gpu.Misuse):
        context.execute_async_v3(stream)


def test_the_fake_refuses_a_capture_before_a_run_and_changes_after_one(context: Any, cudart: Cudart) -> None:
    stream = ready(context, cudart)
    cudart.cudaStreamBeginCapture(stream, 1)
    with pytest.raises(fake_gpu.Misuse, match="before a first run"):
        context.execute_async_v3(int(stream))
    cudart.cudaStreamEndCapture(stream)
    context.execute_async_v3(int(stream))
    cudart.cudaStreamSynchronize(stream)
    cudart.cudaStreamBeginCapture(stream, 1)
    assert context.execute_async_v3(int(stream))
    cudart.cudaStreamEndCapture(stream)

    for change in (
        lambda: context.set_input_shape("views", (1, 32, 32, 3)),
        lambda: context.set_tensor_address("views", 1),
        lambda: context.execute_async_v3(int(stream)),
    ):
        with pytest.raises(fake_gpu.Misuse, match="captured context"):
            change()


def test_the_fake_refuses_memory_that_is_gone_or_too_small(context: Any, cudart: Cudart) -> None:
    stream = ready(context, cudart)
    context.execute_async_v3(int(stream))
    cudart.cudaFree(context.addresses["views"])
    with pytest.raises(fake_gpu.Misuse, match="in no such memory"):
        cudart.cudaStreamSynchronize(stream)
    context.set_device_memory(cudart.cudaMalloc(10)[1], 10)
    with pytest.raises(fake_gpu.Misuse, match="bytes to compute in"):
        context.execute_async_v3(int(stream))


def test_the_fake_answers_only_those_who_wait(context: Any, cudart: Cudart) -> None:
    stream = ready(context, cudart)
    answer = fake_gpu.ctypes.string_at(context.addresses["probabilities"], 40)
    context.execute_async_v3(int(stream))

    assert fake_gpu.ctypes.string_at(context.addresses["probabilities"], 40) == answer
    cudart.cudaStreamSynchronize(stream)
    assert fake_gpu.ctypes.string_at(context.addresses["probabilities"], 40) != answer
