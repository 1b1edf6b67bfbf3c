"""What the OpenAPI document says of refusals, in the shape of ours (errors.py) and of the Open Inference Protocol's."""

from typing import Any

from pydantic import BaseModel, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from resnet_ensemble.server.errors import CONTENT_TYPE, KINDS, Problem

Responses = dict[int | str, dict[str, Any]]  # by status, as FastAPI takes them

BINARY = {"schema": {"type": "string", "format": "binary"}}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which a retry makes sense, where that is known",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


class NotNull:
    """Beside `T | None` of a parameter, in Annotated: it may be absent, but the text "null" is no value of it."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of T."""
        found = handler(schema)
        alternatives: list[JsonSchemaValue] = found.pop("anyOf")
        (alternative,) = (option for option in alternatives if option != {"type": "null"})
        return found | alternative


class Error(BaseModel):
    """A refusal as the Open Inference Protocol has it."""

    error: str = Field(examples=["invalid_tensor: the model has no input 'picture'; it has image, pixels"])


def problems(*codes: str) -> Responses:
    """Responses with problem documents, for these codes, joined by status."""
    return _by_status(codes, CONTENT_TYPE, Problem)


def errors(*codes: str) -> Responses:
    """The same of the Open Inference Protocol."""
    return _by_status(codes, "application/json", Error)


def _by_status(codes: tuple[str, ...], media_type: str, model: type[BaseModel]) -> Responses:
    found: Responses = {}
    for code in codes:
        status = KINDS[code].status
        entry = found.setdefault(
            status, {"description": "", "content": {media_type: {"schema": model.model_json_schema()}}}
        )
        if status in _HEADERS:
            entry["headers"] = _HEADERS[status]
        entry["description"] = ", ".join(filter(None, [entry["description"], f"`{code}`"]))
    return found
