"""JSON files that carry the hash of their content, so that a changed byte is noticed and never used."""

import hashlib
import json
from typing import Any

KEY = "sha256"


class SealBroken(ValueError):
    """The content is not what was written."""


def dumps(content: dict[str, Any]) -> bytes:
    """The content as JSON, its hash on a line of its own at the beginning."""
    return f"{json.dumps({KEY: digest(content)} | content, indent=1, ensure_ascii=False)}\n".encode()


def loads(text: bytes) -> Any:
    """The content, without its hash. What has no hash is taken as it is. Raises ValueError, SealBroken."""
    content = json.loads(text)
    if isinstance(content, dict) and content.pop(KEY, None) not in (None, digest(content)):
        raise SealBroken
    return content


def digest(content: dict[str, Any]) -> str:
    """A SHA-256 of what the JSON means, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
