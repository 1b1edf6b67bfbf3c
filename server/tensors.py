"""The wire format of the Open Inference Protocol v2: a body becomes tensors, tensors become a body.

A body is a JSON object, and behind it, if the header Inference-Header-Content-Length says where the object ends, the
bytes of those tensors that say `binary_data_size`: row-major, little-endian, each element of BYTES after its length as
a uint32. https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol has both.

Whatever a stranger sends ends as an ApiError: `malformed_request` where the body can't be taken apart, `invalid_tensor`
where a tensor is not what the model takes, `invalid_option` for parameters.
"""

import base64
import binascii
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.schemas import ProtocolName, StopRuleName

HEADER_LENGTH = "Inference-Header-Content-Length"
# While JSON is parsed nothing else runs in this process: 8 MiB of numbers take 0.12 s (Zen 5, pydantic 2.14), and as
# lists of three, a pixel each, three to four times as long and 170 MB.
MAX_JSON_BYTES = 8 * 2**20
_MAX_LISTS = 2**17  # two views of 224 x 224 pixels have 100 thousand
_MAX_RANK = 8
_LENGTH = struct.Struct("<I")
_DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
}
_BINARY = f"Large tensors are for binary data, behind the JSON, with binary_data_size and {HEADER_LENGTH}"
Datatype = Literal["FP32", "INT64", "BOOL", "UINT8", "BYTES"]


@dataclass(frozen=True)
class Spec:
    """A model's input or output. `shape`: -1 for any length."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is one of these. A last dimension of 1 may be left out."""
        given = [*shape, 1] if len(shape) < len(self.shape) and self.shape[-1] == 1 else shape
        return len(given) == len(self.shape) and all(
            want in (-1, length) for want, length in zip(self.shape, given, strict=True)
        )


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _knows_every_field(cls, given: Any) -> Any:
        """One unknown field is enough. pydantic would note each: 8 MiB of them take 0.6 GiB and 2 s."""
        if isinstance(given, dict) and (other := next((name for name in given if name not in cls.model_fields), None)):
            raise PydanticCustomError("extra_forbidden", "{name} is not known", {"name": repr(other[:100])})
        return given


class Parameters(_Part):
    """What a request may ask for.

    - binary_data_output: outputs behind the JSON, where an output does not say it itself
    - timeout: microseconds, as Triton has it; what is not done then is 504
    - protocol, stop: of the ensemble, as for /predict
    """

    binary_data_output: StrictBool | None = None
    timeout: Annotated[StrictInt, Field(gt=0, le=3600 * 10**6)] | None = None
    protocol: ProtocolName | None = None
    stop: StopRuleName | None = None


class _InputParameters(_Part):
    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = None


class _OutputParameters(_Part):
    binary_data: StrictBool | None = None
    classification: Annotated[StrictInt, Field(ge=1)] | None = None


def _or_null(parameters: type[_Part]) -> BeforeValidator:
    """Who writes a model of a request with its defaults, such as KServe's, sends null for none."""
    return BeforeValidator(lambda given: {} if given is None else given, json_schema_input_type=parameters | None)


