"""What TensorRT 11 no longer has, or has otherwise. `check_tensorrt.py` sees to it that mypy refuses these lines."""

import tensorrt as trt


def build(builder: trt.Builder, config: trt.IBuilderConfig) -> None:
    builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))  # refused
    config.set_flag(trt.BuilderFlag.FP16)  # refused
    config.max_workspace_size = 1 << 30  # refused
    config.int8_calibrator = None  # refused
    builder.build_engine(builder.create_network(0), config)  # refused


def run(engine: trt.ICudaEngine, context: trt.IExecutionContext, stream: int) -> None:
    engine.get_binding_index("views")  # refused
    context.set_binding_shape(0, (1, 3, 224, 224))  # refused
    context.execute_async_v2([0, 0], stream)  # refused
    context.set_tensor_address("views", "0x7f00")  # refused
    context.set_input_shape("views", (1, 224, 224, 3))
    context.execute_async_v3(stream)
