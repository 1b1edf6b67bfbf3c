"""Pictures for schemathesis (see schemathesis.toml), which knows four of one pixel and otherwise sends random bytes."""

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP", "image/bmp": "BMP"}
MODES = ("RGB", "L", "1", "P")


def encode(format: str, mode: str, width: int, height: int, colour: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (width, height), colour).convert(mode).convert("RGB" if format == "WEBP" else mode).save(
        content, format if (format, mode) != ("JPEG", "P") else "PNG"
    )
    return content.getvalue()


for media_type, format in FORMATS.items():
    side = st.integers(1, 64)
    pictures = st.builds(encode, st.just(format), st.sampled_from(MODES), side, side, st.integers(0, 255))
    schemathesis.openapi.media_type(media_type, pictures)
