"""Reading the images of a request: a raw body, or the `image` parts of a form."""

from dataclasses import dataclass, field

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.settings import Settings

FIELD = "image"
HINT = (
    "send a form (curl -F image=@cat.jpg) or the image itself "
    "(curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg')"
)
_MAX_PARTS = 2000  # more than any setting makes sense for; beyond it the parser stops


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


async def read(request: Request, settings: Settings) -> Upload:
    """Read and sort a request's body. Raises ApiError."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError("unsupported_media_type", f"the content encoding is {encoding[:100]!r}; send images as they are")
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, settings)
    if content_type in ("", "application/octet-stream") or content_type.startswith("image/"):
        return Upload([await _read_raw(request, settings)], [None])
    raise ApiError("unsupported_media_type", f"the content type is {content_type}; {HINT}")


async def _read_raw(request: Request, settings: Settings) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > settings.max_image_bytes:  # what else comes is not worth keeping
            raise _too_large(len(content), settings)
    return bytes(content)


class _Parser(MultiPartParser):
    """Takes a part for a file also where only its content type says so: RFC 7578 does not ask for a file name.

    And refuses a form that is cut off, of which Starlette's parser leaves out the last part, and says nothing.
    """

    _complete = True

    def on_headers_finished(self) -> None:
        self._complete = False
        part = self._current_part
        disposition = part.content_disposition or b""
        typed = any(name == b"content-type" and not value.startswith(b"text/") for name, value in part.item_headers)
        _, options = parse_options_header(disposition)
        if typed and b"filename" not in options:
            part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()

    def on_end(self) -> None:
        self._complete = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._complete:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("the form is cut off: its last boundary is missing")
        return form


async def _read_form(request: Request, settings: Settings) -> Upload:
    upload = Upload([], [])
    try:
        form = await _Parser(request.headers, request.stream(), max_files=_MAX_PARTS, max_fields=_MAX_PARTS).parse()
    except MultiPartException as error:
        raise ApiError("malformed_request", error.message) from None
    except UnicodeError as error:  # some of the charsets that a stranger can name fail on anything
        raise ApiError("malformed_request", f"the form is not in the charset that it says: {error}") from None
    try:
        for name, value in form.multi_items():
            if name == FIELD and isinstance(value, UploadFile):
                if len(upload.images) == settings.max_images_per_request:
                    raise ApiError(
                        "too_many_images", f"at most {settings.max_images_per_request} images fit into one request"
                    )
                upload.images.append(await _part(value, settings))
                upload.filenames.append(value.filename or None)
            elif name == FIELD:
                raise ApiError("missing_image", f"the part {FIELD} is text, not a file; {HINT}")
            elif isinstance(value, UploadFile):
                raise ApiError("invalid_option", f"no file part is named {name!r}: name it {FIELD!r}; {HINT}")
            elif name in upload.fields:
                raise ApiError("invalid_option", f"{name} is given twice")
            else:
                upload.fields[name] = value
    finally:
        await form.close()
    if not upload.images:
        raise ApiError("missing_image", f"the form has no part {FIELD}; {HINT}")
    return upload


async def _part(part: UploadFile, settings: Settings) -> bytes | ApiError:
    size = part.size or 0  # Starlette has counted what it received
    return await part.read() if size <= settings.max_image_bytes else _too_large(size, settings)


def _too_large(size: int, settings: Settings) -> ApiError:
    return ApiError(
        "image_too_large", f"the image has {size} bytes or more; at most {settings.max_image_bytes} are allowed"
    )
