"""ONNX Runtime on an NVIDIA GPU: FP32 and FP16.

ONNX Runtime lists a provider that was compiled in, works or not, and where CUDA fails it goes on with the CPU and says
so only in its log. So the GPU is asked first, and a session is refused if a layer of the network runs on anything else.

Whenever the size of the views is another than in the run before, a session plans all its convolutions anew, which takes
a ResNet-50 110 to 170 ms in FP32, and a run of one to 40 views 3 to 16 ms. When batches came as they were, the server
answered 38 images/s with 64 clients (ResNet-18 and 50, one crop, FP32, 16 runs side by side), and then 615 (in FP16,
two). So each size has a session of its own, and batches are padded up to a few sizes. (NVIDIA H200, ONNX Runtime
1.31.1, cuDNN 9.19, 2026-11-27.)
"""

import queue
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import redirect_stdout, suppress
from typing import TypeVar

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from resnet_ensemble.export.engines import (
    BUCKETS,
    WHOLE_VIEWS,
    BackendUnavailable,
    Engine,
    EngineInfo,
    EngineLoadError,
    EngineRunError,
    Form,
    Precision,
    gpu,
    onnx_runtime,
)
from resnet_ensemble.export.engines.gpu import Gpu, probe
from resnet_ensemble.training.views import Preprocessing

PROVIDER = "CUDAExecutionProvider"
_QUIET = 3  # errors only
# What must run on the GPU. The arithmetic on the sizes of whole views, a few numbers, is left to the CPU, where ONNX
# Runtime puts it on purpose: `session.disable_cpu_ep_fallback` would refuse every network that has it.
_LAYERS = frozenset({"Conv", "Relu", "MaxPool", "Gemm", "MatMul", "Softmax"})
# Views/s of a ResNet-50 in batches of 1, 10 and 40 (as in the docstring above): in FP16 568, 3,779 and 6,313 without
# these two, 625, 4,988 and 8,552 with them. Without `use_tf32` ONNX Runtime asks cuDNN for plans without tensor cores
# in FP16, too, finds none, and takes slower ones that fuse nothing. In FP32 the layout NHWC does 0.85 of NCHW's.
_OPTIONS = {
    "fp32": {"use_tf32": "0", "prefer_nhwc": "0"},  # FP32 is to be FP32, not TF32
    "fp16": {"use_tf32": "1", "prefer_nhwc": "1"},
}
_WHOLE = (1, WHOLE_VIEWS)  # what batches of whole views are padded up to
# Sessions for whole views that an engine keeps; `dense` sees pictures in 17 sizes, `multiscale` in more. Those for
# crops took about 390 MB each for a ResNet-50 in FP16, on average.
_MOST = 40

_Size = tuple[int, ...]  # (n, h, w, 3)
_T = TypeVar("_T")


