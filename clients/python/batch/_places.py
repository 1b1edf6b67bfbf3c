"""Files, folders, patterns and addresses: what is there, one after the other, and its bytes.

Addresses are what fsspec knows. Nothing is listed whole, whatever its length.
"""

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from resnet_ensemble.client.batch._extras import MissingExtraError, needed
from resnet_ensemble.client.batch._rows import printable


class InputError(Exception):
    """The inputs can't be read, or no further; the message says why."""


@dataclass(frozen=True)
class Item:
    """One input.

    - id: what its row is known by
    - path: where it is, to read it and for its row
    - content: its bytes, where they came with the list
    - problem: why it can't be read, where that is known already
    """

    id: str
    path: str
    content: bytes | None = None
    problem: str | None = None

    def read(self, most: int = -1) -> bytes:
        """The encoded picture, of a file no more than `most` bytes. Raises OSError."""
        if self.problem is not None:
            raise OSError(self.problem)
        if self.content is not None:
            return self.content
        if "://" not in self.path and may_wait(self.path):
            raise OSError(f"{printable(self.path)} is no file: it may give nothing for ever")
        with open_file(self.path) as file:
            try:
                return file.read(most)
            except Exception as error:
                raise _as_os_error(self.path, error) from error


def has_pattern(path: str) -> bool:
    """Whether it is a pattern; a file that is really named so is not."""
    if path.startswith(("http://", "https://")):  # there ? begins a query, and a host may be an address in brackets
        return any(character in "/".join(path.partition("?")[0].split("/")[3:]) for character in "*[")
    return any(character in path for character in "*?[") and not ("://" not in path and Path(path).exists())


def fixed_folder(pattern: str) -> str:
    """The folder that a pattern's walk begins in, with its slash: what comes before the first * ? or [."""
    before = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return before[: before.rfind("/") + 1]


def is_folder(path: str) -> bool:
    if "://" not in path:
        return Path(path).is_dir()
    system, root = driver(path)
    try:
        return bool(system.isdir(root))
    except Exception as error:
        raise InputError(f"{path} can't be read: {error}") from error


def driver(address: str) -> tuple[Any, str]:
    """What reads an address, and the path in it. Raises MissingExtraError and InputError."""
    fsspec = needed("fsspec", address)
    try:
        system, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingExtraError(f"{address} needs a package that is not installed: {error}") from None
    except Exception as error:
        raise InputError(f"{address} is no address that fsspec can read: {error}") from error
    return system, root


def may_wait(path: str) -> bool:
    """Whether it is a pipe, a terminal or the like; of what can't be looked at, opening it tells."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_file(path: str) -> BinaryIO:
    """A file, or what an address has. Raises OSError and MissingExtraError."""
    try:
        if "://" not in path:
            return open(path, "rb")
        file: BinaryIO = needed("fsspec", path).open(path, "rb").open()
        return file
    except (MissingExtraError, OSError):
        raise
    except ImportError as error:
        raise MissingExtraError(f"{path} needs a package that is not installed: {error}") from None
    except Exception as error:
        raise _as_os_error(path, error) from error


def _as_os_error(path: str, error: Exception) -> OSError:
    """A NUL in a name is a ValueError, and what a driver of fsspec raises is its own affair."""
    return error if isinstance(error, OSError) else OSError(f"{printable(path)}: {type(error).__name__}: {error}")


def walk(
    folder: str,
    sort: bool,
    enters: Callable[[str], bool] = lambda _: True,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[Item]:
    """The files of a folder and of those in it, and folders that can't be read; what is hidden is left out.

    - enters: whether a folder in it is read; what a store has is not asked
    - above: device and inode of the folders that it is in; a link to one of them leads nowhere new
    """
    if "://" in folder:
        yield from _walk_remote(folder, sort, None)
        return
    try:
        status, entries = Path(folder).stat(), os.scandir(folder)
    except OSError as error:
        yield Item(printable(folder), folder, problem=str(error))
        return
    with entries:
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        # Names only, folders with a slash: in order they are all in memory, and a million of them take 80 MB.
        names = (name for name in map(_named, entries) if name)
        for name in sorted(names) if sort else names:
            path = f"{folder.rstrip('/')}/{name}"
            if not name.endswith("/"):
                yield Item(printable(path), path)
            elif enters(path[:-1]):
                yield from walk(path[:-1], sort, enters, above | {identity})


def _named(entry: os.DirEntry[str]) -> str:
    """The name of a file, or of a folder with a slash; nothing for what is hidden, and for pipes and the like."""
    if entry.name.startswith("."):
        return ""
    try:
        if entry.is_dir():
            return f"{entry.name}/"
        return entry.name if entry.is_file() or entry.is_symlink() else ""
    except OSError:  # links in a circle: reading it tells
        return entry.name


def _walk_remote(folder: str, sort: bool, depth: int | None) -> Iterator[Item]:
    system, root = driver(folder)
    try:
        for parent, _, files in system.walk(root, maxdepth=depth, on_error="raise"):
            hidden = "/." in parent.removeprefix(root)
            for name in sorted(files) if sort else files:
                if name and not name.startswith(".") and not hidden:
                    path = system.unstrip_protocol(f"{parent}/{name}")
                    yield Item(printable(path), path)
    except Exception as error:
        raise InputError(f"{folder} can't be read further: {error}") from error


def matching(pattern: str, sort: bool) -> Iterator[Item]:
    """The files that match a pattern."""
    folder = fixed_folder(pattern)
    # Here several slashes are one; in the keys of a store they are not.
    parts = re.split("/" if "://" in pattern else "/+", pattern.removeprefix(folder))
    if folder and "://" not in folder and not Path(folder).is_dir():
        return
    prefix = f"{folder.rstrip('/')}/" if folder else "./"
    if "://" in folder:  # as the driver writes it: memory://a is memory:///a
        system, root = driver(folder)
        prefix = f"{system.unstrip_protocol(root).rstrip('/')}/"
        found = _walk_remote(folder.rstrip("/"), sort, None if "**" in parts else len(parts))
    else:
        begin = folder.rstrip("/") or ("/" if folder else ".")
        found = walk(begin, sort, lambda path: may_hold(path.removeprefix(prefix).split("/"), parts))
    for item in found:
        if item.problem is None and not matches(item.path.removeprefix(prefix).split("/"), parts):
            continue
        path = item.path if folder else item.path.removeprefix("./")
        yield replace(item, id=printable(path), path=path)


def matches(path: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern: ** is any number of folders, the others are one name."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(matches(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def may_hold(path: list[str], pattern: list[str]) -> bool:
    """Whether something in the folder with these parts, or in those in it, can match a pattern."""
    if not path or not pattern or pattern[0] == "**":
        return bool(pattern)
    return fnmatch.fnmatchcase(path[0], pattern[0]) and may_hold(path[1:], pattern[1:])
