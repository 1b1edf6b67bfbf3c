"""Exactly one row for each input, wherever a job is killed."""

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resnet_ensemble.client.batch import OutputError, _formats
from resnet_ensemble.client.batch._disk import Disk
from resnet_ensemble.client.batch._formats import FORMATS
from resnet_ensemble.client.batch._output import LEDGER, Entry, Output, differences, live, parse_ledger
from resnet_ensemble.client.batch._rows import Row, of_error

HOW = st.sampled_from(["before", "midst", "after"])
CONFIGURATION = {"inputs": ["photos"], "protocol": None, "bundle": "cifar10-2-0"}


@pytest.fixture(autouse=True, scope="module")
def nothing_is_flushed() -> Iterator[None]:
    """Who kills a process does not lose what the system has in its memory; and disks are slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def row(id: str, error: str | None = None) -> Row:
    return of_error(id, id, None, error or "", "why") | {"error_code": error}


def begun(target: Path, disk: Disk | None = None, **configuration: object) -> Output:
    output = Output(target, disk=disk)
    output.begin(CONFIGURATION | configuration)
    return output


def rows_on_disk(target: Path) -> list[Row]:
    """What somebody reads who knows nothing of ledgers."""
    files = sorted(target.glob("part-*")) if target.is_dir() else [target]
    return [row for file in files for row in FORMATS[file.suffix[1:]]().read(file)]


class Killed(BaseException):
    """The process is gone."""


class FragileDisk(Disk):
    """Dies at its operation number `dies_at`: before it, in the midst of it, or after it."""

    def __init__(self, dies_at: int, how: str) -> None:
        self._left = dies_at
        self._how = how

    def write(self, path: Path, fill: Callable[[BinaryIO], object]) -> int:
        return self._perhaps(lambda: super(FragileDisk, self).write(path, fill), path)

    def rename(self, old: Path, new: Path) -> None:
        self._perhaps(lambda: super(FragileDisk, self).rename(old, new), None)

    def append(self, path: Path, line: bytes) -> None:
        before = path.read_bytes()
        self._perhaps(lambda: super(FragileDisk, self).append(path, line), path, before)

    def remove(self, path: Path) -> None:
        self._perhaps(lambda: super(FragileDisk, self).remove(path), None)

    def _perhaps(self, act: Callable[[], object], path: Path | None, before: bytes = b"") -> int:
        self._left -= 1
        if self._left != 0:
            return act()  # type: ignore[return-value]
        if self._how != "before":
            act()
        if self._how == "midst" and path is not None:
            content = path.read_bytes()
            path.write_bytes(content[: len(before) + (len(content) - len(before)) // 2])
        raise Killed


def do(target: Path, inputs: list[str], disk: Disk, shard: int, bad: set[str], retry: bool = False) -> None:
    """A job, without anything between its inputs and its output."""
    with Output(target, disk=disk) as output:
        output.begin(CONFIGURATION)
        if retry:
            output.drop_errors()
        done = set(output.ids())
        left = [name for name in inputs if name not in done]
        for start in range(0, len(left), shard):
            output.commit([row(name, "bad" if name in bad else None) for name in left[start : start + shard]])
        output.finish()


@settings(max_examples=60)
@given(
    kills=st.lists(
        st.tuples(st.integers(1, 25), st.sampled_from(["before", "midst", "after"]), st.booleans()), max_size=6
    ),
    count=st.integers(0, 12),
    shard=st.integers(1, 5),
    name=st.sampled_from(["rows", "rows.jsonl"]),
    grows=st.booleans(),
)
@example(kills=[(11, "midst", False)], count=6, shard=3, name="rows.jsonl", grows=True)
def test_a_job_killed_anywhere_and_begun_again_has_one_row_for_each_input(
    kills: list[tuple[int, str, bool]], count: int, shard: int, name: str, grows: bool
) -> None:
    inputs = [f"{number}.jpg" for number in range(count)]
    with TemporaryDirectory() as folder:
        target = Path(folder) / name
        for dies_at, how, retry in kills:
            with suppress(Killed):
                do(target, inputs, FragileDisk(dies_at, how), shard, {"0.jpg", "4.jpg"}, retry)
            if grows:
                inputs.append(f"{len(inputs)}.jpg")

        do(target, inputs, Disk(), shard, {"0.jpg", "4.jpg"})

        assert sorted(row["id"] for row in rows_on_disk(target)) == sorted(inputs)
        with Output(target) as output:
            output.begin(CONFIGURATION)
            assert (output.rows, output.errors) == (len(inputs), len({"0.jpg", "4.jpg"} & set(inputs)))


@pytest.mark.parametrize("how", ["before", "midst", "after"])
@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.parquet"])
def test_every_single_place_to_be_killed_at(tmp_path: Path, how: str, name: str) -> None:
    inputs = [f"{number}.jpg" for number in range(4)]
    for dies_at in itertools.count(1):
        target = tmp_path / str(dies_at) / name
        try:
            do(target, inputs, FragileDisk(dies_at, how), 2, {"1.jpg"})
            break
        except Killed:
            do(target, inputs, Disk(), 2, {"1.jpg"})
            do(target, inputs, Disk(), 2, set(), retry=True)
            assert [row["id"] for row in rows_on_disk(target) if row["error_code"] is None] != []
            assert sorted(row["id"] for row in rows_on_disk(target)) == inputs
    assert dies_at > 6


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    with begun(tmp_path / "rows") as output:
        output.commit([row("a"), row("b", "corrupt_image")])

    with begun(tmp_path / "rows") as output:
        assert list(output.ids()) == ["a", "b"]
        assert (output.rows, output.errors) == (2, 1)


def test_a_configuration_that_changed_is_refused_and_says_what_changed(tmp_path: Path) -> None:
    with begun(tmp_path / "rows") as output:
        output.commit([row("a")])

    with pytest.raises(OutputError, match=r"protocol: None → flip.*--force to begin again without its 1 rows"):
        begun(tmp_path / "rows", protocol="flip")
    with pytest.raises(OutputError, match="bundle: cifar10-2-0 → cifar10-3-1"):
        begun(tmp_path / "rows", bundle="cifar10-3-1")


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_force_begins_again(tmp_path: Path, name: str) -> None:
    do(tmp_path / name, ["a", "b"], Disk(), 1, set())

    with Output(tmp_path / name) as output:
        lost = output.begin(CONFIGURATION | {"protocol": "flip"}, force=True)
        assert lost == "2 rows are taken away (protocol: None → flip)"
        assert output.rows == 0
        assert rows_on_disk(tmp_path / name) == [] if name == "rows" else not (tmp_path / name).exists()
        output.commit([row("c")])
        output.finish()

    assert [row["id"] for row in rows_on_disk(tmp_path / name)] == ["c"]


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_where_there_are_no_rows_it_begins_again_unasked(tmp_path: Path, name: str) -> None:
    do(tmp_path / name, [], Disk(), 1, set())

    with begun(tmp_path / name, inputs=["other"]) as output:
        output.commit([row("c")])
        output.finish()

    assert [row["id"] for row in rows_on_disk(tmp_path / name)] == ["c"]
    with pytest.raises(OutputError, match="begun otherwise"):
        begun(tmp_path / name)


def test_force_deletes_nothing_where_nothing_changed(tmp_path: Path) -> None:
    do(tmp_path / "rows", ["a", "b"], Disk(), 1, set())

    with Output(tmp_path / "rows") as output:
        assert output.begin(CONFIGURATION, force=True) is None
        assert output.rows == 2


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_half_a_line_is_taken_back_so_that_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    class Full(io.FileIO):
        """The disk takes ten bytes, and then none."""

        def write(self, line: Any, /) -> int:
            if len(line) < 20 and fails == "write":
                raise OSError(28, "No space left on device")
            return super().write(line[:10] if fails == "write" else line)

    def sync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with begun(tmp_path / "rows") as output:
        output.commit([row("a")])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, *how, **more: Full(path, "ab"))
            if fails == "fsync":
                patch.setattr(os, "fsync", sync)
            for _ in range(2):
                with pytest.raises(OSError, match=r"No space|Input/output"):
                    Disk().append(tmp_path / "rows" / LEDGER, b'{"shard": "part-000001.jsonl"}\n')
        output.commit([row("b")])

    with begun(tmp_path / "rows") as output:
        assert list(output.ids()) == ["a", "b"]


def test_a_file_that_can_not_be_written_whole_is_not_left_there(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(bytes(100_000))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Disk().write(tmp_path / "part", fill)
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_do_not_write_into_one_output(tmp_path: Path) -> None:
    with begun(tmp_path / "rows"), pytest.raises(OutputError, match="another job is writing into"):
        begun(tmp_path / "rows")

    begun(tmp_path / "rows").close()


@pytest.mark.parametrize(("target", "there"), [("rows", "rows/part-000000.jsonl"), ("rows.jsonl", "rows.jsonl")])
def test_files_of_somebody_else_are_not_touched(tmp_path: Path, target: str, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("{}\n")

    with pytest.raises(OutputError, match=r"exists, but no _ledger in .*: move it, or use another output"):
        begun(tmp_path / target)
    assert (tmp_path / there).read_text() == "{}\n"


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()

    with pytest.raises(OutputError, match="is a file; an output is a folder, or a file named"):
        begun(tmp_path / "rows")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{}\n")])
def test_a_shard_that_is_gone_or_changed_is_told(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    do(tmp_path / "rows", ["a", "b"], Disk(), 1, set())
    damage(tmp_path / "rows" / "part-000001.jsonl")

    with pytest.raises(OutputError, match=r"part-000001.jsonl (is missing|has 3 bytes).*restore it, or remove"):
        begun(tmp_path / "rows")


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense\n", b'{"format": 9}\n', b'{"format": 1, "configuration": {}}\nnonsense\n{}\n', b"[]\n"],
    ids=["empty", "no JSON", "a newer format", "a damaged line", "no object"],
)
def test_a_damaged_ledger_is_told(content: bytes) -> None:
    with pytest.raises(OutputError, match=r"the ledger (is damaged|has format 9)"):
        parse_ledger(content)


def test_a_ledger_is_read_but_for_a_line_that_was_cut_off(tmp_path: Path) -> None:
    do(tmp_path / "rows", ["a", "b"], Disk(), 1, set())
    ledger = tmp_path / "rows" / LEDGER

    configuration, entries = parse_ledger(ledger.read_bytes()[:-5])

    assert configuration == CONFIGURATION
    assert [entry.shard for entry in entries] == ["part-000000.jsonl"]


def test_replaced_entries_count_no_more() -> None:
    entries = [
        Entry("a", 3, 1, 9),
        Entry("b", 2, 2, 9),
        Entry("c", 2, 0, 9, ("a",)),
        Entry(None, 0, 0, 0, ("b",)),
    ]

    assert [entry.shard for entry in live(entries)] == ["c"]


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_rows_stay_in_their_order_while_error_rows_are_taken_from_among_them(tmp_path: Path, name: str) -> None:
    with begun(tmp_path / name) as output:
        for shard, bad in (("abc", "bc"), ("def", "def"), ("ghi", "")):
            output.commit([row(id, "bad" if id in bad else None) for id in shard])

    with begun(tmp_path / name) as output:
        assert output.drop_errors() == 5
        output.commit([row("b"), row("c", "bad")])
        output.commit([row("d")])
    with begun(tmp_path / name) as output:
        assert output.drop_errors() == 1
        assert list(output.ids()) == list("aghibd")
        output.finish()
    assert [row["id"] for row in rows_on_disk(tmp_path / name)] == list("aghibd")


def test_differences_are_named() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None, "d": 4}) == ["b: 2 → 3", "d: None → 4"]
    assert differences({"a": "x" * 9999}, {"a": 1}) == [f"a: {'x' * 80}… (9,999 characters) → 1"]


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    rows = [row("ä\\xff.jpg"), row("b", "corrupt_image")]
    for name in ("rows.jsonl", "rows.parquet"):
        with begun(tmp_path / name) as output:
            for one in rows:
                output.commit([one])
            output.finish()

    assert rows_on_disk(tmp_path / "rows.jsonl") == rows_on_disk(tmp_path / "rows.parquet") == rows
    assert [path.name for path in (tmp_path / "rows.jsonl.shards").iterdir()] == [LEDGER]
    json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])


def test_small_shards_become_large_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_formats, "_GROUP", 4)
    with begun(tmp_path / "rows.parquet") as output:
        for number in range(11):
            output.commit([row(str(number))])
        output.finish()

    written = pq.ParquetFile(tmp_path / "rows.parquet").metadata
    assert [written.row_group(group).num_rows for group in range(written.num_row_groups)] == [4, 4, 3]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_ensemble.client.batch import MissingExtraError

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)

    with pytest.raises(MissingExtraError, match=r"Parquet needs pyarrow.*pip install 'resnet-ensemble\[batch\]'"):
        Output(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "name", ["part-000000.jsonl", "part-000001.parquet", "part-000002-kept.jsonl", "part-000001-kept.jsonl"]
)
def test_one_file_may_be_named_like_a_shard(tmp_path: Path, name: str) -> None:
    """As those of a job that is spread over machines are."""
    target = tmp_path / name
    for _ in range(2):
        with begun(target) as output:
            known = set(output.ids())
            for start in range(0, 60, 20):
                rows = [row(f"{i}", "bad" if i % 7 == 0 and not known else None) for i in range(start, start + 20)]
                output.commit([new for new in rows if new["id"] not in known])
            output.finish()
            assert output.files() == [target]
            output.drop_errors()
            output.finish()
    assert len(rows_on_disk(target)) == 60 - 9 + 9
