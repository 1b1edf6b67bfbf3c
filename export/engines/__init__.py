"""Engines: a bundle's member compiled for a backend and this host. One file a backend, imported only when used."""

import importlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is. `threads`: CPU threads of one run."""

    backend: str
    version: str
    precision: str
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
        """The installed version. Raises BackendUnavailable."""

    def compile(self, graph: bytes) -> bytes:
        """An ONNX graph optimised for this host, to be stored and loaded again."""

    def load(self, compiled: bytes) -> Engine:
        """An engine from what `compile` made."""


# Every backend that can run a bundle's graphs. The fake one, which has no weights, is asked for by name.
BACKENDS = ("onnxruntime",)
_MODULES = {"onnxruntime": "onnx_runtime"}
_REMEDY = {"onnxruntime": "pip install 'resnet-ensemble[cpu]'"}


class BackendUnavailable(Exception):
    """The backend's package is not installed or does not work on this host; the message says what to install."""


def backend(name: str) -> Backend:
    """Import a backend. Raises BackendUnavailable."""
    try:
        module: Backend = importlib.import_module(f"resnet_ensemble.export.engines.{_MODULES[name]}")
    except ImportError as error:
        raise BackendUnavailable(f"the backend {name} is not installed ({error}); {_REMEDY[name]}") from None
    return module
