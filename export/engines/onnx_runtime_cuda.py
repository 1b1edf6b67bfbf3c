"""ONNX Runtime on an NVIDIA GPU: FP32 and FP16. Not yet run on a GPU.

ONNX Runtime lists a provider that was compiled in, works or not, and where CUDA fails it goes on with the CPU and says
so only in its log. So the GPU is asked first, and a session is refused if a layer of the network runs on anything else.
"""

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from resnet_ensemble.export.engines import (
    BackendUnavailable,
    Engine,
    EngineInfo,
    EngineLoadError,
    Form,
    Precision,
    onnx_runtime,
)
from resnet_ensemble.export.engines.gpu import Gpu, probe
from resnet_ensemble.training.views import Preprocessing

PROVIDER = "CUDAExecutionProvider"
_QUIET = 3  # errors only
# What must run on the GPU. The arithmetic on the sizes of whole views, a few numbers, is left to the CPU, where ONNX
# Runtime puts it on purpose: `session.disable_cpu_ep_fallback` would refuse every network that has it.
_LAYERS = frozenset({"Conv", "Relu", "MaxPool", "Gemm", "MatMul", "Softmax"})


class OnnxRuntimeCudaEngine:
    """A session on the first GPU. Raises EngineLoadError if a layer would run on the CPU."""

    def __init__(self, graph: bytes, precision: Precision) -> None:
        gpu = _gpu()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # FP32 is to be FP32, not TF32.
        provider = (PROVIDER, {"device_id": "0", "use_tf32": "0"})
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises classes of its own, without a common one
            raise EngineLoadError(f"ONNX Runtime {version()} can't run on {gpu.name}: {error}") from None
        used = self._session.get_providers()
        if used[:1] != [PROVIDER]:
            raise EngineLoadError(
                f"ONNX Runtime {version()} took {used} instead of {PROVIDER} on {gpu.name}; its log says why: usually "
                "CUDA or cuDNN is missing or of another version (pip install 'resnet-ensemble[gpu]')"
            )
        if elsewhere := _elsewhere(self._session):
            raise EngineLoadError(
                f"ONNX Runtime {version()} runs {', '.join(sorted(elsewhere))} on the CPU, not on {gpu.name}"
            )
        self.info = EngineInfo("onnxruntime-cuda", version(), precision, gpu.name, threads=1)

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). Raises EngineRunError."""
        return onnx_runtime.run(self._session, views)

    def close(self) -> None:
        """Drop the session."""
        del self._session


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
    """GPU and driver."""
    return _gpu().identity


def compile(graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:  # noqa: A001, ARG001
    """The graph in the types that it is to be computed in; a session optimises it in less than a second."""
    if precision == "fp32":
        return graph
    from resnet_ensemble.export.precisions import lowered  # noqa: PLC0415  # ONNX, which serving does without

    return lowered(graph, "fp16")


def load(compiled: bytes, precision: Precision, threads: int = 1) -> Engine:  # noqa: ARG001  # the GPU computes
    """An engine from what `compile` made."""
    onnxruntime.preload_dlls()  # CUDA's and cuDNN's, from their packages
    return OnnxRuntimeCudaEngine(compiled, precision)


def _gpu() -> Gpu:
    return probe(cudart)
