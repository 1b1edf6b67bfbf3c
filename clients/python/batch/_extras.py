"""Packages that only some jobs need, imported when they are."""

import importlib
from typing import Any


class MissingExtraError(Exception):
    """A package that this job needs is not installed; the message says how to install it."""


def needed(module: str, what: str, extra: str = "batch") -> Any:
    """The module. Raises MissingExtraError, which says what needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs {error.name}, which is not installed: pip install 'resnet-ensemble[{extra}]'"
        ) from None