class OnnxRuntimeCudaEngine:
    """Sessions on the first GPU, one a size of views. Raises EngineLoadError if a layer would run on the CPU.

    Batches of crops are ready from the start, which takes seconds, and so does the first run of a size of whole views:
    about 0.2 s to open a session, and 0.2 to 0.7 s to plan. All runs are in one thread: ONNX Runtime keeps memory of
    cuDNN and cuBLAS for each thread that a session was used in, and the GPU computes one batch after the other anyway.
    """

    def __init__(self, graph: bytes, precision: Precision, crop: int) -> None:
        self._gpu = _gpu()
        self._graph = graph
        self._precision = precision
        self._crop = crop
        self._crops: dict[_Size, onnxruntime.InferenceSession] = {}
        self._others: OrderedDict[_Size, onnxruntime.InferenceSession] = OrderedDict()  # the last used last
        self._guard = threading.Lock()  # of the others, which any engine may drop
        self._thread = _Thread()
        try:
            self._thread.run(self._prepare)
        except BaseException:
            self.close()
            raise
        _engines.add(self)
        self.info = EngineInfo("onnxruntime-cuda", version(), precision, self._gpu.name, threads=1)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). Raises EngineRunError."""
        return self._thread.run(lambda: self._run(views))

    def close(self) -> None:
        """Wait for what is running, then drop the sessions. A second call has no effect."""
        self._thread.end()
        self._crops.clear()
        self.drop_others()

    def drop_others(self) -> None:
        """Give back the memory of sessions for whole views. One that runs meanwhile is kept until it has ended."""
        with self._guard:
            self._others.clear()

    def _prepare(self) -> None:
        for n in BUCKETS:
            size = n, self._crop, self._crop, 3
            session = self._open()
            onnx_runtime.run(session, np.zeros(size, np.uint8))
            self._crops[size] = session

    def _run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes = BUCKETS if views.shape[1:3] == (self._crop, self._crop) else _WHOLE
        parts = [views[start : start + sizes[-1]] for start in range(0, len(views), sizes[-1])]
        return np.concatenate([self._run_one(part, next(n for n in sizes if n >= len(part))) for part in parts])

    def _run_one(self, views: NDArray[np.uint8], padded: int) -> NDArray[np.float32]:
        n = len(views)
        if padded > n:
            views = np.concatenate([views, np.zeros((padded - n, *views.shape[1:]), np.uint8)])
        if session := self._crops.get(views.shape):
            return onnx_runtime.run(session, views)[:n]
        with self._guard:
            session = self._others.get(views.shape)
            if session is not None:
                self._others.move_to_end(views.shape)
        if session is not None:
            return onnx_runtime.run(session, views)[:n]
        with suppress(EngineRunError):
            return self._run_first(views)[:n]
        # The GPU's memory may be full, of any member's sessions. The one that failed is gone by now.
        for engine in list(_engines):
            engine.drop_others()
        return self._run_first(views)[:n]

    def _run_first(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """With a session for this size, which is kept if it answers."""
        try:
            session = self._open()
        except EngineLoadError as error:  # those for crops could be opened
            raise EngineRunError(str(error)) from error
        answers = onnx_runtime.run(session, views)
        with self._guard:
            self._others[views.shape] = session
            if len(self._others) > _MOST:
                self._others.popitem(last=False)
        return answers

    def _open(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = {
            "device_id": "0",
            # Timing every algorithm for every size takes five times as long to begin with, for the same views/s.
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",  # and not twice as much as before
            **_OPTIONS[self._precision],
        }
        name = self._gpu.name
        try:
            session = onnxruntime.InferenceSession(self._graph, options, providers=[(PROVIDER, provider)])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises classes of its own, without a common one
            raise EngineLoadError(f"ONNX Runtime {version()} can't run on {name}: {error}") from None
        used = session.get_providers()
        if used[:1] != [PROVIDER]:
            raise EngineLoadError(
                f"ONNX Runtime {version()} took {used} instead of {PROVIDER} on {name}; its log says why: usually "
                "CUDA or cuDNN is missing or of another version (pip install 'resnet-ensemble[gpu]')"
            )
        if elsewhere := _elsewhere(session):
            raise EngineLoadError(
                f"ONNX Runtime {version()} runs {', '.join(sorted(elsewhere))} on the CPU, not on {name}"
            )
        return session


_engines: weakref.WeakSet[OnnxRuntimeCudaEngine] = weakref.WeakSet()


class _Thread:
    """Runs what it is given, one after the other. A run that hangs does not keep the process from ending."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=_work, args=(self._tasks,), name="onnxruntime-cuda", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._tasks.put, None)  # an engine that nobody closed takes its thread along

    def run(self, task: Callable[[], _T]) -> _T:
        """What the task returns or raises. Raises EngineRunError after the end."""
        future: Future[_T] = Future()

        def work() -> None:
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001  # it is the caller's
                future.set_exception(error)

        with self._guard:
            if self._ended:
                raise EngineRunError("the engine is closed")
            self._tasks.put(work)
        return future.result()

    def end(self) -> None:
        """Wait for the tasks that were given."""
        with self._guard:
            if not self._ended:
                self._tasks.put(None)
            self._ended = True
        self._thread.join()


def _work(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # with its views


def _elsewhere(session: onnxruntime.InferenceSession) -> set[str]:
    """Kinds of layers that do not run on the GPU."""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != PROVIDER]
    return {node.op_type for part in parts for node in part.get_nodes()} & _LAYERS


def version() -> str:
    """The installed version."""
    return onnxruntime.__version__  # type: ignore[no-any-return]


def precisions() -> tuple[Precision, ...]:
    """FP32 and FP16; it has no convolution of bytes. Raises BackendUnavailable."""
    _gpu()
    if PROVIDER not in onnxruntime.get_available_providers():
        raise BackendUnavailable(
            "the installed ONNX Runtime is the CPU's; pip uninstall onnxruntime and then pip install "
            "'resnet-ensemble[gpu]': both packages write the same files"
        )
    return ("fp32", "fp16")


def int8_form() -> Form:
    """As on the CPU."""
    return "integer"


def identity(seen: Preprocessing) -> str:  # noqa: ARG001  # it takes views of any size
    """GPU and driver, and the batches that it is ready for."""
    return f"{_gpu().identity}; {BUCKETS}, {_WHOLE}"


def compile(graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:  # noqa: A001  # the backends' common verb
    """The side of crops, in a line of its own, and the graph in the types that it is to be computed in.

    A session optimises it in less than a second.
    """
    if precision != "fp32":
        from resnet_ensemble.export.precisions import lowered  # noqa: PLC0415  # ONNX, which serving does without

        graph = lowered(graph, "fp16")
    return b"%d\n" % seen.crop + graph


def is_lost() -> bool:
    """Whether this process can't use the GPU any more."""
    return gpu.is_lost(cudart)


def load(compiled: bytes, precision: Precision, threads: int = 1) -> Engine:  # noqa: ARG001  # the GPU computes
    """An engine from what `compile` made."""
    _gpu()
    with redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's, from their packages
    onnxruntime.set_default_logger_severity(_QUIET)  # it warns of every session that no plugin has the GPU
    crop, _, graph = compiled.partition(b"\n")
    if not crop.isdigit():
        raise EngineLoadError("this is no engine of ONNX Runtime's for GPUs; run export/build_engines.py again")
    return OnnxRuntimeCudaEngine(graph, precision, int(crop))


def _gpu() -> Gpu:
    return probe(cudart)
