"""Where pictures come from: the arguments of a job, and the lists and archives that they name.

photos/              every picture in a folder, by its suffix, and in the folders in it
'photos/**/*.jpg'    a pattern: *, ? and [...] within a name, ** for any folders
-                    paths on the standard input, one a line
list.txt             the same, in a file (.lst too)
list.jsonl .csv .tsv .parquet    a path, or bytes, in a column
list.txt.gz          lists of text may be compressed
shard-000000.tar     pictures in an archive, as in WebDataset; .tgz and .tar.gz too
s3://... gs://...    any of these (but -) at any address that fsspec knows
cat.jpg              one picture
"""

import base64
import codecs
import csv
import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from resnet_ensemble.client.batch._extras import needed
from resnet_ensemble.client.batch._places import (
    InputError,
    Item,
    driver,
    fixed_folder,
    has_pattern,
    is_folder,
    matching,
    may_wait,
    open_file,
    walk,
)
from resnet_ensemble.client.batch._rows import printable

PICTURES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_TEXTS = (".txt", ".lst", ".jsonl", ".ndjson", ".csv", ".tsv")
_LISTS = (*_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS), ".parquet", *_ARCHIVES)
_PARQUET_ROWS = 64  # read at a time: with bytes in a column they are pictures
_PARQUET_BUFFER = 2**20  # bytes of a column that are read at a time
_FIELD = 2**28  # characters in a field of a CSV list, which may be a picture; Python's own limit is 131,072


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a JSONL, CSV or Parquet list. `content` holds bytes (base64 in text).

    `id`: what rows are known by; by default the path, or the list and the row's number where the bytes are in the list
    """

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
        self.most_bytes: int | None = None  # of a picture; of a larger one in an archive, only one byte more is read

    def check(self) -> None:
        """Raise InputError for an argument that is nothing here, and MissingExtraError for one that needs a package."""
        for argument in self._arguments:
            local = argument != "-" and "://" not in argument
            if local and has_pattern(argument):
                folder = fixed_folder(argument)
                if folder and not Path(folder).is_dir():
                    raise InputError(f"{argument} matches nothing: {folder} is no folder here")
            elif local and not Path(argument).exists():
                raise InputError(f"{argument} is no file or folder here")
            if not local and argument != "-":
                driver(argument)
            if argument.endswith(".parquet"):
                needed("pyarrow.parquet", argument)

    def __iter__(self) -> Iterator[Item]:
        for argument in self._arguments:
            yield from self._items(argument)

    def count(self) -> int | None:
        """How many items there are, where that can be told without reading them; else None."""
        total = 0
        for argument in self._arguments:
            unknown = argument == "-" or "://" in argument or argument.lower().endswith(_ARCHIVES)
            # With pictures in a list of text, counting would read all of them.
            unknown |= self._columns.content is not None and not argument.endswith(".parquet")
            unknown |= may_wait(argument)  # a pipe gives each line once, and that is for the job
            if unknown or (argument.endswith(".parquet") and has_pattern(argument)):
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
        elif has_pattern(argument):
            named = argument.lower().endswith(_LISTS)
            for item in matching(argument, self._sort):
                if item.problem is not None:
                    yield item
                elif named or not item.path.lower().endswith(_LISTS):
                    yield from self._file(item.path)
                else:
                    self.left_out += 1
        elif is_folder(argument):
            for item in walk(argument, self._sort):
                if item.problem is not None or _is_picture(item.path):
                    yield item
                else:
                    self.left_out += 1
        else:
            yield from self._file(argument)

    def _file(self, path: str) -> Iterator[Item]:
        name = path.lower()
        if not name.endswith(_LISTS):
            yield Item(printable(path), path)
            return
        readers: dict[str, Callable[[BinaryIO, str], Iterator[Item]]] = {
            ".txt": self._lines,
            ".lst": self._lines,
            ".jsonl": self._json,
            ".ndjson": self._json,
            ".csv": self._csv,
            ".tsv": self._csv,
            ".parquet": self._parquet,
        }
        try:
            with open_file(path) as file:
                if name.endswith(_ARCHIVES):
                    yield from self._tar(file, path)
                else:
                    plain: Any = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
                    list_name = name.removesuffix(".gz")
                    yield from readers[list_name[list_name.rfind(".") :]](plain, path)
        # Arrow's errors are ValueErrors; a compressed list that was cut off is an EOFError.
        except (OSError, ValueError, EOFError, zlib.error, csv.Error, tarfile.TarError) as error:
            raise InputError(f"{path} can't be read further: {error}") from error

    def _lines(self, file: BinaryIO, _name: str) -> Iterator[Item]:
        for number, line in enumerate(file):
            path = os.fsdecode((line if number else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\r\n"))
            if path:
                yield Item(printable(path), self._rooted(path))

    def _json(self, file: BinaryIO, name: str) -> Iterator[Item]:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = printable(f"{name}:{number}")
                try:
                    yield self._from_record(json.loads(line), where)
                except (ValueError, RecursionError) as error:
                    yield Item(where, where, problem=f"line {number} is not JSON: {error}")

    def _csv(self, file: BinaryIO, name: str) -> Iterator[Item]:
        csv.field_size_limit(_FIELD)
        # What is not UTF-8 stays in a path as it is on the disk, as in a list of lines.
        with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, delimiter="\t" if ".tsv" in name[-len(".tsv.gz") :].lower() else ",")
            self._check_columns(list(reader.fieldnames or []), name)
            for record in reader:
                yield self._from_record(record, printable(f"{name}:{reader.line_num}"))

    def _parquet(self, file: BinaryIO, name: str) -> Iterator[Item]:
        parquet = needed("pyarrow.parquet", name)
        # Without a buffer Arrow reads a row group whole, and many files of pictures are a single one.
        with closing(parquet.ParquetFile(file, pre_buffer=False, buffer_size=_PARQUET_BUFFER)) as table:
            present = list(table.schema_arrow.names)
            self._check_columns(present, name)
            wanted = [c for c in (self._columns.id, self._columns.content, self._columns.path) if c in present]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    yield self._from_record(record, printable(f"{name}:{number}"))
                    number += 1

    def _tar(self, file: BinaryIO, name: str) -> Iterator[Item]:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header that it has seen
                link = member.islnk() or member.issym()
                if not (member.isfile() or link):
                    continue
                if not _is_picture(member.name):
                    self.left_out += 1
                    continue
                where = printable(f"{name}/{member.name}")
                if link:  # what it leads to has gone by, or comes later: an archive is read as a stream
                    yield Item(where, where, problem=f"it is a link to {printable(member.linkname)} in an archive")
                    continue
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                yield Item(where, where, content=content.read(-1 if self.most_bytes is None else self.most_bytes + 1))

    def _from_record(self, record: Any, where: str) -> Item:
        """An item from a row of a list; `where` is its id if nothing better is."""
        columns = self._columns
        if not isinstance(record, dict):
            return Item(where, where, problem=f"{where} has no columns")
        path, content = record.get(columns.path), record.get(columns.content) if columns.content else None
        if isinstance(content, dict):  # Hugging Face's images: {"bytes": ..., "path": ...}
            path, content = path or content.get("path"), content.get("bytes")
        # Pictures that came with the list may share a name: of Hugging Face's images it has no folder.
        named_by = path if path and content is None else where
        id = record.get(columns.id) if columns.id else named_by  # noqa: A001  # the field's name
        if id is None or id == "":  # a cell of a CSV is never None
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


class _Header(tarfile.TarInfo):
    """A header that is none ends an archive with an error, and so does a file that ends before the archive does.

    tarfile takes all but the first for the archive's end.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile, /) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # not in the stubs
            cut = f"cut off at byte {tarfile_.offset}: no zero bytes end it; if nothing is missing, add 1,024 of them"
            raise tarfile.ReadError(cut) from error
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged at byte {tarfile_.offset}: {error}") from error


def _with_content(id: str, path: str, content: object) -> Item:  # noqa: A002  # the field's name
    if isinstance(content, bytes):
        return Item(id, path, content)
    if not isinstance(content, str):
        return Item(id, path, problem=f"the bytes are {type(content).__name__}; they must be bytes, or base64 in text")
    try:
        return Item(id, path, base64.b64decode(content, validate=True))
    except ValueError as error:
        return Item(id, path, problem=f"the bytes are not base64: {error}")


def _is_picture(path: str) -> bool:
    return path[path.rfind(".") :].lower() in PICTURES
