"""Rows as bytes: JSON lines, or Parquet where pyarrow is installed."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from resnet_ensemble.client.batch._extras import needed
from resnet_ensemble.client.batch._rows import Row

_GROUP = 10_000  # rows in a row group of Parquet, about 10 MB in memory; shards may be smaller


class Format(Protocol):
    """How rows are kept in a file."""

    suffix: str

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        """Write a whole file."""

    def read(self, path: Path, columns: list[str] | None = None) -> Iterator[Row]:
        """The rows of a file, little by little; of `columns` only, where that saves reading."""

    def join(self, paths: list[Path], file: BinaryIO) -> None:
        """Write the rows of several files into one."""


class JsonLines:
    """One JSON object a line."""

    suffix = ".jsonl"

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        """Write a whole file."""
        file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for row in rows)

    def read(self, path: Path, columns: list[str] | None = None) -> Iterator[Row]:  # noqa: ARG002  # a line is read whole
        """The rows of a file, little by little."""
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def join(self, paths: list[Path], file: BinaryIO) -> None:
        """Write the rows of several files into one."""
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)


class Parquet:
    """Parquet with Zstandard."""

    suffix = ".parquet"

    def __init__(self) -> None:
        self._arrow: Any = needed("pyarrow", "Parquet")
        self._parquet: Any = needed("pyarrow.parquet", "Parquet")
        self._schema = _schema(self._arrow)

    def write(self, rows: Iterable[Row], file: BinaryIO) -> None:
        """Write a whole file."""
        with self._writer(file) as writer:
            for chunk in _chunks(rows, _GROUP):
                writer.write_table(self._arrow.Table.from_pylist(chunk, schema=self._schema))

    def read(self, path: Path, columns: list[str] | None = None) -> Iterator[Row]:
        """The rows of a file, little by little."""
        with self._parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_GROUP, columns=columns):
                yield from batch.to_pylist()

    def join(self, paths: list[Path], file: BinaryIO) -> None:
        """Write the rows of several files into one."""
        with self._writer(file) as writer:
            held: list[Any] = []
            for batch in self._batches(paths):
                held.append(batch)
                if sum(len(one) for one in held) >= _GROUP:
                    writer.write_table(self._arrow.Table.from_batches(held))
                    held = []
            if held:
                writer.write_table(self._arrow.Table.from_batches(held))

    def _batches(self, paths: list[Path]) -> Iterator[Any]:
        for path in paths:
            with self._parquet.ParquetFile(path) as part:
                yield from part.iter_batches(batch_size=_GROUP)

    def _writer(self, file: BinaryIO) -> Any:
        return self._parquet.ParquetWriter(file, self._schema, compression="zstd")


FORMATS: dict[str, Callable[[], Format]] = {"jsonl": JsonLines, "parquet": Parquet}


def _schema(arrow: Any) -> Any:
    one = [("label", arrow.string()), ("index", arrow.int32()), ("probability", arrow.float64())]
    answer = [*one, ("confidence", arrow.float64())]
    return arrow.schema(
        [
            ("id", arrow.string()),
            ("path", arrow.string()),
            ("sha256", arrow.string()),
            *answer,
            ("top", arrow.list_(arrow.struct(answer))),
            ("members", arrow.list_(arrow.struct([("member", arrow.string()), *one, ("views", arrow.int32())]))),
            ("entropy", arrow.float64()),
            ("mutual_information", arrow.float64()),
            ("protocol", arrow.string()),
            ("stop_rule", arrow.string()),
            ("certain", arrow.bool_()),
            ("views_used", arrow.int32()),
            ("views_planned", arrow.int32()),
            ("bundle", arrow.string()),
            ("latency_ms", arrow.float64()),
            ("error_code", arrow.string()),
            ("error_message", arrow.string()),
        ]
    )


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
