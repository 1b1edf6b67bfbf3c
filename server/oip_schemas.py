"""What the Open Inference Protocol sends besides tensors, and how the OpenAPI document describes a request of it."""

from typing import Any

from pydantic import BaseModel, JsonValue

from resnet_ensemble.server.openapi import BINARY
from resnet_ensemble.server.tensors import HEADER_LENGTH, Header


class Server(BaseModel):
    """The server's metadata."""

    name: str
    version: str
    extensions: tuple[str, ...]


class Live(BaseModel):
    """The process is alive."""

    live: bool = True


class Ready(BaseModel):
    """Every engine runs."""

    ready: bool = True


class Tensor(BaseModel):
    """An input or output of a model. `shape`: -1 for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Metadata(BaseModel):
    """A model's metadata."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ConfiguredOutput(BaseModel):
    """A tensor as Triton's model configuration has it, without the first dimension."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class ConfiguredInput(ConfiguredOutput):
    """`optional`: of several inputs, one is given."""

    optional: bool


class Config(BaseModel):
    """A model's configuration, as far as Triton's clients ask for it."""

    name: str
    platform: str
    max_batch_size: int
    input: list[ConfiguredInput]
    output: list[ConfiguredOutput]


class ModelReady(Ready):
    """The engines of a model run."""

    name: str


class Indexed(BaseModel):
    """A model in the repository's index."""

    name: str
    version: str
    state: str
    reason: str


class _OutputParameters(BaseModel):
    binary_data_size: int


class _Output(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: _OutputParameters | None = None
    data: list[bool | int | float | str] | None = None


class Inferred(BaseModel):
    """An answer's JSON. An output has either `data` or `binary_data_size`; its bytes are behind the JSON then."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[_Output]


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema with what it refers to in place; none of ours contains itself."""
    if isinstance(schema, list):
        return [_without_references(entry, definitions) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        found = definitions[schema["$ref"].removeprefix("#/$defs/")]
        return _without_references(found, definitions) | {key: schema[key] for key in schema.keys() - {"$ref"}}
    return {key: _without_references(value, definitions) for key, value in schema.items()}


_SCHEMA = Header.model_json_schema()
_EXAMPLE: JsonValue = {
    "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [255, 0, 0, 0, 0, 255]}],
    "outputs": [{"name": "label"}, {"name": "certain"}],
}
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "description": f"JSON; or JSON, and behind it, from where the header {HEADER_LENGTH} says, binary tensors. "
        "The content type is not looked at.",
        "content": {
            "application/json": {
                "schema": _without_references(
                    {key: value for key, value in _SCHEMA.items() if key != "$defs"}, _SCHEMA["$defs"]
                ),
                "example": _EXAMPLE,
            },
            "application/octet-stream": BINARY,
        },
    }
}
