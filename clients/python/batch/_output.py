"""Exactly one row for each input, whenever a job is killed.

A shard is written aside, flushed, renamed to its name, and then told in one line of the ledger: what the ledger tells
is live, and nothing else is. A shard without its line is removed at the next start and its inputs are done again; a
line that was cut off is no line.

    OUT/_ledger               {"format": 1, "configuration": {...}}
                              {"shard": "part-000000.jsonl", "rows": 1000, "errors": 2, "bytes": 812345, "replaces": []}
    OUT/part-000000.jsonl
    OUT/part-000001-kept.jsonl    the rows of part-000001.jsonl without the errors among them, which are done again

A job with one output file keeps its shards in OUT.jsonl.shards and joins them when it has finished. There the line
comes first: the joined file is whole by then, and a rename that did not happen is made up for at the next start.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from resnet_ensemble.client.batch._disk import Disk
from resnet_ensemble.client.batch._formats import FORMATS
from resnet_ensemble.client.batch._rows import Row

LEDGER = "_ledger"
VERSION = 1
_SHARD = re.compile(r"part-(\d{6,})(-kept)?\.(jsonl|parquet)")
_ASIDE = "_aside.tmp"
_JOINED = "_joined.tmp"


class OutputError(Exception):
    """The output can't be used for this job; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. `shard`: the file's name, or None where rows were only taken away."""

    shard: str | None
    rows: int
    errors: int
    bytes: int
    replaces: tuple[str, ...] = ()


def live(entries: list[Entry]) -> list[Entry]:
    """The entries whose rows count, oldest first; one that replaces others is where the first of them was."""
    kept: dict[str, tuple[int, Entry]] = {}
    for number, entry in enumerate(entries):
        places = [kept.pop(name)[0] for name in entry.replaces if name in kept]
        if entry.shard is not None:
            kept[entry.shard] = (min(places, default=number), entry)
    return [entry for _, entry in sorted(kept.values(), key=lambda placed: placed[0])]


def parse_ledger(content: bytes) -> tuple[dict[str, Any], list[Entry]]:
    """The configuration and the entries of a ledger; a last line that was cut off is left out. Raises OutputError."""
    complete = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        header, *lines = [json.loads(line) for line in complete]
        if header["format"] != VERSION:
            raise OutputError(f"the ledger has format {header['format']!r}; this version reads {VERSION}")
        return header["configuration"], [Entry(**{**line, "replaces": tuple(line["replaces"])}) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"the ledger is damaged ({error}); use another output, or remove this one") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configurations: "protocol: flip → 10crop"."""
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{name}: {_short(old.get(name))} → {_short(new.get(name))}" for name in names if old.get(name) != new.get(name)
    ]


def _short(value: object) -> str:
    text = str(value)  # the inputs may be thousands of names
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text):,} characters)"


def form_of(target: Path, form: str) -> str:
    """The format of an output: what its name says if it is one file, and else what is asked for."""
    suffix = target.suffix.removeprefix(".")
    return suffix if suffix in FORMATS else form


