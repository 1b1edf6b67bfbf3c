"""The images of a request: a raw body, or the `image` parts of a form, sorted while they arrive."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import multipart

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.settings import Settings

FIELD = "image"
HINT = (
    "send a form (curl -F image=@cat.jpg) or the image itself "
    "(curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg')"
)
_MAX_PARTS = 2000  # more than any setting allows; beyond it the parser stops
_MAX_FIELD_BYTES = 2**16


@dataclass(frozen=True)
class Upload:
    """What a request brought.

    - images: encoded bytes, or the error that only this image has, in the order of the request
    - filenames: as sent, one an image; None where it has none
    - fields: the form's other fields
    """

    images: list[bytes | ApiError]
    filenames: list[str | None]
    fields: dict[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """Takes a body as it arrives. Both raise ApiError."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""

    def end(self) -> Upload:
        """There are no more."""


def reader(headers: Mapping[bytes, bytes], settings: Settings) -> Reader:
    """For a body with these headers, by name in lower case. Raises ApiError."""
    encoding = _of(headers, b"content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError("unsupported_media_type", f"the content encoding is {encoding[:100]!r}; send images as they are")
    given = _of(headers, b"content-type", "")
    content_type = given.split(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return _Form(given, settings)
    if content_type in ("", "application/octet-stream") or content_type.startswith("image/"):
        return _Raw(settings)
    raise ApiError("unsupported_media_type", f"the content type is {content_type}; {HINT}")


def _of(headers: Mapping[bytes, bytes], name: bytes, default: str) -> str:
    value = headers.get(name)
    return default if value is None else value.decode("latin-1")


class _Raw:
    """A body that is one image."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._chunks: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > self._settings.max_image_bytes:  # what else comes is not worth keeping
            raise _too_large(self._size, self._settings)

    def end(self) -> Upload:
        content = b"".join(self._chunks)
        self._chunks.clear()
        return Upload([content], [None])


class _Form:
    """Sorts the parts of a form. A part is a file if it has a file name or is of a type that is no text.

    RFC 7578 does not ask for a file name.
    """

    def __init__(self, content_type: str, settings: Settings) -> None:
        self._upload = Upload([], [])
        self._settings = settings
        self._part: multipart.MultipartSegment | None = None
        self._limit = 0
        self._content: list[bytes] = []
        _, options = multipart.parse_options_header(content_type)
        try:
            # Headers are UTF-8, which the parser would insist on; what is not is no reason to refuse a picture.
            self._parser = multipart.PushMultipartParser(
                options.get("boundary", ""), max_segment_count=_MAX_PARTS, header_charset="latin-1"
            )
        except multipart.MultipartError as error:
            raise _unreadable(error) from None

    def feed(self, chunk: bytes) -> None:
        if not chunk:  # the parser would take it for the end
            return
        try:
            for event in self._parser.parse(chunk):
                self._take(event)
        except multipart.MultipartError as error:
            raise _unreadable(error) from None

    def end(self) -> Upload:
        try:
            self._parser.close()
        except multipart.MultipartError:
            raise ApiError("malformed_request", "the form is cut off: its last boundary is missing") from None
        if not self._upload.images:
            raise ApiError("missing_image", f"the form has no part {FIELD}; {HINT}")
        return self._upload

    def _take(self, event: multipart.MultipartSegment | bytes | None) -> None:
        """What the parser has found: a part's head, some of its content, or its end. Raises ApiError."""
        if isinstance(event, multipart.MultipartSegment):
            self._part, self._content = event, []
            self._limit = self._begin(event)
            return
        assert self._part is not None
        if event is None:
            content = b"".join(self._content)
            self._content.clear()
            self._end(self._part, content)
        elif self._part.bytes_received <= self._limit:  # what else comes is not worth keeping
            self._content.append(event)

    def _begin(self, part: multipart.MultipartSegment) -> int:
        """How many bytes of its content are of use."""
        name, settings = _text(part.name), self._settings
        if name == FIELD and not _is_file(part):
            raise ApiError("missing_image", f"the part {FIELD} is text, not a file; {HINT}")
        if name == FIELD:
            if len(self._upload.images) == settings.max_images_per_request:
                raise ApiError(
                    "too_many_images", f"at most {settings.max_images_per_request} images fit into one request"
                )
            return settings.max_image_bytes
        if _is_file(part):
            raise ApiError("invalid_option", f"no file part is named {name!r}: name it {FIELD!r}; {HINT}")
        if name in self._upload.fields:
            raise ApiError("invalid_option", f"{name} is given twice")
        return _MAX_FIELD_BYTES

    def _end(self, part: multipart.MultipartSegment, content: bytes) -> None:
        name = _text(part.name)
        if name == FIELD:
            large = part.size > self._limit
            self._upload.images.append(_too_large(part.size, self._settings) if large else content)
            self._upload.filenames.append(_text(part.filename) or None)
        elif part.size > self._limit:
            raise ApiError(
                "invalid_option", f"{name[:100]!r} has {part.size} bytes; at most {_MAX_FIELD_BYTES} are read"
            )
        else:
            self._upload.fields[name] = content.decode(errors="replace")


def _is_file(part: multipart.MultipartSegment) -> bool:
    # Some write only filename*, which RFC 7578 forbids and the parser does not read, where a name is not ASCII.
    named = part.filename is not None or "filename*=" in (part.header("Content-Disposition") or "").lower()
    return named or not (part.content_type or "text/plain").startswith("text/")


def _text(header: str | None) -> str:
    """Of a header that was read as Latin-1."""
    return (header or "").encode("latin-1").decode(errors="replace")


def _unreadable(error: multipart.MultipartError) -> ApiError:
    return ApiError("malformed_request", f"the form can't be read: {error}")


def _too_large(size: int, settings: Settings) -> ApiError:
    return ApiError(
        "image_too_large", f"the image has {size} bytes or more; at most {settings.max_image_bytes} are allowed"
    )
