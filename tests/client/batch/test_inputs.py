"""Where pictures come from."""

import base64
import gzip
import os
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resnet_ensemble.client.batch import Columns, InputError, MissingExtraError
from resnet_ensemble.client.batch._inputs import PICTURES, Inputs
from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._rows import printable
from resnet_ensemble.training.pixels import SUFFIXES


def items(*arguments: str, **options: Any) -> list[Item]:
    return list(Inputs(arguments, sort=True, **options))


def ids(*arguments: str, **options: Any) -> list[str]:
    return [item.id for item in items(*arguments, **options)]


def test_pictures_are_what_the_server_takes() -> None:
    assert frozenset(SUFFIXES) == PICTURES


def test_counting_takes_nothing_from_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "list.txt")
    writer = threading.Thread(target=(folder / "list.txt").write_text, args=["a.jpg\nb/c.PNG\n"], daemon=True)
    writer.start()

    assert Inputs(("list.txt",)).count() is None
    assert ids("list.txt") == ["a.jpg", "b/c.PNG"]
    writer.join()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "a.jpg\n"),
        ("L.JSONL", '{"path": "a.jpg"}\n'),
        ("l.csv", "path,n\na.jpg,1\n"),
        ("l.tsv", "n\tpath\n1\ta.jpg\n"),
    ],
)
def test_compressed_lists(folder: Path, name: str, content: str) -> None:
    whole = gzip.compress(content.encode())
    (folder / f"{name}.gz").write_bytes(whole)
    assert ids(f"{name}.gz") == ["a.jpg"]

    (folder / f"{name}.gz").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"gz can't be read further: Compressed file ended"):
        items(f"{name}.gz")


