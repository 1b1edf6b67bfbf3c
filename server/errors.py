"""Every answer that is not a prediction: one table of codes, one exception, one document (RFC 9457)."""

from typing import NamedTuple

from pydantic import BaseModel, Field

CONTENT_TYPE = "application/problem+json"


class Kind(NamedTuple):
    """The HTTP status and the title of a code."""

    status: int
    title: str


# The machine-readable codes. A client may rely on them; the details are for people.
KINDS = {
    "malformed_request": Kind(400, "The request can't be parsed"),
    "empty_image": Kind(400, "The image has no bytes"),
    "missing_image": Kind(400, "The request has no image"),
    "unauthorized": Kind(401, "The request has not the key"),
    "bundle_not_allowed": Kind(403, "The bundle is not one of those that may be served"),
    "not_found": Kind(404, "There is nothing at this path"),
    "method_not_allowed": Kind(405, "This path does not take this method"),
    "slow_upload": Kind(408, "The request took too long to arrive"),
    "not_calibrated": Kind(409, "There are no thresholds for the stop rule `calibrated`"),
    "reload_in_progress": Kind(409, "Another bundle is being loaded, or the last one drained"),
    "request_too_large": Kind(413, "The request is too large"),
    "image_too_large": Kind(413, "The image has too many bytes"),
    "too_many_pixels": Kind(413, "The image has too many pixels"),
    "too_many_images": Kind(413, "The request has too many images"),
    "unsupported_media_type": Kind(415, "The request's content type is not one of an image"),
    "unsupported_image_format": Kind(415, "The bytes are not an image in a supported format"),
    "unsupported_pixel_type": Kind(415, "The image's pixels can't be read as colours"),
    "corrupt_image": Kind(422, "The image is damaged or cut off"),
    "extreme_aspect_ratio": Kind(422, "The image is too long for its width"),
    "too_many_scans": Kind(422, "The progressive JPEG has too many scans"),
    "invalid_option": Kind(422, "An option is unknown or has a wrong value"),
    "bundle_refused": Kind(422, "The bundle can't be served; the one before still is"),
    "invalid_tensor": Kind(422, "A tensor is not what the model takes or gives"),
    "quota_exceeded": Kind(429, "This client has too many images in progress"),
    "head_too_large": Kind(431, "The request's head has too many bytes"),
    "internal_error": Kind(500, "The server failed"),
    "engine_failure": Kind(500, "A model failed on this image"),
    "overloaded": Kind(503, "The server is busy"),
    "not_ready": Kind(503, "The server can't answer now"),
    "deadline_exceeded": Kind(504, "The request's time is over"),
}


class ApiError(Exception):
    """An answer other than a prediction.

    - code: a key of KINDS
    - detail: what came, what is allowed, what to do
    - retry_after: seconds after which a retry makes sense
    - reason: which limit refused the request, for the metrics
    """

    def __init__(self, code: str, detail: str, *, retry_after: int | None = None, reason: str | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.kind = KINDS[code]
        self.detail = detail
        self.retry_after = retry_after
        self.reason = reason

    def as_value(self) -> "ApiError":
        """Itself, to be passed on and not raised: without the frames that it came through.

        They know it in turn, and what they worked on, and all of that would stay until a garbage collection.
        """
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self


class Problem(BaseModel):
    """A problem document as in RFC 9457, with a machine-readable `code`."""

    type: str = Field(examples=["urn:resnet-ensemble:problem:corrupt_image"])
    title: str = Field(examples=["The image is damaged or cut off"])
    status: int = Field(examples=[422])
    code: str = Field(examples=["corrupt_image"])
    detail: str
    request_id: str


def problem(error: ApiError, request_id: str) -> Problem:
    """The document that tells a client of `error`."""
    return Problem(
        type=f"urn:resnet-ensemble:problem:{error.code}",
        title=error.kind.title,
        status=error.kind.status,
        code=error.code,
        detail=error.detail,
        request_id=request_id,
    )
