"""OpenVINO on the CPU: FP32, BF16 where the CPU computes in it, and INT8.

One run uses one core, and as many go side by side as there are cores, like ONNX Runtime's here.
"""

import threading
from io import BytesIO

import numpy as np
import openvino
from numpy.typing import NDArray

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

DEVICE = "CPU"
_core = openvino.Core()


class OpenVinoEngine:
    """A compiled model; each thread that runs it has a request of its own."""

    def __init__(self, model: openvino.CompiledModel, precision: Precision, threads: int) -> None:
        self._model = model
        self._local = threading.local()
        self.info = EngineInfo("openvino", version(), precision, "cpu", threads)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). Raises EngineRunError."""
        if not hasattr(self._local, "request"):
            self._local.request = self._model.create_infer_request()
        try:
            answer: NDArray[np.float32] = self._local.request.infer([views], share_inputs=True)[0]
        except RuntimeError as error:
            raise EngineRunError(f"OpenVINO {version()} failed: {error}") from error
        return answer  # OpenVINO copied it out of the request

    def close(self) -> None:
        """Drop the model."""
        del self._model, self._local


def version() -> str:
    """The installed version, without the build's number."""
    return str(openvino.__version__).split("-", maxsplit=1)[0]


def precisions() -> tuple[Precision, ...]:
    """FP32 and INT8; BF16 only where the CPU has instructions for it, since elsewhere it is slower than FP32."""
    return ("fp32", "bf16", "int8") if _has_bf16() else ("fp32", "int8")


def int8_form() -> Form:
    """Residual sums are fused into the convolutions, and read bytes."""
    return "trunk"


def identity(seen: Preprocessing) -> str:  # noqa: ARG001  # it takes views of any size
    """The CPU."""
    return host.cpu()


def compile(graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:  # noqa: A001, ARG001
    """Fuse operators and lay weights out for this CPU. Raises EngineBuildError."""
    try:
        model = _core.compile_model(_core.read_model(graph), DEVICE, _options(precision))
    except RuntimeError as error:
        raise EngineBuildError(f"OpenVINO {version()} can't compile the graph: {error}") from None
    content: bytes = model.export_model().getvalue()
    return content


def is_lost() -> bool:
    """A CPU is not lost."""
    return False


def load(compiled: bytes, precision: Precision, threads: int = 1) -> Engine:
    """An engine from what `compile` made. Raises EngineLoadError."""
    try:
        model = _core.import_model(BytesIO(compiled), DEVICE, _options(precision, threads))
    except RuntimeError as error:
        raise EngineLoadError(f"OpenVINO {version()} does not take the engine: {error}") from None
    return OpenVinoEngine(model, precision, threads)


def _has_bf16() -> bool:
    return "BF16" in _core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def _options(precision: Precision, threads: int = 1) -> dict[str, str | int]:
    # What an INT8 graph leaves in floating point, its first and last layers, is BF16 where the CPU has it: ResNet-18
    # and 50 then ran at 3.6 and 3.5 times ONNX Runtime's FP32 instead of 3.2 and 3.3; a ResNet-18's
    # agreement with FP32 on 1,430 views was 97.8 % instead of 98.0.
    half = precision == "bf16" or (precision == "int8" and _has_bf16())
    cores = host.cores()  # of our cgroup; OpenVINO would take the machine's
    return {
        "INFERENCE_NUM_THREADS": cores,
        "NUM_STREAMS": max(1, cores // threads),
        "ENABLE_CPU_PINNING": "NO",  # other processes have their share of the cores
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
    }