def test_lists_of_paths(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\nb/c.PNG\nno\xff.jpg")

    assert ids("list.txt") == ["a.jpg", "b/c.PNG", "no\\xff.jpg"]
    assert Inputs(("list.txt",)).count() == 3
    assert Inputs(("-",)).count() is None
    assert Inputs(("list.txt",), columns=Columns(content="data")).count() is None


def test_relative_paths_begin_from_the_root(folder: Path) -> None:
    (folder / "list.txt").write_text(f"c.PNG\n{folder}/a.jpg\n")

    assert [(item.id, item.read()) for item in items("list.txt", root="b/")] == [
        ("c.PNG", b"b/c.PNG"),
        (f"{folder}/a.jpg", b"a.jpg"),
    ]


def test_jsonl_with_paths_ids_bytes_and_bad_lines(folder: Path) -> None:
    content = base64.b64encode(b"bytes").decode()
    (folder / "list.jsonl").write_text(
        f'{{"path": "a.jpg", "name": 7}}\n\n{{"name": "x", "data": "{content}"}}\n'
        'no json\n{"path": "a.jpg"}\n{"name": "y"}\n[]\n{"name": "z", "data": "?"}\n{"name": "n", "data": 7}\n'
    )

    found = items("list.jsonl", columns=Columns("path", "data", "name"))

    assert [item.id for item in found] == ["7", "x", "list.jsonl:4", "list.jsonl:5", "y", "list.jsonl:7", "z", "n"]
    assert [item.read() for item in found[:2]] == [b"a.jpg", b"bytes"]
    for item, problem in zip(
        found[2:], ["not JSON", "column name", "data or path", "no columns", "base64", "are int"], strict=True
    ):
        with pytest.raises(OSError, match=problem):
            item.read()


def test_a_line_of_brackets_only_is_not_json(folder: Path) -> None:
    (folder / "list.jsonl").write_text("[" * 100_000 + '\n{"path": "a.jpg"}\n')

    bad, good = items("list.jsonl")

    assert str(bad.problem).startswith("line 1 is not JSON: ")
    assert good.id == "a.jpg"


@pytest.mark.parametrize(
    ("name", "content"),
    [("list.csv", "path,id\na.jpg,\na.jpg,\na.jpg,7\n"), ("list.jsonl", '{"path": "a.jpg", "id": ""}\n' * 2)],
)
def test_empty_ids_are_missing_and_not_named_twice(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)

    found = items(name, columns=Columns(id="id"))

    assert len({item.id for item in found}) == len(found)
    assert [item.problem for item in found[:2]] == [f"{item.id} has no value in the column id" for item in found[:2]]


@pytest.mark.parametrize(("name", "separator"), [("list.csv", ","), ("list.tsv", "\t")])
def test_tables_of_text(folder: Path, name: str, separator: str) -> None:
    (folder / name).write_text(f"\ufefffile{separator}label\na.jpg{separator}cat\n{separator}dog\n")

    found = items(name, columns=Columns("file"))

    assert found[0].read() == b"a.jpg"
    assert found[1].problem == f"{name}:3 has no value in the column file"
    with pytest.raises(InputError, match=rf"{name} has no column path; it has file, label"):
        items(name)


def test_a_cell_may_hold_lines_a_picture_or_what_is_not_utf_8(folder: Path) -> None:
    content = base64.b64encode(bytes(200_000)).decode()
    (folder / "list.csv").write_bytes(f'path,data\n"a,\n""b"".jpg",{content}\n'.encode() + b"\xe4.jpg,\n")

    first, second = items("list.csv", columns=Columns(content="data"))

    assert (first.id, first.path, first.read()) == ("list.csv:3", 'a,\n"b".jpg', bytes(200_000))
    assert (second.id, second.read()) == ("list.csv:4", b"")
    assert [(item.id, os.fsencode(item.path)) for item in items("list.csv")[1:]] == [("\\xe4.jpg", b"\xe4.jpg")]


def test_parquet_with_paths_or_bytes(folder: Path) -> None:
    images = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "a.jpg"}, None]
    pq.write_table(
        pa.table({"path": ["a.jpg", None, "a.jpg"], "raw": [b"x", b"y", None], "image": images}), "t.parquet"
    )

    assert [item.read() for item in items("t.parquet")[:1]] == [b"a.jpg"]
    raw = items("t.parquet", columns=Columns("path", "raw"))
    assert [(item.id, item.read()) for item in raw] == [
        ("t.parquet:0", b"x"),
        ("t.parquet:1", b"y"),
        ("a.jpg", b"a.jpg"),
    ]
    hugging = items("t.parquet", columns=Columns("none", "image"))
    assert [(item.id, item.path, item.problem or item.read()) for item in hugging] == [
        ("t.parquet:0", "1.jpg", b"one"),
        ("a.jpg", "a.jpg", b"a.jpg"),
        ("t.parquet:2", "t.parquet:2", "t.parquet:2 has no value in the column image or none"),
    ]
    assert Inputs(("t.parquet",)).count() == 3
    with pytest.raises(InputError, match=r"t.parquet has no column x; it has path, raw, image"):
        items("t.parquet", columns=Columns("x"))
    (folder / "broken.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(InputError, match=r"broken.parquet can't be read further: Parquet magic bytes"):
        items("broken.parquet")


def test_pictures_in_a_list_that_share_a_name_are_inputs_each(folder: Path) -> None:
    pq.write_table(
        pa.table({"image": [{"bytes": b"cat", "path": "0.jpg"}, {"bytes": b"dog", "path": "0.jpg"}]}), "t.parquet"
    )

    found = items("t.parquet", columns=Columns(content="image"))

    assert [(item.id, item.path) for item in found] == [("t.parquet:0", "0.jpg"), ("t.parquet:1", "0.jpg")]


def test_a_row_group_of_parquet_is_not_read_whole(folder: Path) -> None:
    content = [os.urandom(100_000) for _ in range(300)]
    pq.write_table(pa.table({"image": content}), "t.parquet", use_dictionary=False, write_batch_size=1)
    before = pa.total_allocated_bytes()
    passing = iter(Inputs(("t.parquet",), columns=Columns(content="image")))

    assert [next(passing).content for _ in range(3)] == content[:3]

    assert pa.total_allocated_bytes() - before < 15_000_000


def test_names_that_are_no_text_are_told_as_text(folder: Path) -> None:
    name = os.fsdecode(b"l\xe9.jsonl")
    Path(name).write_text('{"name": "x", "path": "\\ud800"}\nno json\n')

    half, bad = items(name, columns=Columns(id="name"))

    assert (half.id, bad.id) == ("x", "l\\xe9.jsonl:2")
    assert printable(half.path) == "\\xed\\xa0\\x80"
    with pytest.raises(OSError, match="surrogates not allowed"):
        half.read()


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")])
def test_archives(folder: Path, name: str, mode: Any) -> None:
    with tarfile.open(name, mode) as archive:
        for member in ("a.jpg", "b/c.PNG", "b/notes.txt"):
            archive.add(member)
        archive.addfile(tarfile.TarInfo("empty.jpg"))

    inputs = Inputs((name,))

    assert [(item.id, item.content) for item in inputs] == [
        (f"{name}/a.jpg", b"a.jpg"),
        (f"{name}/b/c.PNG", b"b/c.PNG"),
        (f"{name}/empty.jpg", b""),
    ]
    assert inputs.left_out == 1
    assert inputs.count() is None


def test_a_picture_in_an_archive_is_read_up_to_the_limit_and_one_byte_more(folder: Path) -> None:
    with tarfile.open("s.tar", "w") as archive:
        archive.add("b/c.PNG")
        archive.add("a.jpg")
    inputs = Inputs(("s.tar",))
    inputs.most_bytes = 5

    assert [item.content for item in inputs] == [b"b/c.PN", b"a.jpg"]


def test_links_in_an_archive_are_told(folder: Path) -> None:
    with tarfile.open("s.tar", "w") as archive:
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)

    assert [(item.id, item.problem) for item in items("s.tar")] == [
        ("s.tar/hard.jpg", "it is a link to a.jpg in an archive"),
        ("s.tar/soft.jpg", "it is a link to a.jpg in an archive"),
    ]


