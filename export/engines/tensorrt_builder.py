"""An ONNX graph → a TensorRT plan.

Written against a module that is passed in: `tensorrt` on a host with a GPU; in tests `tensorrt_rtx`, which has the same
interface, and whose compiler needs neither a GPU nor a driver. mypy checks every call against the bindings of
TensorRT 11 (`make types-tensorrt`).

TensorRT reports failures as return values, or not at all; here each is an EngineBuildError.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from resnet_ensemble.export.engines import EngineBuildError, Precision
from resnet_ensemble.export.engines.tensorrt_profiles import Profile

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

INPUT = "views"
# The type in which convolutions are computed; and the first one, which reads the picture, and the linear layer.
INNER = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8"}
REST = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "HALF", "fp8": "HALF"}
LEVEL = 3  # of optimisation, 0 to 5: TensorRT's own; 5 tries more kernels and takes much longer


class GraphRefused(EngineBuildError):
    """The parser can't read the graph."""


class ProfileRefused(EngineBuildError):
    """A profile does not fit the graph, or contradicts itself."""


class BuildFailed(EngineBuildError):
    """The compiler found no plan."""


class WrongPrecision(EngineBuildError):
    """A layer is computed in another type than was asked for."""


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and the type in which each convolution and linear layer is computed, in their order."""

    content: bytes
    layers: dict[str, str]


class Timings:
    """Times of kernels that were tried, kept from one build to the next: members share most of their layers."""

    def __init__(self) -> None:
        self.content = b""


_loggers: dict[type, Any] = {}


def logger_of(module: ModuleType) -> Any:
    """The logger of all builders and runtimes, without the errors of earlier ones. Never freed.

    TensorRT keeps the logger of the first object that there is for all that come while it lives: with a logger for each
    object, the errors of one would be told to another, or to one that is gone.
    """
    kind = module.ILogger
    if kind not in _loggers:
        _loggers[kind] = _make_logger(module)
    _loggers[kind].errors.clear()
    return _loggers[kind]


def _make_logger(module: ModuleType) -> Any:
    """A TensorRT logger that keeps the last things that went wrong in `errors`, and counts all."""
    if not TYPE_CHECKING:
        trt = module

    class Logger(trt.ILogger):  # type: ignore[misc]  # Any, without the stubs
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it by name
            self.errors: deque[str] = deque(maxlen=3)
            self.count = 0
            self._warned: set[str] = set()

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)
                self.count += 1
                log.debug("TensorRT: %s", msg)  # what raises, tells
            elif severity == trt.ILogger.Severity.WARNING and msg not in self._warned:
                self._warned.add(msg)  # one a layer would be too many
                log.info("TensorRT: %s", msg)

        def explain(self) -> str:
            """The last errors, or that there is none."""
            return "; ".join(" ".join(error.split()) for error in list(self.errors)) or "it does not say why"

    return Logger()


def build(
    module: ModuleType,
    graph: bytes,
    profiles: Sequence[Profile],
    *,
    timings: Timings,
    level: int = LEVEL,
    workspace: int | None = None,
) -> Plan:
    """Compile a graph for this host's GPU. Raises EngineBuildError.

    - graph: in the types that it is to be computed in; its weights inside
    - workspace: bytes that a kernel may use beside its tensors; None: all that the GPU has
    """
    if not TYPE_CHECKING:
        trt = module
    logger = logger_of(module)
    builder = _builder(module, logger)
    network = builder.create_network(0)  # of explicit batch and strongly typed, as all are in TensorRT 11
    # The parser keeps neither the network nor the logger alive: without the variables this is a crash.
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise GraphRefused(f"TensorRT can't read the graph: {_parser_errors(parser) or logger.explain()}")
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != [INPUT]:  # a profile of another name would be accepted
        raise ProfileRefused(
            f"the graph's inputs are {', '.join(inputs)}, the profiles are of {INPUT}; export the network again"
        )
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that an inspector can tell each layer's type
    config.clear_flag(trt.BuilderFlag.TF32)  # FP32 is to be FP32; who wants more speed has FP16
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    for profile in profiles:
        _add_profile(builder, config, profile, logger)
    cache = config.create_timing_cache(timings.content)  # a variable: it must outlive the build
    if not config.set_timing_cache(cache, False):
        raise BuildFailed(f"TensorRT refuses the timings of its last build: {logger.explain()}")
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise BuildFailed(f"TensorRT found no plan: {logger.explain()}")
    timings.content = bytes(config.get_timing_cache().serialize())
    return Plan(bytes(content), _layer_types(module, network))


def _builder(module: ModuleType, logger: Any) -> "trt.Builder":
    if not TYPE_CHECKING:
        trt = module
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what pybind11 makes of a factory that gives nothing
        raise BuildFailed(f"TensorRT makes no builder ({error}); see whether nvidia-smi finds driver and GPU") from None


def check_types(layers: dict[str, str], precision: Precision) -> None:
    """Raise WrongPrecision where a layer is not computed in what the precision stands for."""
    names = list(layers)
    wanted = dict.fromkeys(names, INNER[precision])
    wanted |= dict.fromkeys((names[0], names[-1]), REST[precision])
    wrong = [f"{name} in {layers[name]} instead of {wanted[name]}" for name in names if layers[name] != wanted[name]]
    if wrong:
        raise WrongPrecision(
            f"{len(wrong)} of {len(names)} layers are computed in another type: {'; '.join(wrong[:3])}"
        )


def _parser_errors(parser: "trt.OnnxParser") -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = []
    for error in errors:
        where = f"{error.node_operator()} {error.node_name()}: " if error.node_name() else ""
        found.append(where + " ".join(error.desc().split()))
    return "; ".join(found)


def _add_profile(builder: "trt.Builder", config: "trt.IBuilderConfig", profile: Profile, logger: Any) -> None:
    made = builder.create_optimization_profile()
    least, best, most = ((*size, 3) for size in (profile.least, profile.best, profile.most))
    try:
        made.set_shape(INPUT, least, best, most)
        accepted = config.add_optimization_profile(made) >= 0
    except RuntimeError as error:  # some contradictions are raised already by set_shape
        logger.errors.append(str(error))
        accepted = False
    if not accepted:
        raise ProfileRefused(f"views from {least} to {most}, best {best}, are no profile: {logger.explain()}")


def _layer_types(module: ModuleType, network: "trt.INetworkDefinition") -> dict[str, str]:
    """By name, what each convolution and linear layer reads: its activations' type, behind a dequantization."""
    if not TYPE_CHECKING:
        trt = module
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def read_by(layer: "trt.ILayer", index: int) -> str:
        tensor = layer.get_input(index)
        maker = makers.get(tensor.name)
        if maker is not None and maker.type == trt.LayerType.DEQUANTIZE:
            tensor = maker.get_input(0)
        return str(tensor.dtype.name)

    found = {}
    for layer in layers:
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            types = {read_by(layer, i) for i in range(min(layer.num_inputs, 2))}  # activations, weights
            found[layer.name] = " and ".join(sorted(types))
    return found
