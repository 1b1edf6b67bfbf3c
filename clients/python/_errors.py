"""What can go wrong.

ResnetError
├── ConnectionFailedError         nothing answered at the URL
│   └── TimedOutError             no answer in time
├── ResponseError                 something answered, but not a resnet-ensemble server
└── StatusError                   the server answered with a problem: status, code, detail, request_id
    ├── BadRequestError           400, 404, 405, 408, 409, 431
    ├── AuthenticationError       401, 403  a gateway wants another key
    ├── TooLargeError             413  bytes or pixels
    ├── UnsupportedImageError     415  not an image in a supported format
    ├── ImageError                422  damaged image, or a wrong option
    ├── QuotaExceededError        429  this client has too many images in progress
    └── ServerError               5xx
        ├── OverloadedError       503  the server is busy
        └── NotReadyError         503  the server starts or stops, or an engine is down
"""


class ResnetError(Exception):
    """Everything that this SDK raises about the server."""


class ConnectionFailedError(ResnetError):
    """Nothing answered at the URL."""


class TimedOutError(ConnectionFailedError):
    """No answer in time."""


class ResponseError(ResnetError):
    """Something answered, but not a resnet-ensemble server."""


class StatusError(ResnetError):
    """The server answered with a problem.

    - status: the HTTP status
    - code: the server's machine-readable code, such as "corrupt_image"
    - detail: its explanation
    - request_id: what to quote when asking about it
    - retry_after: seconds after which the server expects a retry to succeed, or None
    """

    def __init__(self, status: int, code: str, detail: str, request_id: str, retry_after: float | None) -> None:
        super().__init__(f"{status} {code}: {detail} (request {request_id})")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["StatusError"], tuple[int, str, str, str, float | None]]:
        """To cross processes."""
        return type(self), (self.status, self.code, self.detail, self.request_id, self.retry_after)


class BadRequestError(StatusError):
    """The request is wrong in form, or asks for what the server has not: 400, 404, 405, 408, 409, 431."""


class AuthenticationError(StatusError):
    """401, 403: a gateway wants another key."""


class TooLargeError(StatusError):
    """413: too many bytes or pixels."""


class UnsupportedImageError(StatusError):
    """415: not an image in a supported format."""


class ImageError(StatusError):
    """422: the image is damaged, or an option is wrong."""


class QuotaExceededError(StatusError):
    """429: this client has too many images in progress."""


class ServerError(StatusError):
    """5xx: the server failed."""


class OverloadedError(ServerError):
    """503: the server is busy."""


class NotReadyError(ServerError):
    """503: the server starts or stops, or an engine is down."""


_BY_CODE: dict[str, type[StatusError]] = {"overloaded": OverloadedError, "not_ready": NotReadyError}
_BY_STATUS: dict[int, type[StatusError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    413: TooLargeError,
    415: UnsupportedImageError,
    422: ImageError,
    429: QuotaExceededError,
}


def error_class(status: int, code: str) -> type[StatusError]:
    """The class for a problem of the server."""
    fallback = ServerError if status >= 500 else BadRequestError
    return _BY_CODE.get(code) or _BY_STATUS.get(status, fallback)
