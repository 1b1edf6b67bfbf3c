"""The NVIDIA GPU of this host. Asked before anything touches TensorRT, whose objects crash where there is no driver.

`cudart` is `cuda.bindings.runtime`, passed in so that tests can pass another. Each of its functions returns a tuple: an
error, then what it made. Only the first GPU is used; CUDA_VISIBLE_DEVICES says which one that is.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from resnet_ensemble.export.engines import BackendUnavailable, EngineRunError

DRIVER_FILE = Path("/sys/module/nvidia/version")


class CudaError(EngineRunError):
    """A call of the CUDA runtime failed; the message has its name and what CUDA says."""


@dataclass(frozen=True)
class Gpu:
    """A device: its name, compute capability, bytes of memory; the driver's version."""

    name: str
    compute: str
    memory: int
    driver: str

    @property
    def identity(self) -> str:
        """What an engine depends on."""
        return f"{self.name}, compute {self.compute}, driver {self.driver}"


def check(cudart: ModuleType, result: tuple[Any, ...]) -> Any:
    """What a call made, without its error. Raises CudaError."""
    error, *made = result
    if int(error) != 0:
        raise CudaError(_explain(cudart, error))
    return made[0] if made else None


def probe(cudart: ModuleType) -> Gpu:
    """The first GPU. Raises BackendUnavailable."""
    error, count = cudart.cudaGetDeviceCount()
    if int(error) != 0:
        raise BackendUnavailable(
            f"CUDA can't use a GPU here ({_explain(cudart, error)}); install NVIDIA's driver, r580 or newer, and in a "
            "container pass the GPU on (docker run --gpus all)"
        )
    if not count:
        raise BackendUnavailable("there is a driver but no GPU to be seen; CUDA_VISIBLE_DEVICES may hide it")
    try:
        properties = check(cudart, cudart.cudaGetDeviceProperties(0))
        level = check(cudart, cudart.cudaDriverGetVersion())  # 13000: CUDA 13.0
    except CudaError as error:
        raise BackendUnavailable(f"the GPU does not answer ({error}); see nvidia-smi") from None
    return Gpu(
        name=properties.name.decode().rstrip("\0"),
        compute=f"{properties.major}.{properties.minor}",
        memory=int(properties.totalGlobalMem),
        driver=DRIVER_FILE.read_text().strip() if DRIVER_FILE.is_file() else f"of CUDA {level}",
    )


def is_lost(cudart: ModuleType) -> bool:
    """Whether this process can't use the GPU any more: most of CUDA's errors come back until it ends."""
    return int(cudart.cudaDeviceSynchronize()[0]) != 0


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded, whatever comes of it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _explain(cudart: ModuleType, error: Any) -> str:
    name, text = cudart.cudaGetErrorName(error)[1], cudart.cudaGetErrorString(error)[1]
    return f"{name.decode()}: {text.decode()}"
