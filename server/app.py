"""The HTTP interface."""

import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from resnet_ensemble.server import admin, metrics, oip, openapi, uploads
from resnet_ensemble.server.classifier import Classifier
from resnet_ensemble.server.connection import (
    TIMEOUT,
    Timeout,
    body_size,
    client_of,
    service_of,
    timeout_of,
    unless_disconnected,
    uploaded,
)
from resnet_ensemble.server.envelope import Envelope
from resnet_ensemble.server.errors import CONTENT_TYPE, KINDS, ApiError, problem
from resnet_ensemble.server.schemas import (
    CalibrationDescription,
    Info,
    MemberDescription,
    Options,
    Prediction,
    Result,
    Results,
    Status,
    Timings,
)
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.stopping import CALIBRATED, RULES
from resnet_ensemble.server.uploads import Upload
from resnet_ensemble.training.views import ALL_PROTOCOLS, block_sizes

log = logging.getLogger(__name__)

NOT_OF_PREDICT = ("not_found", "method_not_allowed", "invalid_tensor", *admin.ONLY_HERE)
_PATH = "/predict"
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the metrics
_SERVER_TIMING = ", ".join(f"{stage};dur=%g" for stage in Timings.model_fields)
_HTTP_CODES = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed"}

router = APIRouter()


class App:
    """ASGI: a request for a prediction does not pass FastAPI's layers, which are a seventh of the event loop's work.

    - layers: for all others, and for the beginning and the end (`layers.router.lifespan_context`)
    """

    def __init__(self, layers: FastAPI, service: Service) -> None:
        self.layers = layers
        self._route = next(route for route in router.routes if isinstance(route, APIRoute) and route.path == _PATH)
        limit = service.settings.max_request_bytes
        self._predict = Envelope(_answer, metrics=service.metrics, max_request_bytes=limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == _PATH and scope["method"] == "POST":
            scope["app"], scope["route"] = self.layers, self._route  # as applications and routers do
            await self._predict(scope, receive, send)
        else:
            await self.layers(scope, receive, send)


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    """What FastAPI does around a route: an exception is answered by its handler."""
    request = Request(scope, receive, send)
    try:
        response = await predict(request)
    except ApiError as error:
        response = await _on_api_error(request, error)
    except ClientDisconnect as error:
        response = await _on_disconnect(request, error)
    except Exception:
        log.exception("request %s", _request_id(request))
        response = await _on_api_error(request, _internal_error())
    await response(scope, receive, send)


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter in OpenAPI."""
    return {"description": schema["description"], "schema": schema}


_PREDICT = {
    "parameters": [
        *(
            {"name": name, "in": "query", "required": False, **_described(schema)}
            for name, schema in Options.model_json_schema()["properties"].items()
        ),
        {"name": TIMEOUT, "in": "header", "required": False, **_described(TypeAdapter(Timeout).json_schema())},
    ],
    "requestBody": {
        "required": True,
        "description": "Without a content type, and as application/octet-stream, the body is taken for an image, too.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                        "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
                        "protocol": {"type": "string", "enum": list(ALL_PROTOCOLS)},
                        "stop": {"type": "string", "enum": [*RULES, CALIBRATED]},
                        "abstain_below": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                    "additionalProperties": False,
                },
                "encoding": {"image": {"contentType": "image/*"}},
            },
            "image/*": openapi.BINARY,
        },
    },
}


def create_app(service: Service) -> App:
    """The application that answers for `service`."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    layers = FastAPIOffline(
        title="resnet-ensemble",
        description="Classifies images with the averaged ensemble of residual networks (arXiv 1512.03385).",
        lifespan=lifespan,
        redoc_url=None,
    )
    layers.state.service = service
    layers.include_router(router)
    layers.include_router(oip.router)
    if service.settings.admin_key is not None:
        layers.include_router(admin.router)
    layers.add_middleware(Envelope, metrics=service.metrics, max_request_bytes=service.settings.max_request_bytes)
    layers.add_exception_handler(ApiError, _on_api_error)
    layers.add_exception_handler(RequestValidationError, _on_invalid_request)
    layers.add_exception_handler(HTTPException, _on_http_exception)
    layers.add_exception_handler(ClientDisconnect, _on_disconnect)
    layers.add_exception_handler(Exception, _on_exception)
    return App(layers, service)


@router.post(
    _PATH,
    summary="Classify one image or several",
    response_model=Prediction | Results,
    openapi_extra=_PREDICT,
    responses=openapi.problems(*(code for code in KINDS if code not in NOT_OF_PREDICT)),
)
async def predict(request: Request) -> Response:
    """One image is answered with its prediction; several with `results` in their order, each failing alone.

    Send a form with one or more `image` files, or the bytes of one image as the body. Options are query parameters or
    form fields; the query's value counts when an option is given in both.
    """
    # Parameters are read, and answers written, by hand: as FastAPI does it, they cost 0.13 ms of CPU, a third of all
    # that HTTP costs.
    service = service_of(request)
    settings = service.settings
    options, seconds = _queried(request.scope["query_string"]), timeout_of(request)
    deadline = time.monotonic() + (settings.timeout_seconds if seconds is None else seconds)
    with service.lease() as classifier:
        service.check_able()
        classifier.check_admission(deadline)
        return await _predict(request, service, classifier, options, deadline)


