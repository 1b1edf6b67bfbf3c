"""The rows of a job: one for each input, whatever became of it."""

from typing import Any, TypeAlias

from resnet_ensemble.client._errors import ResnetError, ServerError, StatusError, TimedOutError
from resnet_ensemble.client._types import Prediction

Row: TypeAlias = dict[str, Any]

# Codes of failures that no server told; a StatusError brings the server's.
UNREADABLE = "unreadable"
TOO_LARGE = "image_too_large"  # the server's own word
TIMED_OUT = "timed_out"
CONNECTION_LOST = "connection_lost"

_FROM_PREDICTION = (
    "label", "index", "probability", "confidence", "top", "members", "entropy", "mutual_information", "protocol",
    "stop_rule", "certain", "views_used", "views_planned", "bundle",
)  # fmt: skip
COLUMNS = ("id", "path", "sha256", *_FROM_PREDICTION, "latency_ms", "error_code", "error_message")


def printable(text: str) -> str:
    """A path or a message as UTF-8 can hold it: bytes of a file name that are none become backslash escapes."""
    try:
        name = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell; no file has that name
        name = text.encode("utf-8", "surrogatepass")
    return name.decode("utf-8", "backslashreplace")


def of_prediction(id: str, path: str, sha256: str, prediction: Prediction, latency_ms: float) -> Row:  # noqa: A002
    """The row of a picture that was classified."""
    answer = {name: getattr(prediction, name) for name in _FROM_PREDICTION}
    answer["top"] = [dict(vars(entry)) for entry in prediction.top]
    answer["members"] = [dict(vars(vote)) for vote in prediction.members]
    given = {"id": id, "path": path, "sha256": sha256, **answer, "latency_ms": round(latency_ms, 3)}
    return {name: given.get(name) for name in COLUMNS}


def of_error(id: str, path: str, sha256: str | None, code: str, message: str) -> Row:  # noqa: A002
    """The row of an input that has no prediction."""
    told = {"error_code": printable(code), "error_message": printable(message)}
    given = {"id": id, "path": path, "sha256": sha256, **told}
    return {name: given.get(name) for name in COLUMNS}


def error_code(error: ResnetError) -> str:
    """The server's code, or ours for what no server told."""
    if isinstance(error, StatusError):
        return error.code
    return TIMED_OUT if isinstance(error, TimedOutError) else CONNECTION_LOST


def error_message(error: ResnetError) -> str:
    """What the server said; of its own failures with the request's id, which its log has too."""
    return error.detail if isinstance(error, StatusError) and not isinstance(error, ServerError) else str(error)
