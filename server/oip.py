"""The Open Inference Protocol v2 over HTTP, as KServe, Triton and their clients speak it.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, with its extension for binary
tensors, and of Triton's extensions what tritonclient and perf_analyzer need: model configuration, the repository's
index, classification, `timeout`, compressed bodies. Errors are {"error": "code: detail"}, with the codes of errors.py.
"""

import asyncio
import gzip
import importlib.metadata
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import WithJsonSchema

from resnet_ensemble.server import admin, models, openapi, tensors
from resnet_ensemble.server.classifier import Classifier
from resnet_ensemble.server.connection import (
    AsgiExchange,
    Leased,
    Timeout,
    service_of,
)
from resnet_ensemble.server.errors import KINDS, ApiError
from resnet_ensemble.server.exchange import announced, read
from resnet_ensemble.server.models import Model
from resnet_ensemble.server.oip_schemas import (
    REQUEST_BODY,
    Config,
    ConfiguredInput,
    ConfiguredOutput,
    Indexed,
    Inferred,
    Live,
    Metadata,
    ModelReady,
    Ready,
    Server,
    Tensor,
)
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.tensors import HEADER_LENGTH, Spec

_PREFIX = "/v2"
_EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "parameters")
_CONFIG_TYPES = {
    "BYTES": "TYPE_STRING",
    "FP32": "TYPE_FP32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
}
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # "deflate" means zlib's format: RFC 9110
_UNWANTED = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*", re.IGNORECASE)  # of an encoding: RFC 9110, 12.4.2
_STEP = 2**20  # bytes that are decompressed before they are counted
_WORTH_COMPRESSING = 1024  # bytes

_OF_MODELS = openapi.errors("not_found", "not_ready")
_OF_INFER = openapi.errors(
    *(code for code in KINDS if code not in ("method_not_allowed", "missing_image", *admin.ONLY_HERE))
)
_INFERRED: dict[str, Any] = {
    "model": Inferred,
    "headers": {
        HEADER_LENGTH: {"description": "Where the JSON ends, if tensors follow", "schema": {"type": "integer"}},
        "X-Bundle": {"required": True, "schema": {"type": "string"}},
    },
    "content": {"application/octet-stream": openapi.BINARY},
}

router = APIRouter(prefix=_PREFIX, tags=["Open Inference Protocol v2"])


def speaks(request: Request) -> bool:
    """Whether a request is one of this protocol, so that its refusal must be, too."""
    path: str = request.scope["path"]  # `request.url` would cost a tenth of what a refusal does
    return path == _PREFIX or path.startswith(f"{_PREFIX}/")


def refusal(error: ApiError, headers: Mapping[str, str]) -> Response:
    """An error in the protocol's shape."""
    return JSONResponse(openapi.Error(error=str(error)).model_dump(), error.kind.status, headers)


async def _find(request: Request, classifier: Leased, name: str, version: str | None = None) -> Model:
    return models.find(classifier, service_of(request).settings, name, version)


Named = Annotated[Model, Depends(_find)]
# Read as text, so that what is wrong with it is told as of the rest of the body.
HeaderLength = Annotated[
    str | None,
    WithJsonSchema({"type": "integer", "minimum": 0}),
    Header(alias=HEADER_LENGTH, description="Where the JSON ends"),
]


@router.get("")
async def server() -> Server:
    """What this server is."""
    version = importlib.metadata.version("resnet-ensemble")
    return Server(name="resnet-ensemble", version=version, extensions=_EXTENSIONS)


@router.get("/health/live", responses=openapi.errors("not_ready"))
async def live(request: Request) -> Live:
    """As /livez."""
    service_of(request).check_alive()
    return Live()


@router.get("/health/ready", responses=openapi.errors("not_ready"))
async def ready(request: Request) -> Ready:
    """As /readyz."""
    service_of(request).check_ready()
    return Ready()


@router.get("/models/{name}", responses=_OF_MODELS)
@router.get("/models/{name}/versions/{version}", responses=_OF_MODELS)
async def metadata(model: Named) -> Metadata:
    """A model's tensors."""
    return Metadata(
        name=model.name,
        versions=(_version(model.classifier),),
        platform=model.platform,
        inputs=[_described(spec) for spec in model.inputs],
        outputs=[_described(spec) for spec in model.outputs],
    )


@router.get("/models/{name}/config", responses=_OF_MODELS)
@router.get("/models/{name}/versions/{version}/config", responses=_OF_MODELS)
async def config(request: Request, model: Named) -> Config:
    """The same as Triton's model configuration has it: without the first dimension, whose limit is max_batch_size."""
    return Config(
        name=model.name,
        platform=model.platform,
        max_batch_size=service_of(request).settings.max_images_per_request,
        input=[ConfiguredInput(**_configured(spec), optional=model.alternatives) for spec in model.inputs],
        output=[ConfiguredOutput(**_configured(spec)) for spec in model.outputs],
    )


@router.get("/models/{name}/ready", responses=_OF_MODELS)
@router.get("/models/{name}/versions/{version}/ready", responses=_OF_MODELS)
async def model_ready(request: Request, model: Named) -> ModelReady:
    """Whether the model's engines run."""
    service_of(request).check_ready(model.members)
    return ModelReady(name=model.name)