async def _predict(
    request: Request, service: Service, classifier: Classifier, options: Options, deadline: float
) -> Response:
    settings = service.settings
    with service.memory.hold(body_size(request, settings.max_request_bytes)):
        upload = await uploaded(uploads.read(request, settings), settings.upload_seconds, deadline)
        if upload.fields:
            options = _options(upload.fields).model_copy(update=options.model_dump(exclude_unset=True))
        with (
            service.quota.hold(client_of(request), len(upload.images)),
            service.metrics.hold_in_flight(len(upload.images)),
        ):
            answers = await unless_disconnected(request, classifier.classify(upload.images, options, deadline))
    headers = {"X-Bundle": classifier.identity}
    if len(answers) > 1:
        return _json(_results(request, answers, upload), headers)
    if isinstance(answers[0], ApiError):
        raise answers[0]
    return _json(answers[0], headers | _told_in_headers(answers[0]))


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Need it be restarted?", responses=openapi.problems("not_ready"))
async def livez(request: Request) -> Status:
    """Answers as soon as the server listens, and refuses while an engine hangs, which only a new process can help."""
    service_of(request).check_alive()
    return Status()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Can it answer?", responses=openapi.problems("not_ready"))
async def readyz(request: Request) -> Status:
    """Ready once every engine is warm and has given the bundle's golden probabilities."""
    service_of(request).check_ready()
    return Status()


@router.get("/info", summary="What is served here", responses=openapi.problems("not_ready"))
async def info(request: Request) -> Info:
    """The bundle, its members and their engines, protocols, measured errors, limits."""
    service = service_of(request)
    classifier, settings = service.classifier, service.settings
    manifest = classifier.bundle.manifest
    members = [
        MemberDescription(
            name=member.name,
            sha256=member.sha256,
            parameters=member.parameters,
            preprocessing=member.preprocessing,
            measured=member.measured,
            engine=engine.info,
            cost=cost,
        )
        for member, engine, cost in zip(manifest.members, classifier.engines, classifier.costs, strict=True)
    ]
    return Info(
        bundle=classifier.bundle.identity,
        version=importlib.metadata.version("resnet-ensemble"),
        labels=manifest.labels,
        protocol=classifier.protocol,
        protocols={name: sum(block_sizes(name)) for name in ALL_PROTOCOLS},
        stop=classifier.stop,
        stop_rules=classifier.strategies.rules,
        calibrated={
            protocol: CalibrationDescription(
                disagreement=found.disagreement,
                confidence=found.confidence,
                images=found.images_certified,
                disagreements=found.disagreements,
                draft=found.draft_side,
                **found.costs[CALIBRATED].model_dump(),
            )
            for protocol, found in classifier.strategies.calibrations.items()
        },
        members=members,
        measured=manifest.measured,
        streams=settings.streams,
        limits={name: value for name, value in settings.model_dump().items() if name.startswith("max_")},
    )


@router.get("/metrics", summary="Measurements for Prometheus", response_class=Response)
async def measurements(request: Request) -> Response:
    """The Prometheus text format."""
    return Response(service_of(request).metrics.render(), media_type=metrics.CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """A person who opens the server in a browser gets its documentation."""
    return RedirectResponse("docs")


@lru_cache(maxsize=256)  # clients ask the same way again and again
def _queried(query: bytes) -> Options:
    given = QueryParams(query)
    if len(given) != len(given.multi_items()):
        raise ApiError("invalid_option", "an option is given twice in the query")
    return _options(given)


def _options(given: Mapping[str, str]) -> Options:
    try:
        return Options.model_validate(dict(given))
    except ValidationError as error:
        raise ApiError("invalid_option", _explain(error.errors())) from None


def _results(request: Request, answers: list[Prediction | ApiError], upload: Upload) -> Results:
    results = []
    for position, (answer, filename) in enumerate(zip(answers, upload.filenames, strict=True)):
        if isinstance(answer, ApiError):
            service_of(request).metrics.errors.labels(answer.code).inc()
            results.append(Result(position=position, filename=filename, problem=problem(answer, _request_id(request))))
        else:
            results.append(Result(position=position, filename=filename, prediction=answer))
    return Results(results=results)


def _json(answer: BaseModel, headers: dict[str, str]) -> Response:
    return Response(answer.model_dump_json(), 200, headers, "application/json")


def _told_in_headers(prediction: Prediction) -> dict[str, str]:
    return {
        "Server-Timing": _SERVER_TIMING % tuple(vars(prediction.timings_ms).values()),
        "X-Protocol": prediction.protocol,
        "X-Stop-Rule": prediction.stop_rule,
        "X-Views-Used": str(prediction.views_used),
        "X-Views-Planned": str(prediction.views_planned),
    }


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


def _explain(errors: Any) -> str:
    return "; ".join(f"{error['loc'][-1]}: {error['msg']}" for error in errors)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    measured = service_of(request).metrics
    measured.errors.labels(error.code).inc()
    if error.reason:
        measured.rejected.labels(error.reason).inc()
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 wants it
    if oip.speaks(request):
        return oip.refusal(error, headers)
    body = problem(error, _request_id(request)).model_dump_json()
    return Response(body, error.kind.status, headers, CONTENT_TYPE)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_api_error(request, ApiError("invalid_option", _explain(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "internal_error")
    response = await _on_api_error(request, ApiError(code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})  # 405 says which methods are allowed
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _internal_error() -> ApiError:
    return ApiError("internal_error", "the failure was logged with this request's id")


async def _on_exception(request: Request, _error: Exception) -> Response:
    """Starlette logs the traceback after this; the client gets no internals."""
    response = await _on_api_error(request, _internal_error())
    response.headers["X-Request-ID"] = _request_id(request)  # this handler runs outside the envelope
    return response
