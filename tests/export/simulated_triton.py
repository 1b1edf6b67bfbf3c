"""Enough of Triton to run a model repository: its schema of configs, its ensembles step by step, its gRPC inference."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput

DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}


def configs(repository: Path) -> dict[str, ModelConfig]:
    """Every model's config, read with Triton's schema. Like Triton's, these are the folders; files mean nothing."""
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        for folder in sorted(repository.iterdir())
        if folder.is_dir()
    }


class Triton:
    """Runs the models of a repository as their configs say."""

    def __init__(self, repository: Path) -> None:
        self.configs = configs(repository)
        self.sessions = {
            name: onnxruntime.InferenceSession(repository / name / "1" / "model.onnx")
            for name, config in self.configs.items()
            if config.platform == "onnxruntime_onnx"
        }

    def infer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.configs[model]
        assert set(inputs) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            check(inputs[tensor.name], tensor, config.max_batch_size)
        wanted = [tensor.name for tensor in config.output]
        if model in self.sessions:
            return dict(zip(wanted, self.sessions[model].run(wanted, inputs), strict=True))
        tensors = dict(inputs)
        for step in config.ensemble_scheduling.step:
            found = self.infer(step.model_name, {key: tensors[value] for key, value in step.input_map.items()})
            tensors |= {value: found[key] for key, value in step.output_map.items()}
        return {name: tensors[name] for name in wanted}

    @contextmanager
    def served(self) -> Iterator[str]:
        """The address of a gRPC service, while the context lasts."""
        server = grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(self), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, triton: Triton) -> None:
        self.triton = triton

    def ModelInfer(self, request, context):  # noqa: N802  # gRPC's name
        inputs = {
            tensor.name: np.frombuffer(raw, DTYPES[f"TYPE_{tensor.datatype}"]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, value in self.triton.infer(request.model_name, inputs).items():
            response.outputs.add(name=name, datatype="FP32", shape=value.shape)
            response.raw_output_contents.append(value.tobytes())
        return response


def check(value: np.ndarray, tensor: ModelInput, max_batch: int) -> None:
    assert value.dtype == DTYPES[DataType.Name(tensor.data_type)]
    assert 1 <= len(value) <= max_batch
    assert all(size in (-1, found) for size, found in zip(tensor.dims, value.shape[1:], strict=True))
