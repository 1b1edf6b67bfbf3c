"""A GPU that refuses whatever a real one would answer with a crash or with nonsense. It computes by ONNX Runtime.

`Cudart` stands for `cuda.bindings.runtime`, `TensorRt` for `tensorrt`. Work on a stream is done when the stream is
waited for, and not before, so that an answer read too soon is wrong here, too. A plan is a JSON header and a graph.
"""

import contextlib
import ctypes
import enum
import hashlib
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from resnet_ensemble.export import bundle
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.training.views import make_views

SCRATCH = 4096  # bytes that a context computes in, for each view


class Misuse(AssertionError):
    """What a real GPU does not forgive."""


def forbid(wrong: bool, what: str) -> None:
    if wrong:
        raise Misuse(what)


class CudaErrorCode(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Stream:
    def __init__(self, number: int) -> None:
        self.number = number
        self.waiting: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.contexts: list[Context] = []  # that were captured

    def __int__(self) -> int:
        return self.number


class Cudart:
    """A CUDA runtime on the host's memory.

    - error, count: what the probe finds
    - fails: by a function's name, which of its calls (0, 1, ...) gives which error
    - lost: every call that needs the process's context gives the error that broke it
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *, error: int = 0, count: int = 1) -> None:
        self.error, self.count = CudaErrorCode(error), count
        self.fails: dict[str, dict[int, CudaErrorCode]] = {}
        self.lost = False
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: set[int] = set()
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self._numbers = itertools.count(1000)
        self._calls: dict[str, int] = {}
        self._captured: dict[int, list[Callable[[], None]]] = {}

    def leaks(self) -> list[object]:
        return [*self.device, *self.pinned, *self.streams, *self.graphs, *self.executables]

    def find(self, pointer: int, size: int, memory: dict[int, Any]) -> None:
        inside = any(start <= pointer and pointer + size <= start + len(block) for start, block in memory.items())
        forbid(not inside, f"{size} bytes at {pointer} are in no such memory")

    # What is called; each gives (error, what it made)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self.error, None if self.error else self.count

    def cudaGetErrorName(self, error: int) -> tuple[Any, ...]:
        return CudaErrorCode.cudaSuccess, CudaErrorCode(error).name.encode()

    def cudaGetErrorString(self, error: int) -> tuple[Any, ...]:
        return CudaErrorCode.cudaSuccess, f"a fake {CudaErrorCode(error).name}".encode()

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        about = SimpleNamespace(name=b"Fake GPU\0\0", major=8, minor=9, totalGlobalMem=2**30)
        return self._outcome("cudaGetDeviceProperties", lambda: about)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._outcome("cudaDriverGetVersion", lambda: 13000)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return self._outcome("cudaDeviceSynchronize", lambda: None)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._outcome("cudaMalloc", lambda: self._allocate(size, self.device))

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._outcome("cudaMallocHost", lambda: self._allocate(size, self.pinned))

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        return self._outcome("cudaFree", lambda: self._free(pointer, self.device))

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        return self._outcome("cudaFreeHost", lambda: self._free(pointer, self.pinned))

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        forbid(flags != self.cudaStreamNonBlocking, "a stream that waits for the default stream")

        def made() -> Stream:
            stream = Stream(next(self._numbers))
            self.streams[stream.number] = stream
            return stream

        return self._outcome("cudaStreamCreateWithFlags", made)

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        forbid(bool(self._live(stream).waiting), "a stream destroyed with work on it")
        return self._outcome("cudaStreamDestroy", lambda: self.streams.pop(stream.number) and None)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        forbid(self._live(stream).capturing is not None, "a stream waited for while it is captured")
        work, stream.waiting = stream.waiting, []
        for step in work:
            step()
        return self._outcome("cudaStreamSynchronize", lambda: None)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: Stream) -> tuple[Any, ...]:
        down = kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost
        host, device = self.pinned, self.device

        def copy() -> None:
            self.find(to, size, host if down else device)
            self.find(source, size, device if down else host)
            ctypes.memmove(to, source, size)

        self.queue(stream, copy)
        return self._outcome("cudaMemcpyAsync", lambda: None)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Any, ...]:
        forbid(bool(self._live(stream).waiting), "a capture that begins with work on the stream")

        def begin() -> None:
            stream.capturing = []

        return self._outcome("cudaStreamBeginCapture", begin)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        work, stream.capturing = self._live(stream).capturing, None
        assert work is not None

        contexts, stream.contexts = stream.contexts, []

        def made() -> int:
            number = next(self._numbers)
            for context in contexts:
                context.captured = True
            self._captured[number] = work
            self.graphs.add(number)
            return number

        return self._outcome("cudaStreamEndCapture", made)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        def made() -> int:
            number = next(self._numbers)
            self.executables[number] = self._captured[graph]
            return number

        return self._outcome("cudaGraphInstantiate", made)

    def cudaGraphUpload(self, executable: int, stream: Stream) -> tuple[Any, ...]:
        forbid(executable not in self.executables, "an unknown graph uploaded")
        return self._outcome("cudaGraphUpload", lambda: None)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._outcome("cudaGraphDestroy", lambda: self.graphs.remove(graph))

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        return self._outcome("cudaGraphExecDestroy", lambda: self.executables.pop(executable) and None)

    def cudaGraphLaunch(self, executable: int, stream: Stream) -> tuple[Any, ...]:
        forbid(executable not in self.executables, "an unknown graph launched")
        self.launches += 1
        for step in self.executables[executable]:
            self.queue(stream, step)
        return self._outcome("cudaGraphLaunch", lambda: None)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (CudaErrorCode.cudaSuccess,)

    def queue(self, stream: Stream, step: Callable[[], None]) -> None:
        self._live(stream)
        (stream.waiting if stream.capturing is None else stream.capturing).append(step)

    def _live(self, stream: Stream) -> Stream:
        forbid(self.streams.get(int(stream)) is not stream, "a stream that does not live")
        return stream

    def _outcome(self, name: str, made: Callable[[], Any]) -> tuple[Any, ...]:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        error = self.fails.get(name, {}).get(call, CudaErrorCode.cudaSuccess)
        if self.lost and name not in ("cudaGetDeviceProperties", "cudaDriverGetVersion"):
            error = CudaErrorCode.cudaErrorIllegalAddress
        value = None if error else made()
        return (error,) if value is None and not error else (error, value)

    def _allocate(self, size: int, memory: dict[int, Any]) -> int:
        forbid(size <= 0, f"an allocation of {size} bytes")
        block = (ctypes.c_uint8 * size)()
        ctypes.memset(block, 0xAB, size)  # what nobody wrote is no zero
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _free(self, pointer: int, memory: dict[int, Any]) -> None:
        forbid(pointer not in memory, "memory freed that is not there")
        del memory[pointer]


def enumeration(name: str, *members: str) -> Any:
    return enum.Enum(name, list(members))  # type: ignore[misc]


Severity = enumeration("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.ready = True


def member() -> bytes:
    """The graph of a very small network: 10 classes, views of any size."""
    generator = np.random.default_rng(0)
    tensors = {
        "kernel": generator.normal(0, 0.01, (8, 3, 3, 3)),
        "weight": generator.normal(0, 1, (8, 10)),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Cast", ["views"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["picture"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["picture", "kernel"], ["sums"], "conv", strides=[2, 2]),
        helper.make_node("Relu", ["sums"], ["positive"], "relu"),
        helper.make_node("ReduceMean", ["positive", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["logits"], "linear"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "member",
        [helper.make_tensor_value_info("views", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(values.astype(np.int64 if name == "axes" else np.float32), name)
            for name, values in tensors.items()
        ],
    )
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return content


def small_bundle(shipped: Bundle, folder: Path) -> Bundle:
    """The shipped bundle with one member, which is very small."""
    graph = member()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    manifest = shipped.manifest
    one = manifest.members[0].model_copy(
        update={"name": "small", "sha256": hashlib.sha256(graph).hexdigest(), "measured": (), "calibration": None}
    )
    pictures, files = [], {one.file: graph}
    for picture in manifest.golden:
        files[picture.file] = shipped.read(picture)
        image = Image.open(io.BytesIO(files[picture.file])).convert("RGB")
        views = make_views(image, one.preprocessing, manifest.golden_protocol)
        mean = session.run(None, {"views": views})[0].astype(np.float64).mean(axis=0)
        pictures.append(picture.model_copy(update={"probabilities": {"small": tuple(map(float, mean))}}))
    changes = {"members": (one,), "golden": tuple(pictures), "measured": ()}
    return bundle.write(folder, manifest.model_copy(update=changes), files)


def plan(graph: bytes, profiles: Any, *, device: str = "Fake GPU", kind: str = "UINT8") -> bytes:
    """What the fake deserializes; `profiles` are (least, best, most) sizes."""
    header = {"device": device, "kind": kind, "profiles": profiles, "bytes": len(graph)}
    return json.dumps(header).encode() + b"\n" + graph


class TensorRt:
    """The module. `cudart` is the GPU that it runs on."""

    __version__ = "11.4.0.106"
    ILogger = ILogger
    TensorIOMode = enumeration("TensorIOMode", "INPUT", "OUTPUT")
    DataType = enumeration("DataType", "FLOAT", "UINT8", "INT8")
    ExecutionContextAllocationStrategy = enumeration("Strategy", "STATIC", "USER_MANAGED")
    LayerInformationFormat = enumeration("LayerInformationFormat", "ONELINE", "JSON")
    ProfilingVerbosity = enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")

    def __init__(self, cudart: Cudart) -> None:
        self.cudart = cudart
        self.contexts: list[Context] = []
        self.refused: set[str] = set()  # methods of contexts that fail
        self.touched = False

    def Runtime(self, logger: Any) -> Any:
        self.touched = True
        forbid(self.cudart.error != 0 or not self.cudart.count, "TensorRT without a driver: a crash")
        forbid(not logger.ready, "a logger whose base was never initialised")
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._deserialize(content, logger))

    def _deserialize(self, content: bytes, logger: Any) -> Any:
        header, _, graph = content.partition(b"\n")
        try:
            about = json.loads(header)
        except ValueError:
            logger.log(Severity.ERROR, "Serialization assertion magicTag == kMAGIC_TAG failed.")
            return None
        if about["bytes"] != len(graph):
            logger.log(Severity.ERROR, "Serialization assertion stdArchiveReader.size() failed.")
            return None
        if about["device"] != "Fake GPU":
            logger.log(Severity.ERROR, "The engine plan file is generated on an incompatible device")
            return None
        return Engine(self, graph, about, logger)


class Engine:
    def __init__(self, module: TensorRt, graph: bytes, about: dict[str, Any], logger: Any) -> None:
        self.module, self.about, self.logger = module, about, logger
        self.profiles = about["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = 2
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        graph = without_bf16(graph)
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.classes = self.session.get_outputs()[0].shape[1]

    def get_tensor_name(self, i: int) -> str:
        return ("views", "probabilities")[i]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.TensorIOMode.INPUT if name == "views" else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.module.DataType, self.about["kind"] if name == "views" else "FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, -1, -1, 3) if name == "views" else (-1, self.classes)

    def get_tensor_profile_shape(self, name: str, i: int) -> list[tuple[int, ...]]:
        forbid(name != "views", "a profile of an output")
        return [(*size, 3) for size in self.profiles[i]]

    def create_execution_context(self, strategy: Any) -> Any:
        forbid(strategy != self.module.ExecutionContextAllocationStrategy.USER_MANAGED, "memory that nobody counts")
        if "create_execution_context" in self.module.refused:
            return None
        context = Context(self)
        self.module.contexts.append(context)
        return context

    def create_engine_inspector(self) -> Any:
        layer = {"Name": "node_conv2d", "Outputs": [{"Name": "conv2d", "Format/Datatype": "Half"}]}
        return SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": [layer]}))


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.module, self.cudart = engine, engine.module, engine.module.cudart
        self.profile = 0
        self.nvtx_verbosity = self.module.ProfilingVerbosity.DETAILED  # as the plan was built
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.enqueued: set[tuple[int, ...]] = set()
        self.captured = False
        self._inside = threading.Lock()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        with self._changed("set_optimization_profile_async") as accepted:
            self.profile, self.shape = index, None
            return accepted and 0 <= index < len(self.engine.profiles) and stream in self.cudart.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        with self._changed("set_input_shape") as accepted:
            least, _, most = self.engine.profiles[self.profile]
            fits = all(low <= n <= high for low, n, high in zip([*least, 3], shape, [*most, 3], strict=True))
            if name != "views" or not fits or not accepted:
                return False
            self.shape = shape  # what it computes in stays what it was, large enough or not
            return True

    def infer_shapes(self) -> list[str]:
        if "infer_shapes" in self.module.refused:
            raise RuntimeError("infer_shapes error code: -1")
        return [] if self.shape else ["views"]

    def update_device_memory_size_for_shapes(self) -> int:
        forbid(self.shape is None, "memory counted before there is a shape")
        assert self.shape is not None
        if self._fails("update_device_memory_size_for_shapes"):
            return 0
        return SCRATCH * self.shape[0]

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._changed("set_device_memory"):
            self.cudart.find(memory, size, self.cudart.device)
            if not self._fails("set_device_memory"):
                self.scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._changed("set_tensor_address") as accepted:
            self.addresses[name] = memory
            return accepted and name in ("views", "probabilities")

    def execute_async_v3(self, stream: int) -> bool:
        forbid(type(stream) is not int or stream == 0, f"a run on {stream!r}: the default stream, or none")
        live = self.cudart.streams.get(stream)
        forbid(live is None, "a run on a stream that does not live")
        assert live is not None
        forbid(not self._inside.acquire(blocking=False), "one context in two threads")
        try:
            if "execute_async_v3" in self.module.refused or set(self.addresses) != {"views", "probabilities"}:
                return False
            forbid(self.shape is None, "a run without shapes")
            assert self.shape is not None
            forbid(self.scratch[1] < SCRATCH * self.shape[0], f"a run with {self.scratch[1]} bytes to compute in")
            forbid(self.nvtx_verbosity is not self.module.ProfilingVerbosity.NONE, "a run that is slow for a profiler")
            if live.capturing is None:
                forbid(self.captured, "a captured context run by itself, its graph may run too")
                self.enqueued.add(self.shape)
            else:
                if "capture" in self.module.refused:
                    return False
                forbid(self.shape not in self.enqueued, "a capture before a first run at this shape")
                live.contexts.append(self)
            self.cudart.queue(live, self._work(self.shape, dict(self.addresses), self.scratch))
            return True
        finally:
            self._inside.release()

    def _work(self, shape: tuple[int, ...], addresses: dict[str, int], scratch: tuple[int, int]) -> Callable[[], None]:
        def work() -> None:
            classes = self.engine.classes
            self.cudart.find(*scratch, self.cudart.device)
            self.cudart.find(addresses["views"], int(np.prod(shape)), self.cudart.device)
            self.cudart.find(addresses["probabilities"], 4 * shape[0] * classes, self.cudart.device)
            with _computing_in(self.cudart, scratch[0]):
                memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(addresses["views"])
                views = np.frombuffer(memory, np.uint8).reshape(shape)
                answers = self.engine.session.run(None, {"views": views})[0]
                ctypes.memmove(addresses["probabilities"], answers.ctypes.data, answers.nbytes)

        return work

    def _fails(self, method: str) -> bool:
        """As calls do that only log it."""
        if method in self.module.refused:
            self.engine.logger.log(Severity.ERROR, f"{method}: an error that nobody returns")
        return method in self.module.refused

    @contextlib.contextmanager
    def _changed(self, method: str) -> Iterator[bool]:
        forbid(self.captured, f"{method} on a captured context")
        forbid(not self._inside.acquire(blocking=False), "one context in two threads")
        try:
            yield method not in self.module.refused
        finally:
            self._inside.release()


_busy: set[tuple[int, int]] = set()


@contextlib.contextmanager
def _computing_in(cudart: Cudart, scratch: int) -> Iterator[None]:
    key = (id(cudart), scratch)
    forbid(key in _busy, "two runs at once in the same memory")
    _busy.add(key)
    try:
        yield
    finally:
        _busy.remove(key)


def without_bf16(graph: bytes) -> bytes:
    """A BF16 graph, to be computed in FP32: ONNX Runtime has no convolution in BF16 on CPUs."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    content: bytes = model.SerializeToString()
    return content
