"""The server's settings: one frozen object, from environment variables that begin with RESNET_."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from resnet_ensemble.server.schemas import ProtocolName, StopRuleName

PREFIX = "RESNET_"
CLIENT_PREFIX = "RESNET_CLIENT_"  # the SDK's own variables
_OF_SERVICES = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
SHIPPED_BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "cifar10"


class SettingsError(Exception):
    """A variable is not known, or its value can't be; the message has no values."""


def _sendable(key: SecretStr) -> SecretStr:
    """A key that a header can carry. A line's end comes easily with a file."""
    text = key.get_secret_value()
    if not (text.isascii() and text.isprintable() and text == text.strip()):
        raise ValueError("it has characters that no header can carry, or blanks or a line's end around it")
    return key


class Settings(BaseSettings):
    """Limits are of one server process. An unknown RESNET_ variable or a contradiction stops the start."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    bundle: Path = SHIPPED_BUNDLE
    """The folder of the bundle to serve."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The TCP port to listen on."""
    backend: Literal["auto", "onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt", "fake"] = "auto"
    """What runs the members: the fastest that build_engines found right, one by name, or `fake`, without weights."""
    streams: int | None = Field(default=None, ge=1, le=1024)
    """Engine runs side by side. By default 2 on a GPU, or one for each core that this process may use and keeps to."""
    max_batch: int | None = Field(default=None, ge=1)
    """Views in one engine run. By default the fewest that have nearly the best throughput, as measured."""
    protocol: ProtocolName | None = None
    """Which views are averaged where a request does not say it; by default what the bundle says."""
    stop: StopRuleName = "full"
    """When an image is done where a request does not say it: after all views, once its class is certain, or likely."""
    timeout_seconds: float = Field(default=300.0, gt=0, le=3600)
    """How long an answer may take where a request has no X-Request-Timeout; then it is 504."""
    engine_timeout_seconds: float = Field(default=60.0, gt=0, le=86400)
    """How long an engine may run, or 20 times as long as planned if that is more; then it hangs, as /livez tells."""
    max_wait_seconds: float = Field(default=10.0, gt=0, le=86400)
    """Predicted wait in the queue above which new requests are answered with 503."""
    max_request_bytes: int = Field(default=100 * 2**20, ge=1)
    """Bytes of a request's body."""
    max_pending_bytes: int = Field(default=2**30, ge=1)
    """Bytes of all bodies in progress, above which new requests are answered with 503."""
    max_view_bytes: int = Field(default=512 * 2**20, ge=1)
    """Bytes of views that wait for engines, above which no further image is decoded."""
    max_image_bytes: int = Field(default=20 * 2**20, ge=1)
    """Bytes of one encoded image."""
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """Width times height of one image, read from its header before it is decoded."""
    max_images_per_request: int = Field(default=64, ge=1, le=1000)
    """`image` parts in one request."""
    max_images_per_client: int | None = Field(default=None, ge=1)
    """Images in progress for one client address; above it the answer is 429. None, since a proxy is one address."""
    upload_seconds: float = Field(default=30.0, gt=0, le=86400)
    """How long a request's body may take to arrive."""
    drain_seconds: int = Field(default=30, ge=1, le=86400)
    """How long SIGTERM waits for accepted requests."""

    admin_key: Annotated[SecretStr, AfterValidator(_sendable)] | None = Field(default=None, min_length=16)
    """What POST /admin/reload wants as `Authorization: Bearer KEY`; without a key there is no /admin."""
    reload_from: Path | None = None
    """The folder whose bundles a request to /admin/reload may name; without it only the served one is loaded again."""

    @property
    def asked_backend(self) -> str | None:
        """The one that is asked for by name; None: whatever build_engines found best."""
        return None if self.backend == "auto" else self.backend

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_image_bytes > self.max_request_bytes:
            raise ValueError(
                f"RESNET_MAX_IMAGE_BYTES ({self.max_image_bytes}) is more than a whole request may have, "
                f"RESNET_MAX_REQUEST_BYTES ({self.max_request_bytes})"
            )
        if self.max_request_bytes > self.max_pending_bytes:
            raise ValueError(
                f"RESNET_MAX_REQUEST_BYTES ({self.max_request_bytes}) is more than all requests together may have, "
                f"RESNET_MAX_PENDING_BYTES ({self.max_pending_bytes})"
            )
        if self.max_images_per_client is not None and self.max_images_per_request > self.max_images_per_client:
            raise ValueError(
                f"RESNET_MAX_IMAGES_PER_REQUEST ({self.max_images_per_request}) is more than one client may have in "
                f"progress, RESNET_MAX_IMAGES_PER_CLIENT ({self.max_images_per_client})"
            )
        return self


def explain() -> str:
    """Every setting with its default and meaning, one a line."""
    defaults = Settings.model_construct().model_dump()
    return "\n".join(
        f"  {PREFIX}{name.upper():<24} {field.description} [{defaults[name]}]"
        for name, field in Settings.model_fields.items()
    )


def from_environment() -> Settings:
    """The settings of this process; an empty variable is none. Raises SettingsError."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name, value in os.environ.items():
        upper = name.upper()
        others = upper.startswith(CLIENT_PREFIX) or _of_kubernetes(upper, value)
        if upper.startswith(PREFIX) and upper not in known and not others:
            raise SettingsError(f"{name} is not a setting; there are {', '.join(sorted(known))}")
    port = os.environ.get(f"{PREFIX}PORT", "")
    given = {"port": Settings.model_fields["port"].default} if _of_kubernetes(f"{PREFIX}PORT", port) else {}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_told(wrong) for wrong in error.errors(include_input=False))) from None


def _of_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes sets a variable because of a service that is named `resnet`, or begins so."""
    return bool(_OF_SERVICES.fullmatch(name)) or (name.endswith("PORT") and "://" in value)


def _told(wrong: ErrorDetails) -> str:
    """Without the value, which may be the admin key."""
    message = wrong["msg"].removeprefix("Value error, ")
    return f"{PREFIX}{str(wrong['loc'][0]).upper()}: {message}" if wrong["loc"] else message
