"""Where pictures come from, one after the other: nothing is listed whole, whatever its length.

photos/              every picture in a folder, by its suffix, and in the folders in it
'photos/**/*.jpg'    a pattern: *, ? and [...] within a name, ** for any folders
-                    paths on the standard input, one a line
list.txt             the same, in a file (.lst too)
list.jsonl .csv .tsv .parquet    a path, or bytes, in a column
shard-000000.tar     pictures in an archive, as in WebDataset; .tgz and .tar.gz too
s3://... gs://...    any of these (but -) at any address that fsspec knows
cat.jpg              one picture
"""

import base64
import csv
import fnmatch
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from resnet_ensemble.client.batch._extras import needed
from resnet_ensemble.client.batch._rows import printable

PICTURES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_PARQUET_ROWS = 64  # read at a time: with bytes in a column they are pictures


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

    def read(self) -> bytes:
        """The encoded picture. Raises OSError."""
        if self.problem is not None:
            raise OSError(self.problem)
        if self.content is not None:
            return self.content
        with _open(self.path) as file:
            return file.read()


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a JSONL, CSV or Parquet list. `content` holds bytes (base64 in text); `id` the path."""

    path: str = "path"
    content: str | None = None
    id: str | None = None


PATH_COLUMN = Columns()


class Inputs:
    """The items of the arguments of a command line, in their order.

    - columns: of lists that have columns
    - root: what relative paths in lists begin from; the current folder by default
    - sort: take the names of each folder in order, which holds one folder's names in memory
    """

    def __init__(
        self, arguments: tuple[str, ...], *, columns: Columns = PATH_COLUMN, root: str | None = None, sort: bool = False
    ) -> None:
        self._arguments = arguments
        self._columns = columns
        self._root = root
        self._sort = sort
        self.left_out = 0  # files in folders and archives whose suffix is none of a picture

    def check(self) -> None:
        """Raise InputError for an argument that is nothing here, and MissingExtraError for one that needs a package."""
        for argument in self._arguments:
            local = argument != "-" and "://" not in argument
            if local and not _has_pattern(argument) and not Path(argument).exists():
                raise InputError(f"{argument} is no file or folder here")
            if not local and argument != "-":
                needed("fsspec", argument)
            if argument.endswith(".parquet"):
                needed("pyarrow.parquet", argument)

    def __iter__(self) -> Iterator[Item]:
        for argument in self._arguments:
            yield from self._items(argument)

    def count(self) -> int | None:
        """How many items there are, where that can be told without reading them; else None."""
        total = 0
        for argument in self._arguments:
            unknown = argument == "-" or "://" in argument or argument.endswith(_ARCHIVES)
            if unknown or (argument.endswith(".parquet") and _has_pattern(argument)):
                return None
            total += self._count(argument)
        return total

    def _count(self, argument: str) -> int:
        if argument.endswith(".parquet"):
            parquet = needed("pyarrow.parquet", argument)
            return int(parquet.read_metadata(argument).num_rows)
        counting = Inputs((argument,), columns=self._columns, root=self._root)
        return sum(1 for _ in counting)

    def _items(self, argument: str) -> Iterator[Item]:
        if argument == "-":
            # A file of its own: Python aborts when it ends while a thread still waits in sys.stdin for a line.
            with open(0, "rb", closefd=False) as file:
                yield from self._lines(file, argument)
        elif _has_pattern(argument):
            for path in _matching(argument, self._sort):
                yield from self._file(path)
        elif _is_folder(argument):
            for path in _walk(argument, self._sort):
                if _is_picture(path):
                    yield Item(printable(path), path)
                else:
                    self.left_out += 1
        else:
            yield from self._file(argument)

    def _file(self, path: str) -> Iterator[Item]:
        readers: dict[str, Callable[[BinaryIO, str], Iterator[Item]]] = {
            ".txt": self._lines,
            ".lst": self._lines,
            ".jsonl": self._json,
            ".ndjson": self._json,
            ".csv": self._csv,
            ".tsv": self._csv,
            ".parquet": self._parquet,
            **dict.fromkeys(_ARCHIVES, self._tar),
        }
        for suffix, reader in readers.items():
            if path.lower().endswith(suffix):
                try:
                    with _open(path) as file:
                        yield from reader(file, path)
                except (OSError, UnicodeDecodeError, csv.Error) as error:
                    raise InputError(f"{path} can't be read further: {error}") from error
                return
        yield Item(printable(path), path)

    def _lines(self, file: BinaryIO, _name: str) -> Iterator[Item]:
        for line in file:
            path = os.fsdecode(line.rstrip(b"\r\n"))
            if path:
                yield Item(printable(path), self._rooted(path))

    def _json(self, file: BinaryIO, name: str) -> Iterator[Item]:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{name}:{number}"
                try:
                    yield self._from_record(json.loads(line), where)
                except ValueError as error:
                    yield Item(where, where, problem=f"line {number} is not JSON: {error}")

    def _csv(self, file: BinaryIO, name: str) -> Iterator[Item]:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter="\t" if name.lower().endswith(".tsv") else ",")
            self._check_columns(list(reader.fieldnames or []), name)
            for record in reader:
                yield self._from_record(record, f"{name}:{reader.line_num}")

    def _parquet(self, file: BinaryIO, name: str) -> Iterator[Item]:
        parquet = needed("pyarrow.parquet", name)
        with closing(parquet.ParquetFile(file)) as table:
            present = list(table.schema_arrow.names)
            self._check_columns(present, name)
            wanted = [c for c in (self._columns.id, self._columns.content, self._columns.path) if c in present]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    yield self._from_record(record, f"{name}:{number}")
                    number += 1

    def _tar(self, file: BinaryIO, name: str) -> Iterator[Item]:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header that it has seen
                    if not member.isfile():
                        continue
                    if not _is_picture(member.name):
                        self.left_out += 1
                        continue
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    where = printable(f"{name}/{member.name}")
                    yield Item(where, where, content=content.read())
        except tarfile.TarError as error:
            raise InputError(f"{name} can't be read further: {error}") from error

    def _from_record(self, record: Any, where: str) -> Item:
        """An item from a row of a list; `where` is its id if nothing better is."""
        columns = self._columns
        if not isinstance(record, dict):
            return Item(where, where, problem=f"{where} has no columns")
        path, content = record.get(columns.path), record.get(columns.content) if columns.content else None
        if isinstance(content, dict):  # Hugging Face's images: {"bytes": ..., "path": ...}
            path, content = path or content.get("path"), content.get("bytes")
        id = record.get(columns.id) if columns.id else (path or where)  # noqa: A001  # the field's name
        if id is None:
            return Item(where, where, problem=f"{where} has no value in the column {columns.id}")
        named = printable(str(id))
        if columns.content and content is not None:
            return _with_content(named, printable(str(path or where)), content)
        if not path:
            wanted = " or ".join(filter(None, [columns.content, columns.path]))
            return Item(named, where, problem=f"{where} has no value in the column {wanted}")
        return Item(named, self._rooted(str(path)))

    def _check_columns(self, present: list[str], name: str) -> None:
        wanted = self._columns.content or self._columns.path
        for column in filter(None, [wanted, self._columns.id]):
            if column not in present:
                raise InputError(f"{name} has no column {column}; it has {', '.join(present) or 'none'}")

    def _rooted(self, path: str) -> str:
        if self._root is None or Path(path).is_absolute() or "://" in path:
            return path
        return f"{self._root.rstrip('/')}/{path}"


def _with_content(id: str, path: str, content: str | bytes) -> Item:  # noqa: A002  # the field's name
    if isinstance(content, bytes):
        return Item(id, path, content)
    try:
        return Item(id, path, base64.b64decode(content, validate=True))
    except ValueError as error:
        return Item(id, path, problem=f"the bytes are not base64: {error}")


def _is_picture(path: str) -> bool:
    return path[path.rfind(".") :].lower() in PICTURES


def _has_pattern(path: str) -> bool:
    """Whether it is a pattern; a file that is really named so is not."""
    return any(character in path for character in "*?[") and not ("://" not in path and Path(path).exists())


def _is_folder(path: str) -> bool:
    if "://" not in path:
        return Path(path).is_dir()
    system, root = needed("fsspec", path).core.url_to_fs(path)
    return bool(system.isdir(root))


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return open(path, "rb")
    file: BinaryIO = needed("fsspec", path).open(path, "rb").open()
    return file


def _walk(folder: str, sort: bool) -> Iterator[str]:
    """The files of a folder and of those in it; hidden ones are left out."""
    if "://" in folder:
        yield from _walk_remote(folder, sort)
        return
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        for entry in sorted(visible, key=lambda entry: entry.name) if sort else visible:
            if entry.is_dir():
                yield from _walk(entry.path, sort)
            else:
                yield entry.path


def _walk_remote(folder: str, sort: bool) -> Iterator[str]:
    system, root = needed("fsspec", folder).core.url_to_fs(folder)
    for parent, _, files in system.walk(root):
        for name in sorted(files) if sort else files:
            if name and not name.startswith("."):
                yield system.unstrip_protocol(f"{parent}/{name}")


def _matching(pattern: str, sort: bool) -> Iterator[str]:
    """The files that match a pattern; the folder that the walk begins in is what comes before the first * ? or [."""
    before = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    folder = before[: before.rfind("/") + 1]
    parts = pattern.removeprefix(folder).split("/")
    if folder and "://" not in folder and not Path(folder).is_dir():
        return
    prefix = folder or "./"
    for path in _walk(folder.rstrip("/") or ("/" if folder else "."), sort):
        if matches(path.removeprefix(prefix).split("/"), parts):
            yield path.removeprefix("./") if not folder else path


def matches(path: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern: ** is any number of folders, the others are one name."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(matches(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])
