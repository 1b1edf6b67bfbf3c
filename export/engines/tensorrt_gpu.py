"""TensorRT on an NVIDIA GPU: FP32, FP16, INT8, and where the GPU has them BF16 and FP8. Not yet run on a GPU.

Building takes minutes for each precision of a member. `tensorrt_builder` and `tensorrt_runtime` have what is proved
without a GPU, and how.
"""

import importlib
from types import ModuleType

from cuda.bindings import runtime as cudart

from resnet_ensemble.export.engines import BUCKETS, Engine, Form, Precision, gpu, not_installed, tensorrt_builder
from resnet_ensemble.export.engines.gpu import Gpu, probe
from resnet_ensemble.export.engines.tensorrt_builder import Timings
from resnet_ensemble.export.engines.tensorrt_profiles import profiles
from resnet_ensemble.export.engines.tensorrt_runtime import TensorRtEngine
from resnet_ensemble.training.views import Preprocessing

# The first compute capability with it: NVIDIA's support matrix.
SINCE: dict[Precision, tuple[int, int]] = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "bf16": (8, 0),
    "int8": (7, 5),
    "fp8": (8, 9),
}
_timings = Timings()


def version() -> str:
    """The installed version."""
    return str(_module().__version__)


def precisions() -> tuple[Precision, ...]:
    """What this host's GPU computes in. Raises BackendUnavailable."""
    _module()
    major, minor = map(int, _gpu().compute.split("."))
    return tuple(precision for precision, since in SINCE.items() if (major, minor) >= since)


def int8_form() -> Form:
    """TensorRT has no zero points."""
    return "symmetric"


def identity(seen: Preprocessing) -> str:
    """GPU and driver, and the sizes that a plan is built for."""
    return f"{_gpu().identity}; {profiles(seen)}, {BUCKETS}, level {tensorrt_builder.LEVEL}"


def compile(graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:  # noqa: A001  # the backends' common verb
    """A plan of which every layer is computed in what the precision stands for."""
    from resnet_ensemble.export.precisions import for_tensorrt  # noqa: PLC0415  # ONNX, which serving does without

    plan = tensorrt_builder.build(_module(), for_tensorrt(graph, precision), profiles(seen), timings=_timings)
    tensorrt_builder.check_types(plan.layers, precision)
    return plan.content


def is_lost() -> bool:
    """Whether this process can't use the GPU any more."""
    return gpu.is_lost(cudart)


def load(compiled: bytes, precision: Precision, threads: int = 1) -> Engine:  # noqa: ARG001  # the GPU computes
    """An engine from what `compile` made. A plan is code: only those of a store, whose hashes were compared."""
    return TensorRtEngine(_module(), cudart, compiled, precision)


def _gpu() -> Gpu:
    return probe(cudart)


def _module() -> ModuleType:
    """TensorRT, but only where there is a GPU."""
    _gpu()
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise not_installed("tensorrt", error) from None
