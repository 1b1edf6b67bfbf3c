"""What an operator asks of a running server, with a key. Without the setting RESNET_ADMIN_KEY none of it exists."""

import hmac
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resnet_ensemble.server import openapi
from resnet_ensemble.server.connection import service_of
from resnet_ensemble.server.errors import ApiError

ONLY_HERE = ("unauthorized", "bundle_not_allowed", "reload_in_progress", "bundle_refused")  # codes
_MAX_BODY = 4096  # bytes


class Reload(BaseModel):
    """Which bundle to load; by default the path that is served, again."""

    model_config = ConfigDict(extra="forbid")

    bundle: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00]+$")] | None = None


class Reloaded(BaseModel):
    """What is served now, and what answers only what it had accepted."""

    bundle: str
    previous: str
    seconds: float


_BEARER = HTTPBearer(auto_error=False, description="The key of the setting RESNET_ADMIN_KEY")


async def _authorized(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> None:
    key = service_of(request).settings.admin_key
    assert key is not None
    given = credentials.credentials if credentials else ""
    # The time that this takes does not tell how much of a guess was right.
    if not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise ApiError("unauthorized", "send the header `Authorization: Bearer KEY` with the key of RESNET_ADMIN_KEY")


router = APIRouter(prefix="/admin", tags=["Administration"], dependencies=[Depends(_authorized)])


@router.post(
    "/reload",
    summary="Load a bundle and switch to it",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": Reload.model_json_schema()}}}},
    responses=openapi.problems(*ONLY_HERE, "request_too_large", "invalid_option", "not_ready"),
)
async def reload(request: Request) -> Reloaded:
    """Load a bundle, check it, and switch to it without an interruption; if it is not sound, nothing changes."""
    began = time.monotonic()
    wanted = await _wanted(request)
    bundle, previous = await service_of(request).reload(wanted.bundle)
    return Reloaded(bundle=bundle, previous=previous, seconds=round(time.monotonic() - began, 3))


async def _wanted(request: Request) -> Reload:
    """Read here, not by FastAPI, which would read a stranger's body before the key is checked."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise ApiError("request_too_large", f"the body may have at most {_MAX_BODY} bytes here")
    try:
        return Reload.model_validate_json(bytes(body) or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ApiError("invalid_option", f"{where}: {first['msg']}") from None