@router.post("/repository/index", responses=openapi.errors("not_ready"))
async def index(request: Request) -> list[Indexed]:
    """Every model."""
    service = service_of(request)
    classifier = service.classifier
    down = classifier.scheduler.down
    return [
        Indexed(
            name=model.name,
            version=_version(classifier),
            state="UNAVAILABLE" if down.keys() & {*model.members} else "READY",
            reason="; ".join(down[member] for member in model.members if member in down),
        )
        for model in models.all_models(classifier, service.settings)
    ]


@router.post(
    "/models/{name}/infer", response_model=None, responses={200: _INFERRED, **_OF_INFER}, openapi_extra=REQUEST_BODY
)
@router.post(
    "/models/{name}/versions/{version}/infer",
    response_model=None,
    responses={200: _INFERRED, **_OF_INFER},
    openapi_extra=REQUEST_BODY,
)
async def infer(
    request: Request,
    model: Named,
    seconds: Timeout = None,
    header_length: HeaderLength = None,
) -> Response:
    """Run a model. The body is described in tensors.py."""
    service = service_of(request)
    began = time.monotonic()
    deadline = began + (service.settings.timeout_seconds if seconds is None else seconds)
    service.check_able(model.members)
    classifier = model.classifier
    classifier.check_admission(deadline)
    with ExitStack() as held:
        exchange = AsgiExchange(request)
        body = await _body(exchange, service, held, deadline)
        async with service.parsing:
            asked = await asyncio.to_thread(tensors.decode, body, header_length, model.inputs, model.outputs)
        if asked.parameters.timeout is not None:
            deadline = min(deadline, began + asked.parameters.timeout / 1e6)
        rows = model.rows(asked.inputs)
        held.enter_context(service.quota.hold(exchange.client, rows))
        held.enter_context(service.awake.working())
        outputs = await exchange.unless_gone(model.infer(asked.inputs, asked.parameters, deadline))
        head = {"model_name": model.name, "model_version": _version(classifier)}
        labels = classifier.bundle.manifest.labels
        content, length = await asyncio.to_thread(tensors.encode, head, asked, outputs, labels)
        headers = {"X-Bundle": classifier.bundle.identity}
        if length is not None:
            headers[HEADER_LENGTH] = str(length)
        encoding = _accepted(request)
        if encoding and len(content) >= _WORTH_COMPRESSING:
            content = await asyncio.to_thread(_compress, content, encoding)
            headers["Content-Encoding"] = encoding
    return Response(content, 200, headers, "application/json" if length is None else "application/octet-stream")


async def _body(exchange: AsgiExchange, service: Service, held: ExitStack, deadline: float) -> bytearray:
    """The body, decompressed. `held` holds the room for it."""
    settings = service.settings
    encoding = exchange.headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding != "identity" and encoding not in _WINDOW_BITS:
        raise ApiError(
            "unsupported_media_type", f"the content encoding is {encoding[:100]!r}; gzip and deflate are known"
        )
    count = held.enter_context(service.memory.hold(announced(exchange.headers, settings.max_request_bytes)))
    body = bytearray()
    await read(exchange, count, body.extend, settings.upload_seconds, deadline)
    return body if encoding == "identity" else await _decompress(body, encoding, settings.max_request_bytes, count)


async def _decompress(body: bytearray, encoding: str, largest: int, count: Callable[[int], None]) -> bytearray:
    """Step by step, so that a body that grows without end is refused early, and others run in between."""
    decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
    content, rest, fed = bytearray(), b"", 0
    while not decompressor.eof:
        if not rest:  # by steps, too: each time, zlib copies what it does not take, with the interpreter lock held
            rest = bytes(body[fed : fed + _STEP])
            fed += len(rest)
        try:
            piece = await asyncio.to_thread(decompressor.decompress, rest, _STEP)
        except zlib.error as error:
            raise ApiError("malformed_request", f"the body is not {encoding}: {error}") from None
        rest = decompressor.unconsumed_tail
        if not piece and not rest and fed == len(body) and not decompressor.eof:
            raise ApiError("malformed_request", f"the body ends before its {encoding} data do")
        if len(content) + len(piece) > largest:
            raise ApiError("request_too_large", f"the body has more than {largest} bytes when it is decompressed")
        count(len(piece))
        content += piece
    if behind := len(decompressor.unused_data) + len(body) - fed:
        raise ApiError("malformed_request", f"{behind} bytes follow the body's {encoding} data")
    return content


def _accepted(request: Request) -> str | None:
    """An encoding that the client takes and we have."""
    for choice in request.headers.get("accept-encoding", "").split(","):
        name, _, quality = choice.partition(";")
        if name.strip().lower() in _WINDOW_BITS and not _UNWANTED.fullmatch(quality):
            return name.strip().lower()
    return None


def _compress(content: bytes, encoding: str) -> bytes:
    return gzip.compress(content, 1) if encoding == "gzip" else zlib.compress(content, 1)


def _version(classifier: Classifier) -> str:
    return classifier.bundle.manifest.version


def _described(spec: Spec) -> Tensor:
    return Tensor(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _configured(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _CONFIG_TYPES[spec.datatype], "dims": spec.shape[1:]}