def test_a_damaged_archive_is_told(folder: Path) -> None:
    (folder / "s.tar").write_bytes(b"x" * 2000)

    with pytest.raises(InputError, match=r"s\.tar can't be read further"):
        items("s.tar")


def test_an_archive_that_is_damaged_further_on_is_not_taken_for_a_shorter_one(folder: Path) -> None:
    _archive(folder / "s.tar", 5)
    content = bytearray((folder / "s.tar").read_bytes())
    content[3 * 512 : 3 * 512 + 100] = b"x" * 100
    (folder / "s.tar").write_bytes(content)
    passing = iter(Inputs(("s.tar",)))

    assert [next(passing).id for _ in range(3)] == ["s.tar/0.jpg", "s.tar/1.jpg", "s.tar/2.jpg"]
    with pytest.raises(InputError, match=r"s\.tar can't be read further: damaged at byte 1536: bad checksum"):
        next(passing)


@pytest.mark.parametrize(
    ("left", "problem"),
    [
        (3 * 512, "cut off at byte 1536: no zero bytes end it; if nothing is missing, add 1,024 of them"),
        (3 * 512 + 100, "damaged at byte 1536: truncated header"),
        (0, "cut off at byte 0"),
    ],
)
@pytest.mark.parametrize("name", ["s.tar", "s.tgz"])
def test_an_archive_that_was_cut_off_is_not_taken_for_a_shorter_one(
    folder: Path, name: str, left: int, problem: str
) -> None:
    _archive(folder / name, 5)
    content = (folder / name).read_bytes()[:left]
    (folder / name).write_bytes(content if name == "s.tar" else gzip.compress(content))
    passing = iter(Inputs((name,)))

    assert [next(passing).id for _ in range(left // 512)] == [f"{name}/{number}.jpg" for number in range(left // 512)]
    with pytest.raises(InputError, match=rf"{name} can't be read further: {problem}"):
        next(passing)


def test_one_block_of_zeros_ends_an_archive(folder: Path) -> None:
    _archive(folder / "s.tar", 5)
    (folder / "s.tar").write_bytes((folder / "s.tar").read_bytes()[:-512])

    assert len(items("s.tar")) == 5


def test_pictures_are_arguments_too(folder: Path) -> None:
    assert ids("b/c.PNG", "a.jpg") == ["b/c.PNG", "a.jpg"]


def test_a_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)

    with pytest.raises(MissingExtraError, match=r"s3://x needs fsspec.*pip install 'resnet-ensemble\[batch\]'"):
        Inputs(("s3://x",)).check()


@pytest.mark.parametrize("kind", ["list.txt", "list.jsonl", "list.csv", "s.tar", "folder"])
def test_nothing_is_listed_whole(folder: Path, kind: str) -> None:
    """Memory while 5,000 inputs pass is that of a few hundred."""
    write: dict[str, Callable[[], object]] = {
        "list.txt": lambda: (folder / kind).write_text("".join(f"{n}.jpg\n" for n in range(5_000))),
        "list.jsonl": lambda: (folder / kind).write_text("".join(f'{{"path": "{n}.jpg"}}\n' for n in range(5_000))),
        "list.csv": lambda: (folder / kind).write_text("path\n" + "".join(f"{n}.jpg\n" for n in range(5_000))),
        "s.tar": lambda: _archive(folder / kind, 5_000),
        "folder": lambda: [(folder / kind).mkdir(), *(os.mknod(folder / kind / f"{n}.jpg") for n in range(5_000))],
    }
    write[kind]()
    passing = iter(Inputs((kind,)))
    next(passing)

    tracemalloc.start()
    assert sum(1 for _ in passing) == 4_999
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert most < 400_000


def _archive(path: Path, members: int) -> None:
    header = [tarfile.TarInfo(f"{n}.jpg").tobuf() for n in range(members)]
    path.write_bytes(b"".join(header) + bytes(1024))
