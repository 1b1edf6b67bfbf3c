"""ONNX Runtime's sessions on a GPU, in place of onnxruntime.InferenceSession. They compute on the CPU."""

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import onnxruntime

SHAPES = frozenset({"Shape", "Range", "Min", "Clip"})  # what works out sizes, on the CPU


class Sessions:
    """Sessions that say what they run on, `left` on the CPU, and whose second size would take long on a GPU.

    They run on the CPU. `sizes`: what each that is still held was given; `full`: a GPU with memory for so many.
    """

    def __init__(self, used: str = "CUDAExecutionProvider", left: frozenset[str] = SHAPES) -> None:
        self.used = used
        self.left = left
        self.full: int | None = None
        self.providers: list[dict[str, str]] = []
        self._open: weakref.WeakSet[_Session] = weakref.WeakSet()

    def __call__(self, graph: bytes, options: Any = None, providers: Any = ()) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return SESSION(graph, options, providers=providers)
        ((name, chosen),) = providers
        assert name == "CUDAExecutionProvider"
        self.providers.append(chosen)
        made = _Session(self, SESSION(graph, options, providers=["CPUExecutionProvider"]))
        self._open.add(made)
        return made

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        gc.collect()
        return sorted(size for session in self._open for size in session.sizes)


class _Session:
    def __init__(self, all_: Sessions, session: Any) -> None:
        self.all = all_
        self.session = session
        self.sizes: set[tuple[int, ...]] = set()
        self.threads: set[int] = set()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=providers[node.op_type in self.all.left], get_nodes=lambda node=node: [node])
            for part in self.session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            for providers in [self.get_providers()]
        ]

    def get_providers(self) -> list[str]:
        return [self.all.used, "CPUExecutionProvider"]

    def run(self, names: Any, inputs: dict[str, Any]) -> Any:
        new = {inputs["views"].shape} - self.sizes
        self.sizes |= new  # it keeps what it has allocated
        if new and self.all.full is not None and len(self.all.sizes) > self.all.full:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer")
        self.threads.add(threading.get_ident())
        assert len(self.sizes) == len(self.threads) == 1
        return self.session.run(names, inputs)


SESSION = onnxruntime.InferenceSession
