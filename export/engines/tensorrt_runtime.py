"""A TensorRT plan, ready to run: CUDA graphs of the usual batches, several runs side by side.

`module` is `tensorrt` and `cudart` is `cuda.bindings.runtime`; tests pass others. Not yet run with TensorRT: the order
of the calls is that of NVIDIA's headers and of trtexec, and tests/export/engines/fake_gpu.py refuses any other.

The engine's weights are shared. What a run changes belongs to a slot: a stream, pinned and device memory, and contexts,
of which none is used by two threads at once. Crops run as CUDA graphs, one for each batch of BUCKETS and a context for
each, since a graph has its context's shapes and addresses inside. Views of other sizes run as they come.
"""

import ctypes
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export.engines import BUCKETS, EngineInfo, EngineLoadError, EngineRunError, Precision
from resnet_ensemble.export.engines.gpu import check, probe
from resnet_ensemble.export.engines.tensorrt_builder import INPUT, logger_of
from resnet_ensemble.export.engines.tensorrt_profiles import Profile, Size

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

SLOTS = 2  # while one copies, the other computes
_DEVICE_TO_HOST = "cudaMemcpyDeviceToHost"
_HOST_TO_DEVICE = "cudaMemcpyHostToDevice"


class TensorRtError(EngineRunError):
    """TensorRT refused a call while an engine ran or was made ready."""


