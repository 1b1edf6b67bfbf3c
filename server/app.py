"""The HTTP interface."""

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from resnet_ensemble.server import admin, metrics, oip, openapi, predict
from resnet_ensemble.server.connection import TIMEOUT, AsgiExchange, Timeout, service_of
from resnet_ensemble.server.envelope import Envelope, route
from resnet_ensemble.server.errors import KINDS, ApiError
from resnet_ensemble.server.exchange import (
    CLIENT_CLOSED_REQUEST,
    REQUEST_ID,
    headers_of,
    internal_error,
    refusal,
    stopping,
)
from resnet_ensemble.server.predict import explain
from resnet_ensemble.server.schemas import (
    CalibrationDescription,
    Info,
    MemberDescription,
    Options,
    Prediction,
    Results,
    Status,
)
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.stopping import CALIBRATED
from resnet_ensemble.training.views import ALL_PROTOCOLS, block_sizes

NOT_OF_PREDICT = ("not_found", "method_not_allowed", "invalid_tensor", *admin.ONLY_HERE)
_HTTP_CODES = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed"}

router = APIRouter()


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter in OpenAPI."""
    return {"description": schema["description"], "schema": schema}


_OPTIONS = Options.model_json_schema()["properties"]
_PREDICT = {
    "parameters": [
        *({"name": name, "in": "query", "required": False, **_described(schema)} for name, schema in _OPTIONS.items()),
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
                        **_OPTIONS,
                    },
                    "additionalProperties": False,
                },
                "encoding": {"image": {"contentType": "image/*"}},
            },
            "image/*": openapi.BINARY,
        },
    },
}


def create_app(service: Service) -> FastAPI:
    """The application that answers for `service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPIOffline(
        title="resnet-ensemble",
        description="Classifies images with the averaged ensemble of residual networks (arXiv 1512.03385).",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(oip.router)
    if service.settings.admin_key is not None:
        app.include_router(admin.router)
    app.add_middleware(
        Envelope,
        metrics=service.metrics,
        max_request_bytes=service.settings.max_request_bytes,
        on_cancelled=lambda request: _on_api_error(request, stopping()),
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)
    return app


@router.post(
    predict.PATH,
    summary="Classify one image or several",
    response_model=Prediction | Results,
    openapi_extra=_PREDICT,
    responses=openapi.problems(*(code for code in KINDS if code not in NOT_OF_PREDICT)),
)
async def classify(request: Request) -> Response:
    """One image is answered with its prediction; several with `results` in their order, each failing alone.

    Send a form with one or more `image` files, or the bytes of one image as the body. Options are query parameters or
    form fields; the query's value counts when an option is given in both.
    """
    answer = await predict.answer(AsgiExchange(request), service_of(request))
    return Response(answer.body, answer.status, answer.headers)


@router.get("/livez", summary="Need it be restarted?", responses=openapi.problems("not_ready"))
async def livez(request: Request) -> Status:
    """Answers as soon as the server listens, and refuses while only a new process can help.

    That is while an engine hangs, or one on a GPU can't be opened anew.
    """
    service_of(request).check_alive()
    return Status()


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
        streams=classifier.streams,
        limits={name: value for name, value in settings.model_dump().items() if name.startswith("max_")},
    )


@router.get(
    "/metrics",
    summary="Measurements for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def measurements(request: Request) -> Response:
    """The Prometheus text format."""
    return Response(service_of(request).measurements(), media_type=metrics.CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """A person who opens the server in a browser gets its documentation."""
    return RedirectResponse("docs")


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    measured = service_of(request).metrics
    if oip.speaks(request):
        return oip.refusal(error, headers_of(error, measured))
    answer = refusal(error, _request_id(request), measured)
    return Response(answer.body, answer.status, answer.headers)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_api_error(request, ApiError("invalid_option", explain(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "internal_error")
    response = await _on_api_error(request, ApiError(code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})  # 405 says which methods are allowed
    return response


async def _on_disconnect(request: Request, _error: Exception) -> Response:
    """Nobody reads this; what its connection may have told before is counted (protocol.py)."""
    return Response(status_code=getattr(request.state, "told", CLIENT_CLOSED_REQUEST))


async def _on_exception(request: Request, _error: Exception) -> Response:
    """Starlette logs the traceback after this; the client gets no internals. This runs outside the envelope."""
    response = await _on_api_error(request, internal_error())
    response.headers[REQUEST_ID] = _request_id(request)
    service_of(request).metrics.count(request.method, route(request.scope), response.status_code)
    return response