class _Input(_Part):
    name: StrictStr
    shape: Annotated[list[Annotated[StrictInt, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=_MAX_RANK)]
    datatype: StrictStr
    parameters: Annotated[_InputParameters, _or_null(_InputParameters)] = _InputParameters()
    data: Any = None


class _Output(_Part):
    name: StrictStr
    parameters: Annotated[_OutputParameters, _or_null(_OutputParameters)] = _OutputParameters()


class Header(_Part):
    """The JSON object. `model_name`: KServe's client repeats it here; the path says which model it is."""

    id: StrictStr | None = None
    model_name: StrictStr | None = None
    parameters: Annotated[Parameters, _or_null(Parameters)] = Parameters()
    inputs: Annotated[list[_Input], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[_Output], Field(max_length=64)] | None = None


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for. `classes`: of the best so many, instead of the tensor, a text each."""

    spec: Spec
    binary: bool
    classes: int | None = None


@dataclass(frozen=True)
class Request:
    """What a client wants of a model.

    - inputs: by name; uint8 of the tensor's shape, a view of the body where it was binary; of BYTES a list
    - outputs: in the order of the answer
    """

    id: str | None
    parameters: Parameters
    inputs: Mapping[str, "NDArray[np.uint8] | list[bytes]"]
    outputs: Sequence[Wanted]


def decode(
    body: bytes | bytearray, header_length: str | None, inputs: Sequence[Spec], outputs: Sequence[Spec]
) -> Request:
    """Take a body apart.

    - header_length: the header of that name
    - inputs: UINT8 and BYTES that the model takes; outputs: what it gives

    Raises ApiError.
    """
    end = _end_of_json(body, header_length)
    if end > MAX_JSON_BYTES:
        raise ApiError(
            "request_too_large",
            f"the JSON has {end} bytes; at most {MAX_JSON_BYTES} are allowed. {_BINARY}",
        )
    if body.count(b"[", 0, end) > _MAX_LISTS:
        raise ApiError(
            "request_too_large",
            f"the JSON has more than {_MAX_LISTS} lists. Send the tensor as one list of numbers, row-major. {_BINARY}",
        )
    try:
        header = Header.model_validate_json(bytes(memoryview(body)[:end]))
    except ValidationError as error:
        raise _invalid(error) from None
    binary = memoryview(body)[end:]
    tensors: dict[str, NDArray[np.uint8] | list[bytes]] = {}
    offset = 0
    for tensor in header.inputs:
        if tensor.name in tensors:
            raise ApiError("invalid_tensor", f"the input {tensor.name!r} is given twice")
        spec = _known(tensor.name, "input", inputs)
        _check(tensor, spec)
        size = tensor.parameters.binary_data_size
        if size is None:
            tensors[tensor.name] = _from_json(tensor, spec)
            continue
        if size > len(binary) - offset:
            raise ApiError(
                "malformed_request",
                f"the input {tensor.name!r} says binary_data_size {size}, but only {len(binary) - offset} bytes of the "
                f"body are left; {HEADER_LENGTH} must be the length of the JSON, which comes first",
            )
        tensors[tensor.name] = _from_binary(tensor, spec, binary[offset : offset + size])
        offset += size
    if offset != len(binary):
        raise ApiError("malformed_request", f"{len(binary) - offset} bytes of the body belong to no input")
    return Request(header.id, header.parameters, tensors, _wanted(header, outputs))


def encode(
    head: Mapping[str, str], request: Request, outputs: Mapping[str, NDArray[Any]], labels: Sequence[str]
) -> tuple[bytes, int | None]:
    """The body of an answer, and how long its JSON is if there are bytes behind it.

    - head: the model's name and version, and so on
    - outputs: by name, at least those that the request wants; of BYTES, arrays of str
    """
    described, behind = [], []
    for wanted in request.outputs:
        array, datatype = outputs[wanted.spec.name], wanted.spec.datatype
        if wanted.classes is not None:
            array, datatype = _classified(array, wanted.classes, labels), "BYTES"
        entry: dict[str, Any] = {"name": wanted.spec.name, "datatype": datatype, "shape": list(array.shape)}
        if wanted.binary:
            behind.append(_to_binary(array, datatype))
            entry["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    given = {} if request.id is None else {"id": request.id}
    text = pydantic_core.to_json({**head, **given, "outputs": described})
    return b"".join([text, *behind]), len(text) if behind else None


def pack(elements: Iterable[bytes]) -> bytes:
    """BYTES as binary data."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def _end_of_json(body: bytes | bytearray, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    # isdecimal() alone takes the digits of every script, and int() more than 4300 of them raises.
    if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 20):
        raise ApiError("malformed_request", f"{HEADER_LENGTH} is {header_length[:40]!r}, not a number of bytes")
    if int(header_length) > len(body):
        raise ApiError("malformed_request", f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes")
    return int(header_length)


def _invalid(error: ValidationError) -> ApiError:
    """What is wrong with the JSON."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return ApiError("malformed_request", f"{first['msg']}; tensors behind the JSON need {HEADER_LENGTH}")
    if first["loc"][:1] == ("parameters",) or "parameters" in first["loc"]:
        return ApiError("invalid_option", f"{where}: {first['msg']}")
    return ApiError("invalid_tensor", f"{where or 'the JSON'}: {first['msg']}")


def _known(name: str, kind: str, specs: Sequence[Spec]) -> Spec:
    for spec in specs:
        if spec.name == name:
            return spec
    raise ApiError(
        "invalid_tensor", f"the model has no {kind} {name[:100]!r}; it has {', '.join(spec.name for spec in specs)}"
    )


def _check(tensor: _Input, spec: Spec) -> None:
    if tensor.datatype != spec.datatype:
        raise ApiError(
            "invalid_tensor",
            f"the input {spec.name!r} has the datatype {tensor.datatype[:100]!r}; the model takes {spec.datatype}",
        )
    if not spec.fits(tensor.shape):
        raise ApiError(
            "invalid_tensor", f"the input {spec.name!r} has the shape {tensor.shape}; the model takes {[*spec.shape]}"
        )
    if (tensor.data is None) == (tensor.parameters.binary_data_size is None):
        raise ApiError("invalid_tensor", f"the input {spec.name!r} must have either data or binary_data_size")


def _from_json(tensor: _Input, spec: Spec) -> "NDArray[np.uint8] | list[bytes]":
    size = math.prod(tensor.shape)
    if spec.datatype == "BYTES":
        if not isinstance(tensor.data, list) or len(tensor.data) != size:
            raise ApiError("invalid_tensor", f"the data of {spec.name!r} must be a list of {size} texts")
        nested = len(tensor.shape) == 2 and all(isinstance(row, list) and len(row) == 1 for row in tensor.data)
        elements = [row[0] for row in tensor.data] if nested else tensor.data
        return [_from_base64(element, spec) for element in elements]
    nested = isinstance(tensor.data, list) and any(isinstance(row, list) for row in tensor.data[:1])
    numbers = _flattened(tensor.data, tensor.shape if nested else [size], spec)
    if {*map(type, numbers)} != {int} or not 0 <= min(numbers) <= max(numbers) <= 255:
        raise ApiError("invalid_tensor", f"the data of {spec.name!r} must be whole numbers from 0 to 255")
    return np.fromiter(numbers, np.uint8, size).reshape(tensor.shape)


def _flattened(data: Any, shape: Sequence[int], spec: Spec) -> list[Any]:
    """What lists hold that are nested as a shape says.

    An array would take as much room for each text as for the longest, and a second in which nothing else runs for
    millions of empty lists.
    """
    level = [data]
    for length in shape:
        if any(not isinstance(row, list) or len(row) != length for row in level):
            raise ApiError(
                "invalid_tensor",
                f"the data of {spec.name!r} must be a list of {math.prod(shape)}, or lists nested as its shape says",
            )
        level = list(chain.from_iterable(level))
    return level


def _from_base64(element: object, spec: Spec) -> bytes:
    """JSON has no bytes, so a picture's are base64."""
    try:
        if isinstance(element, str):
            return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        pass
    raise ApiError("invalid_tensor", f"in JSON, the data of {spec.name!r} must be base64") from None


def _from_binary(tensor: _Input, spec: Spec, content: memoryview) -> "NDArray[np.uint8] | list[bytes]":
    size = math.prod(tensor.shape)
    if spec.datatype == "BYTES":
        return _unpack(content, size, spec)
    if len(content) != size:
        raise ApiError(
            "invalid_tensor",
            f"the input {spec.name!r} has {len(content)} bytes; the shape {tensor.shape} of UINT8 has {size}",
        )
    return np.frombuffer(content, np.uint8).reshape(tensor.shape)


def _unpack(content: memoryview, count: int, spec: Spec) -> list[bytes]:
    if len(content) < _LENGTH.size * count:  # before a list of so many is begun
        raise ApiError("invalid_tensor", f"{count} elements of {spec.name!r} do not fit into {len(content)} bytes")
    elements, offset = [], 0
    for index in range(count):
        start = offset + _LENGTH.size
        stop = start + _LENGTH.unpack_from(content, offset)[0] if start <= len(content) else start
        if stop > len(content):
            raise ApiError("invalid_tensor", f"the bytes of {spec.name!r} end within element {index}")
        elements.append(bytes(content[start:stop]))
        offset = stop
    if offset != len(content):
        raise ApiError(
            "invalid_tensor", f"{len(content) - offset} bytes of {spec.name!r} are left after {count} elements"
        )
    return elements


def _wanted(header: Header, specs: Sequence[Spec]) -> list[Wanted]:
    default = bool(header.parameters.binary_data_output)
    if not header.outputs:
        return [Wanted(spec, default) for spec in specs]
    found: dict[str, Wanted] = {}
    for output in header.outputs:
        spec = _known(output.name, "output", specs)
        if spec.name in found:
            raise ApiError("invalid_tensor", f"the output {spec.name!r} is asked for twice")
        said, classes = output.parameters.binary_data, output.parameters.classification
        if classes is not None and (spec.datatype, len(spec.shape)) != ("FP32", 2):
            raise ApiError("invalid_option", f"the output {spec.name!r} has no classes, so no classification either")
        found[spec.name] = Wanted(spec, default if said is None else said, classes)
    return list(found.values())


def _classified(probabilities: NDArray[np.float32], count: int, labels: Sequence[str]) -> NDArray[np.str_]:
    """Texts "probability:index:label" of the most probable classes, (n, count), as Triton's classification has them."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]  # (n, count)
    return np.array(
        [
            [f"{row[index]:f}:{index}:{labels[index]}" for index in indices]
            for row, indices in zip(probabilities, best, strict=True)
        ]
    )


def _to_binary(array: NDArray[Any], datatype: Datatype) -> bytes:
    if datatype == "BYTES":
        return pack(element.encode() for element in array.ravel().tolist())
    return array.astype(_DTYPES[datatype], copy=False).tobytes()
