"""ONNX Runtime on the CPU: FP32 and INT8.

One run uses one thread, and several runs go side by side, one a core. On two Zen 5 cores that gave 98.7 images/s, and
one run at a time with two threads 42.4 (ResNet-20 and 32, 10 views each; ONNX Runtime 1.32.0; medians of 7 rounds).
A run that has the cores to itself may use them all, with the same answer to the last bit; how much sooner it comes,
OnnxRuntimeEngine says.
"""

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from resnet_ensemble.export import host
from resnet_ensemble.export.engines import (
    Engine,
    EngineBuildError,
    EngineInfo,
    EngineLoadError,
    EngineRunError,
    Form,
    Precision,
)
from resnet_ensemble.training.views import Preprocessing

_QUIET = 3  # errors only: level 2 warns that a stored graph suits only this kind of CPU, which its fingerprint knows


class OnnxRuntimeEngine:
    """A session on the CPU. Raises EngineLoadError.

    A run with several threads keeps each to a CPU of its own, the caller's to the first: Linux may wake the second
    where the first waits for it, spinning, and look again after 4 ms. Lone views with two threads, in ms, median and
    95th percentile, and in brackets without that: ResNet-20 0.92, 1.4 (1.16, 1.5), ResNet-32 1.42, 2.2 (1.86, 6.2),
    ResNet-44 1.92, 2.8 (2.50, 10.4), ResNet-56 2.65, 4.0 (3.03, 7.6), one thread 1.15, 1.86, 2.55 and 3.35; a ResNet-18
    and 50, 20.1 and 45.4, as before (two Zen 4 cores, Linux 6.18, n = 400 and 80, 2026-11-27).
    """

    def __init__(self, graph: bytes, precision: Precision, threads: int) -> None:
        # The graph comes from `compile`, already optimised.
        options = _options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
        options.intra_op_num_threads = threads
        self._cpu: int | None = None
        if threads > 1:
            # Threads may spin while a run lasts, which saves it 5 %, but not afterwards: the cores are for others.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            # Work is shared out in pieces that become smaller: where one core is held up, the other takes more. The
            # answer stays the same to the last bit.
            options.add_session_config_entry("session.dynamic_block_base", "4")
            if len(cpus := host.keepable()) >= threads:
                self._cpu, *others = cpus[:threads]
                options.add_session_config_entry("session.intra_op_thread_affinities", _affinities(others))
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises classes of its own, without a common one
            raise EngineLoadError(f"ONNX Runtime {version()} does not take the engine: {error}") from None
        self.info = EngineInfo("onnxruntime", version(), precision, "cpu", threads)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). Raises EngineRunError."""
        with nullcontext() if self._cpu is None else host.on_cpu(self._cpu):
            return run(self._session, views)

    def close(self) -> None:
        """Drop the session."""
        del self._session


def run(session: onnxruntime.InferenceSession, views: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a session answers. Raises EngineRunError."""
    try:
        return cast("NDArray[np.float32]", session.run(None, {"views": views})[0])
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common one
        raise EngineRunError(f"ONNX Runtime {version()} failed: {error}") from error


def version() -> str:
    """The installed version."""
    return onnxruntime.__version__  # type: ignore[no-any-return]


def precisions() -> tuple[Precision, ...]:
    """It has no convolution in BF16."""
    return ("fp32", "int8")


def int8_form() -> Form:
    """A convolution is computed in integers only if its output is quantized, too."""
    return "integer"


def identity(seen: Preprocessing) -> str:  # noqa: ARG001  # it takes views of any size
    """The CPU: stored graphs have its layouts."""
    return host.cpu()


def compile(graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:  # noqa: A001, ARG001  # any size, any type
    """Fuse operators and lay weights out for this CPU, once, so that servers start sooner.

    Raises EngineBuildError, OSError.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "optimised.onnx")
        options = _options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        options.optimized_model_filepath = str(file)
        try:
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises classes of its own, without a common one
            if isinstance(error, InvalidProtobuf) and file.exists():  # the graph was read
                raise OSError(f"ONNX Runtime can't write {file} ({error}): is the disk full?") from None
            raise EngineBuildError(f"ONNX Runtime {version()} can't compile the graph: {error}") from None
        return file.read_bytes()


def is_lost() -> bool:
    """A CPU is not lost."""
    return False


def load(compiled: bytes, precision: Precision, threads: int = 1) -> Engine:
    """An engine from what `compile` made."""
    return OnnxRuntimeEngine(compiled, precision, threads)


def _affinities(cpus: Sequence[int]) -> str:
    """A CPU for each thread besides the caller's, counted from 1."""
    return ";".join(str(cpu + 1) for cpu in cpus)


def _options(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    return options