class Output:
    """The rows of one job on the disk; at first nothing is touched. Use it in a `with` block, or call `close`.

    - target: a file that ends in .jsonl or .parquet, or a folder for shards of the format `form`
    """

    def __init__(self, target: Path, *, form: str = "jsonl", disk: Disk | None = None) -> None:
        one_file = target.suffix.removeprefix(".") in FORMATS
        self._target = target
        self._folder = target.with_name(f"{target.name}.shards") if one_file else target
        self._format = FORMATS[form_of(target, form)]()
        self._disk = disk or Disk()
        self._entries: list[Entry] = []
        self._lock: int | None = None

    def look(self) -> dict[str, Any] | None:
        """The configuration of what is there, and know its rows; None if nothing was begun. Raises OutputError."""
        ledger = self._folder / LEDGER
        if not ledger.exists():
            return None
        configuration, self._entries = parse_ledger(ledger.read_bytes())
        return configuration

    def begin(self, configuration: Mapping[str, Any], *, force: bool = False) -> str | None:
        """Begin, or resume what was begun with the same configuration; no other process may until `close`.

        - force: begin again when the configuration changed, without the rows that there are; where there are none,
          that needs no force

        Returns what was taken away, or None. Raises OutputError.
        """
        ledger = self._folder / LEDGER
        if not ledger.exists():
            self._refuse_what_is_not_ours()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._folder)
        plain = json.loads(json.dumps(configuration))  # as it is when it is read again
        try:
            lost = None
            if ledger.exists():
                changed = self._resume(ledger, plain, force)
                if not changed:
                    return None
                lost = f"{self.rows:,} rows are taken away ({changed})"
                if self._target != self._folder:
                    self._disk.remove(self._target)  # nobody shall take it for what is begun now
            header = json.dumps({"format": VERSION, "configuration": plain})
            self._write_ledger(header.encode() + b"\n")
            self._entries = []
            self._remove_what_is_not_live()
            return lost
        except BaseException:
            self.close()
            raise

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(entry.rows for entry in live(self._entries))

    @property
    def errors(self) -> int:
        """How many of them are errors."""
        return sum(entry.errors for entry in live(self._entries))

    def files(self) -> list[Path]:
        """The files that hold the rows."""
        return [self._path(str(entry.shard)) for entry in live(self._entries)]

    def ids(self) -> Iterator[str]:
        """The ids of every row, little by little."""
        for path in self.files():
            yield from (row["id"] for row in self._format.read(path, ["id"]))

    def commit(self, rows: list[Row]) -> None:
        """Add a shard."""
        if rows:
            errors = sum(row["error_code"] is not None for row in rows)
            self._commit(self._next_name(), iter(rows), len(rows), errors, ())

    def drop_errors(self) -> int:
        """Take the error rows away, so that their inputs are done again. Returns how many there were."""
        dropped = 0
        for entry in live(self._entries):
            if entry.errors and entry.shard is not None:
                dropped += entry.errors
                if entry.rows == entry.errors:
                    self._append(Entry(None, 0, 0, 0, (entry.shard,)))
                else:
                    kept = (row for row in self._format.read(self._path(entry.shard)) if row["error_code"] is None)
                    shard = _SHARD.fullmatch(entry.shard)
                    # In a folder the order of the rows is that of the names.
                    name = f"part-{shard[1]}-kept{self._format.suffix}" if shard else self._next_name()
                    name = self._next_name() if name == self._target.name else name
                    self._commit(name, kept, entry.rows - entry.errors, 0, (entry.shard,))
        self._remove_what_is_not_live()
        return dropped

    def finish(self) -> None:
        """Join the shards, where the output is one file."""
        entries = live(self._entries)
        name = self._target.name
        if self._target == self._folder or [entry.shard for entry in entries] == [name]:
            return
        aside = self._folder / _JOINED
        size = self._disk.write(aside, lambda file: self._format.join(self.files(), file))
        replaced = tuple(str(entry.shard) for entry in entries)
        self._append(Entry(name, self.rows, self.errors, size, replaced))
        self._disk.rename(aside, self._target)
        self._remove_what_is_not_live()

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _resume(self, ledger: Path, configuration: dict[str, Any], force: bool) -> str:
        """Take up what there is, or say what changed, so that it is to be begun again."""
        content = ledger.read_bytes()
        old, self._entries = parse_ledger(content)
        changed = "; ".join(differences(old, configuration))
        if changed and (force or not self.rows):
            return changed
        if changed:
            raise OutputError(
                f"{self._target} was begun otherwise ({changed}): use another output, or --force to "
                f"begin again without its {self.rows:,} rows"
            )
        if not content.endswith(b"\n"):
            self._write_ledger(content[: content.rfind(b"\n") + 1])
        self._finish_rename()
        self._check_files()
        self._remove_what_is_not_live()
        return ""

    def _refuse_what_is_not_ours(self) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"{self._folder} is a file; an output is a folder, or a file named .jsonl or .parquet")
        ours = [self._target] if self._target != self._folder else list(self._shards())
        for file in ours:
            if file.exists():
                raise OutputError(f"{file} exists, but no {LEDGER} in {self._folder}: move it, or use another output")

    def _finish_rename(self) -> None:
        aside = self._folder / _JOINED
        last = self._entries[-1] if self._entries else None
        if aside.exists() and last and last.shard == self._target.name and aside.stat().st_size == last.bytes:
            self._disk.rename(aside, self._target)

    def _check_files(self) -> None:
        for entry in live(self._entries):
            path = self._path(str(entry.shard))
            size = path.stat().st_size if path.exists() else None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
                raise OutputError(f"{path} {found}; restore it, or remove {self._folder} to begin again")

    def _remove_what_is_not_live(self) -> None:
        names = {entry.shard for entry in live(self._entries)}
        for path in [*self._shards(), self._folder / _ASIDE, self._folder / _JOINED]:
            if path.name not in names:
                self._disk.remove(path)

    def _shards(self) -> Iterator[Path]:
        if self._folder.is_dir():
            yield from (path for path in sorted(self._folder.iterdir()) if _SHARD.fullmatch(path.name))

    def _commit(self, name: str, rows: Iterator[Row], count: int, errors: int, replaces: tuple[str, ...]) -> None:
        aside = self._folder / _ASIDE
        size = self._disk.write(aside, lambda file: self._format.write(rows, file))
        self._disk.rename(aside, self._folder / name)
        self._append(Entry(name, count, errors, size, replaces))

    def _next_name(self) -> str:
        names = [entry.shard for entry in self._entries if entry.shard]
        number = 1 + max((int(found[1]) for found in map(_SHARD.fullmatch, names) if found), default=-1)
        # What all are joined to may be named like one.
        number += f"part-{number:06}{self._format.suffix}" == self._target.name
        return f"part-{number:06}{self._format.suffix}"

    def _append(self, entry: Entry) -> None:
        self._disk.append(self._folder / LEDGER, json.dumps(asdict(entry)).encode() + b"\n")
        self._entries.append(entry)

    def _write_ledger(self, content: bytes) -> None:
        aside = self._folder / _ASIDE
        self._disk.write(aside, lambda file: file.write(content))
        self._disk.rename(aside, self._folder / LEDGER)

    def _path(self, shard: str) -> Path:
        return self._target if shard == self._target.name and self._target != self._folder else self._folder / shard


def _locked(folder: Path) -> int | None:
    """Hold the folder for this process; the lock ends with it, however it ends."""
    try:
        import fcntl  # noqa: PLC0415  # Unix only
    except ModuleNotFoundError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"another job is writing into {folder}") from None
    return descriptor