class TensorRtEngine:
    """A plan on the first GPU. Raises BackendUnavailable without one, EngineLoadError where the plan doesn't fit."""

    def __init__(
        self, module: ModuleType, cudart: ModuleType, plan: bytes, precision: Precision, *, slots: int = SLOTS
    ) -> None:
        gpu = probe(cudart)  # before TensorRT's first object: without a driver it may crash
        self.info = EngineInfo("tensorrt", module.__version__, precision, gpu.name, threads=1)
        logger = logger_of(module)
        self._program = _deserialize(module, plan, logger, gpu.name)
        self._free = threading.Condition()
        self._closed = False
        with ExitStack() as stack:
            stack.callback(self._forget)
            self._slots = [stack.enter_context(_Slot(module, cudart, self._program)) for _ in range(slots)]
            self._idle = list(self._slots)
            self._stack = stack.pop_all()

    @property
    def captured(self) -> tuple[int, ...]:
        """Batches of crops that run as CUDA graphs in every slot."""
        return tuple(n for n in BUCKETS if all(n in slot.graphs for slot in self._slots))

    def layers(self) -> str:
        """What TensorRT tells about each layer of the plan, as JSON."""
        return self._program.describe()

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). Raises ValueError for sizes that the plan does not take."""
        if views.ndim != 4 or views.dtype != np.uint8 or views.shape[3] != 3:
            raise ValueError(f"views are uint8 (n, h, w, 3), not {views.dtype} {views.shape}")
        with self._slot() as slot:
            most = self._program.most(views.shape[1], views.shape[2])
            answers = np.empty((len(views), self._program.classes), np.float32)
            for start in range(0, len(views), most):
                slot.run(views[start : start + most], answers[start : start + most])
        return answers

    def close(self) -> None:
        """Wait for what is running, then free everything. A second call has no effect."""
        with self._free:
            self._closed = True
            self._free.notify_all()
            self._free.wait_for(lambda: len(self._idle) == len(self._slots))
        self._stack.close()

    @contextmanager
    def _slot(self) -> Iterator["_Slot"]:
        with self._free:
            self._free.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise TensorRtError("the engine is closed")
            slot = self._idle.pop()
        try:
            yield slot
        finally:
            with self._free:
                self._idle.append(slot)
                self._free.notify_all()

    def _forget(self) -> None:
        self._slots, self._idle = [], []
        del self._program  # its contexts are gone by now


@dataclass(frozen=True)
class _Program:
    """A deserialized engine and what it says of itself. The runtime and the logger must outlive it."""

    engine: "trt.ICudaEngine"
    runtime: "trt.Runtime"
    logger: Any
    module: ModuleType
    output: str
    classes: int
    profiles: tuple[Profile, ...]

    def describe(self) -> str:
        """What TensorRT tells about each layer, as JSON."""
        if not TYPE_CHECKING:
            trt = self.module
        inspector = self.engine.create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def most(self, height: int, width: int) -> int:
        """The largest batch of views of a size. Raises ValueError if none is taken."""
        taken = [p.most[0] for p in self.profiles if p.accepts((p.most[0], height, width))]
        if not taken:
            sizes = ", ".join(f"{p.least[1:]} to {p.most[1:]}" for p in self.profiles)
            raise ValueError(f"the plan takes views of (height, width) {sizes}, not {(height, width)}")
        return max(taken)

    def profile(self, size: Size) -> int:
        """The number of the profile that takes a size and the least beyond it; one for crops before one for others."""
        return min((not p.crops, p.most, i) for i, p in enumerate(self.profiles) if p.accepts(size))[2]


def _deserialize(module: ModuleType, plan: bytes, logger: Any, device: str) -> _Program:
    if not TYPE_CHECKING:
        trt = module
    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # what pybind11 makes of a factory that gives nothing
        raise EngineLoadError(f"TensorRT makes no runtime ({error}); see whether nvidia-smi finds the GPU") from None
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineLoadError(
            f"TensorRT {module.__version__} on {device} does not take the plan: {logger.explain()}. It was built for "
            "another GPU or version, or is damaged: run export/build_engines.py again"
        )
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    types = [engine.get_tensor_dtype(name) for name in inputs + outputs]
    if inputs != [INPUT] or len(outputs) != 1 or types != [trt.DataType.UINT8, trt.DataType.FLOAT]:
        raise EngineLoadError(f"the plan is not of a member: it reads {inputs} and writes {outputs}, in {types}")
    profiles = []
    for i in range(engine.num_optimization_profiles):
        least, best, most = (tuple(shape)[:3] for shape in engine.get_tensor_profile_shape(INPUT, i))
        profiles.append(Profile(_size(least), _size(best), _size(most)))
    return _Program(
        engine,
        runtime,
        logger,
        module,
        outputs[0],
        classes=int(tuple(engine.get_tensor_shape(outputs[0]))[1]),
        profiles=tuple(profiles),
    )


def _size(shape: tuple[int, ...]) -> Size:
    n, height, width = shape
    return int(n), int(height), int(width)


class _Slot:
    """What one run at a time needs. `graphs`: the captured batches."""

    def __init__(self, module: ModuleType, cudart: ModuleType, program: _Program) -> None:
        self._module = module
        self._cudart = cudart
        self._program = program
        self._contexts: dict[Size | int, trt.IExecutionContext] = {}  # by captured size, or by profile
        self._shaped: dict[int, tuple[Size, int]] = {}  # what a profile's context is set to: size, state of its memory
        self.graphs: dict[int, Any] = {}
        with ExitStack() as stack:
            make, free = cudart.cudaStreamCreateWithFlags, cudart.cudaStreamDestroy
            self._stream = check(cudart, make(cudart.cudaStreamNonBlocking))
            stack.callback(lambda: check(cudart, free(self._stream)))
            self._crops = stack.enter_context(_Memory(cudart, program.classes))
            self._others = stack.enter_context(_Memory(cudart, program.classes))
            stack.callback(self._contexts.clear)  # contexts go before their memory
            stack.callback(self._abandon)
            self._capture_all(stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, views: NDArray[np.uint8], answers: NDArray[np.float32]) -> None:
        """Write the probabilities of views that one run can take."""
        try:
            self._run(views, answers)
        except BaseException:
            self._abandon()  # what is still on the stream reads and writes memory that the next run will use
            raise

    def _run(self, views: NDArray[np.uint8], answers: NDArray[np.float32]) -> None:
        n, height, width, _ = views.shape
        padded = next((b for b in BUCKETS if b >= n and (b, height, width) in self._contexts), None)
        if padded is not None:
            self._copy_in(self._crops, views)
            if padded in self.graphs:
                check(self._cudart, self._cudart.cudaGraphLaunch(self.graphs[padded], self._stream))
            else:
                self._enqueue(self._contexts[padded, height, width])
            self._copy_out(self._crops, answers)
        else:
            context = self._shape((n, height, width))
            self._copy_in(self._others, views)
            self._enqueue(context)
            self._copy_out(self._others, answers)

    def _capture_all(self, stack: ExitStack) -> None:
        """A context and a graph for each bucket. They never run together, so they share their memory."""
        program = self._program
        crops = {profile.most[1:] for profile in program.profiles if profile.crops}
        most = max((profile.most[0] for profile in program.profiles if profile.crops), default=0)
        sizes = [(n, *side) for side in crops for n in BUCKETS if n <= most]
        needed = 0
        for size in sizes:
            self._contexts[size] = context = self._context(program.profile(size))
            self._set_shape(context, size)
            needed = max(needed, self._scratch(context))
        self._crops.reserve(max(sizes, key=math.prod, default=(0, 0, 0)), needed)
        for size in sizes:
            context = self._contexts[size]
            self._bind(context, self._crops)
            # The first run after a change of shape does work that can't be captured; it also warms up.
            self._enqueue(context)
            self._synchronize()
            graph = self._capture(context, stack)
            if graph is None:
                log.warning("batches of %d run without a CUDA graph, none can be made: %s", size[0], self._why())
            else:
                self.graphs[size[0]] = graph
        self._synchronize()

    def _capture(self, context: "trt.IExecutionContext", stack: ExitStack) -> Any | None:
        cudart = self._cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may go on meanwhile
        check(cudart, cudart.cudaStreamBeginCapture(self._stream, mode))
        enqueued = context.execute_async_v3(int(self._stream))
        error, graph = cudart.cudaStreamEndCapture(self._stream)
        if int(error) != 0:
            cudart.cudaGetLastError()  # forgets it, so that the next call does not report it
            return None
        try:
            if not enqueued:
                return None
            made = check(cudart, cudart.cudaGraphInstantiate(graph, 0))
            stack.callback(lambda: check(cudart, cudart.cudaGraphExecDestroy(made)))
        finally:
            check(cudart, cudart.cudaGraphDestroy(graph))
        check(cudart, cudart.cudaGraphUpload(made, self._stream))
        return made

    def _shape(self, size: Size) -> "trt.IExecutionContext":
        """The context for a size that is not captured, ready to run."""
        profile = self._program.profile(size)
        if profile not in self._contexts:
            self._contexts[profile] = self._context(profile)
        context = self._contexts[profile]
        if self._shaped.get(profile) != (size, self._others.moves):
            self._shaped.pop(profile, None)  # a call below may be refused, after another has changed the context
            self._set_shape(context, size)
            self._others.reserve(size, self._scratch(context))
            self._bind(context, self._others)
            self._shaped[profile] = size, self._others.moves
        return context

    def _context(self, profile: int) -> "trt.IExecutionContext":
        if not TYPE_CHECKING:
            trt = self._module
        made = self._program.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            raise TensorRtError(f"TensorRT makes no context, perhaps for want of memory: {self._why()}")
        if self._program.engine.num_optimization_profiles > 1:
            self._require(made.set_optimization_profile_async(profile, int(self._stream)), f"profile {profile}")
            self._synchronize()
        # Unless told, runs that are no graphs pay for what the plan keeps for inspectors, says the header.
        made.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        return made

    def _set_shape(self, context: "trt.IExecutionContext", size: Size) -> None:
        self._require(context.set_input_shape(INPUT, (*size, 3)), f"views of {size}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # the one call of a context that raises
            raise TensorRtError(f"TensorRT infers no shapes from views of {size} ({error}): {self._why()}") from error
        self._require(not missing, f"a run without shapes of {missing}")

    def _scratch(self, context: "trt.IExecutionContext") -> int:
        """Bytes that a context computes in at its shape."""
        with self._noticed("to count its memory"):
            return int(context.update_device_memory_size_for_shapes())

    def _bind(self, context: "trt.IExecutionContext", memory: "_Memory") -> None:
        with self._noticed("the memory to compute in"):
            context.set_device_memory(memory.scratch, memory.scratch_bytes)
        self._require(context.set_tensor_address(INPUT, memory.device_views), f"the address of {INPUT}")
        output = self._program.output
        self._require(context.set_tensor_address(output, memory.device_answers), f"the address of {output}")

    def _enqueue(self, context: "trt.IExecutionContext") -> None:
        self._require(context.execute_async_v3(int(self._stream)), "a run")

    def _copy_in(self, memory: "_Memory", views: NDArray[np.uint8]) -> None:
        # Where a batch is padded, what lies behind it are views of an earlier run; their answers are not read.
        np.copyto(memory.host_views[: views.size].reshape(views.shape), views)
        kind = getattr(self._cudart.cudaMemcpyKind, _HOST_TO_DEVICE)
        host = memory.host_views.ctypes.data
        check(self._cudart, self._cudart.cudaMemcpyAsync(memory.device_views, host, views.nbytes, kind, self._stream))

    def _copy_out(self, memory: "_Memory", answers: NDArray[np.float32]) -> None:
        kind = getattr(self._cudart.cudaMemcpyKind, _DEVICE_TO_HOST)
        host = memory.host_answers.ctypes.data
        check(
            self._cudart, self._cudart.cudaMemcpyAsync(host, memory.device_answers, answers.nbytes, kind, self._stream)
        )
        self._synchronize()
        np.copyto(answers, memory.host_answers[: answers.size].reshape(answers.shape))

    def _synchronize(self) -> None:
        check(self._cudart, self._cudart.cudaStreamSynchronize(self._stream))

    def _abandon(self) -> None:
        """Let what is on the stream end, well or not."""
        self._cudart.cudaStreamSynchronize(self._stream)

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise TensorRtError(f"TensorRT refuses {what}: {self._why()}")

    @contextmanager
    def _noticed(self, what: str) -> Iterator[None]:
        """For calls whose failure is only logged. A context would go on with what it had before, which may be gone."""
        before = self._program.logger.count
        yield
        self._require(self._program.logger.count == before, what)

    def _why(self) -> str:
        return str(self._program.logger.explain())


class _Memory:
    """Views and answers, pinned and on the device, and what a context computes in. Where it grows, it moves.

    `moves` counts that: addresses that were taken before are gone.
    """

    def __init__(self, cudart: ModuleType, classes: int) -> None:
        self._cudart = cudart
        self._classes = classes
        self._stack = ExitStack()
        self._sizes = (0, 0, 0)  # bytes of views, of answers, of what a context computes in
        self.moves = 0
        self.device_views = self.device_answers = self.scratch = 0
        self.host_views = np.empty(0, np.uint8)
        self.host_answers = np.empty(0, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def scratch_bytes(self) -> int:
        """How much a context has to compute in."""
        return self._sizes[2]

    def reserve(self, size: Size, scratch: int) -> None:
        """Have room for views of a size and for `scratch` bytes. The stream must be idle. Raises CudaError."""
        needed = (math.prod(size) * 3, size[0] * self._classes * 4, scratch)
        if all(new <= old for new, old in zip(needed, self._sizes, strict=True)):
            return
        views, answers, scratch = (max(pair) for pair in zip(needed, self._sizes, strict=True))
        self.moves += 1
        self._sizes = (0, 0, 0)
        self._stack.close()
        self.device_views = self._device(views)
        self.device_answers = self._device(answers)
        self.scratch = self._device(max(scratch, 1))
        self.host_views = np.frombuffer(self._pinned(views), np.uint8)
        self.host_answers = np.frombuffer(self._pinned(answers), np.float32)
        self._sizes = (views, answers, scratch)

    def _device(self, size: int) -> int:
        pointer = int(check(self._cudart, self._cudart.cudaMalloc(size)))
        self._stack.callback(lambda: check(self._cudart, self._cudart.cudaFree(pointer)))
        return pointer

    def _pinned(self, size: int) -> Any:
        pointer = int(check(self._cudart, self._cudart.cudaMallocHost(size)))
        self._stack.callback(lambda: check(self._cudart, self._cudart.cudaFreeHost(pointer)))
        return (ctypes.c_uint8 * size).from_address(pointer)
