"""Engines: a bundle's member compiled for a backend, a precision and this host.

One file a backend, imported only when used.
"""

import importlib
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.training.views import Preprocessing

# Both would send what they see to their makers, whoever serves with them. ONNX Runtime 1.32 heeds nothing else, and
# OpenVINO 2026.4 has a stub for where its package is missing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
# Made with what was found on pictures (export/quantize.py).
CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")
Device = Literal["auto", "cpu", "cuda"]
# Batches of crops that the engines of GPUs are ready for: others are padded up to the next, or split where they are
# larger. An image has 1, 2 or 10 crops, so that whole images fill these.
BUCKETS = (1, 2, 5, 10, 20, 40)
WHOLE_VIEWS = 4  # of one size in one run, at most, on GPUs
# Where activations are quantized in an INT8 graph (export/quantize.py).
#   inputs    the inputs of convolutions; residual sums stay in FP32
#   trunk     every activation that a convolution reads, for all that read it, so that residual sums read bytes too
#   integer   the trunk and both sides of each residual sum: what ONNX Runtime needs to compute sums of bytes
#   symmetric as `trunk`, with a zero point of 0 also for activations: what TensorRT needs
Form = Literal["inputs", "trunk", "integer", "symmetric"]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is. `threads`: CPU threads of one run."""

    backend: str
    version: str
    precision: Precision
    device: str
    threads: int


class Engine(Protocol):
    """One member, ready to run."""

    @property
    def info(self) -> EngineInfo:
        """Backend, version, precision, device."""

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) of views (n, h, w, 3). May be called from several threads at once."""

    def close(self) -> None:
        """Free what the engine holds; it is not used afterwards."""


class Backend(Protocol):
    """What each file in this folder offers, as module functions."""

    def version(self) -> str:
        """The installed version."""

    def precisions(self) -> tuple[Precision, ...]:
        """What it computes in on this host. Raises BackendUnavailable where it can't run."""

    def identity(self, seen: Preprocessing) -> str:
        """What an engine depends on beside its graph: this host's device, sizes of views. Raises BackendUnavailable."""

    def int8_form(self) -> Form:
        """Where it wants activations quantized."""

    def compile(self, graph: bytes, precision: Precision, seen: Preprocessing) -> bytes:
        """An ONNX graph optimised for this host and for views of a member, to be stored and loaded again.

        For int8 and fp8, a quantized graph. Raises EngineBuildError, BackendUnavailable.
        """

    def is_lost(self) -> bool:
        """Whether this process can't use the device any more, as after most of CUDA's errors."""

    def load(self, compiled: bytes, precision: Precision, threads: int = 1) -> Engine:
        """An engine from what `compile` made. Raises EngineLoadError, BackendUnavailable.

        `threads`: of the CPU, for each run.
        """


# Every backend that can run a bundle's graphs, by the device that it runs on. The fake one, which has no weights, is
# asked for by name.
ON = {"cpu": ("onnxruntime", "openvino"), "cuda": ("onnxruntime-cuda", "tensorrt")}
BACKENDS = (*ON["cpu"], *ON["cuda"])
# What others are compared with, and what runs a bundle where nothing was built and ONNX Runtime can't use a GPU.
DEFAULT = "onnxruntime"
# The file of each backend, and others that it compiles with.
_MODULES = {
    "onnxruntime": ("onnx_runtime",),
    "openvino": ("openvino_cpu",),
    "onnxruntime-cuda": ("onnx_runtime_cuda",),
    "tensorrt": ("tensorrt_gpu", "tensorrt_builder", "tensorrt_profiles"),
}
_REMEDY = {
    "onnxruntime": "pip install 'resnet-ensemble[cpu]'",
    "openvino": "pip install 'resnet-ensemble[openvino]'",
    "onnxruntime-cuda": "pip install 'resnet-ensemble[gpu]', without [cpu]",
    "tensorrt": "pip install 'resnet-ensemble[tensorrt]'",
}


class BackendUnavailable(Exception):
    """The backend's package is not installed or does not work on this host; the message says what to install."""


class NotInstalled(BackendUnavailable):
    """The backend's package is missing or can't be imported; the message says what to install."""


class EngineBuildError(Exception):
    """A graph can't be compiled; the message says what the compiler said."""


class EngineLoadError(BackendUnavailable):
    """A compiled engine does not run on this host; the message says why and what to do."""


class DeviceLost(BackendUnavailable):
    """Not to be used any more by this process; another one can."""


class EngineRunError(RuntimeError):
    """An engine failed while it ran or was made ready; the message says what the library said."""


def backend(name: str) -> Backend:
    """Import a backend. Raises NotInstalled."""
    try:
        module: Backend = importlib.import_module(f"resnet_ensemble.export.engines.{_MODULES[name][0]}")
    except ImportError as error:
        raise not_installed(name, error) from None
    return module


def check_not_lost(backend: Backend, engine: str, error: Exception) -> None:
    """Raise DeviceLost if the failure of an engine has lost the device: all others would fail, too."""
    if backend.is_lost():
        raise DeviceLost(
            f"this process lost its GPU over {engine} ({error}). What was built before is kept: run this again, and "
            "leave that one out (--precision, --only)"
        ) from error


def sources(name: str) -> tuple[Path, ...]:
    """The files that a backend compiles with."""
    return tuple(Path(__file__).with_name(f"{module}.py") for module in _MODULES[name])


def not_installed(name: str, error: ImportError) -> NotInstalled:
    """What to do about a backend whose package is missing."""
    return NotInstalled(f"the backend {name} is not installed ({error}); {_REMEDY[name]}")


def available(device: Device = "auto") -> list[tuple[str, Precision]]:
    """Every backend and precision of this host. Raises BackendUnavailable if a device that was asked for has none."""
    found: list[tuple[str, Precision]] = []
    for name in BACKENDS if device == "auto" else ON[device]:
        with suppress(BackendUnavailable):  # an extra that is not installed is no fault
            found += [(name, precision) for precision in backend(name).precisions()]
    if device != "auto" and not found:
        raise BackendUnavailable(f"nothing runs on {device} here. {'. '.join(unavailable(device))}")
    return found


def runs(name: str, precision: Precision) -> bool:
    """Whether a backend is here and computes in a precision."""
    try:
        return name in _MODULES and precision in backend(name).precisions()
    except BackendUnavailable:
        return False


def unavailable(device: Device) -> list[str]:
    """Why backends of a device do not run here."""
    reasons = []
    for name in ON[device]:
        try:
            backend(name).precisions()
        except BackendUnavailable as why:
            reasons.append(f"{name}: {why}")
    return reasons
