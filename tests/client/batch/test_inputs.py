"""Where pictures come from."""

import base64
import gzip
import importlib
import itertools
import os
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.client.batch import Columns, InputError, MissingExtraError
from resnet_ensemble.client.batch._inputs import PICTURES, Inputs, Item, has_pattern, matches, may_hold
from resnet_ensemble.client.batch._rows import printable
from resnet_ensemble.client.batch._selection import Seen, sampled
from resnet_ensemble.training.pixels import SUFFIXES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.jpg, b/c.PNG, b/d/e.jpeg, a text file and a hidden one; it is the current folder."""
    for name in ("a.jpg", "b/c.PNG", "b/d/e.jpeg", "b/notes.txt", "b/.hidden.jpg", ".hidden/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def items(*arguments: str, **options: Any) -> list[Item]:
    return list(Inputs(arguments, sort=True, **options))


def ids(*arguments: str, **options: Any) -> list[str]:
    return [item.id for item in items(*arguments, **options)]


def test_a_folder_gives_its_pictures_and_those_of_the_folders_in_it(folder: Path) -> None:
    inputs = Inputs(("b",), sort=True)

    assert [(item.id, item.read()) for item in inputs] == [("b/c.PNG", b"b/c.PNG"), ("b/d/e.jpeg", b"b/d/e.jpeg")]
    assert inputs.left_out == 1
    assert inputs.count() == 2
    assert sorted(item.id for item in Inputs((".",))) == ["./a.jpg", "./b/c.PNG", "./b/d/e.jpeg"]


def test_pictures_are_what_the_server_takes() -> None:
    assert frozenset(SUFFIXES) == PICTURES


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["a.jpg"]),
        ("b/*", ["b/c.PNG"]),
        ("b/**/*.jpeg", ["b/d/e.jpeg"]),
        ("**/*.jp*g", ["a.jpg", "b/d/e.jpeg"]),
        ("b/?.PNG", ["b/c.PNG"]),
        ("b/[cx].*", ["b/c.PNG"]),
        ("b//*.PNG", ["b/c.PNG"]),
        ("*//d///*.jpeg", ["b/d/e.jpeg"]),
        ("b/*/", []),
        ("nothing/*.jpg", []),
    ],
)
def test_a_pattern_gives_what_matches(folder: Path, pattern: str, found: list[str]) -> None:
    (folder / "b" / "notes.txt").unlink()  # a list, which would be read as one

    assert ids(pattern) == found
    assert sorted(ids(f"{folder}/{pattern}")) == sorted(f"{folder}/{name}" for name in found)


@pytest.mark.parametrize(
    ("address", "whether"),
    [
        ("http://host/ship.png?sig=a*b[1]", False),
        ("https://host/a.png", False),
        ("http://[::1]:8000/a.png", False),
        ("https://host/*.png?sig=1", True),
        ("https://host/[ab].png", True),
        ("s3://photos/?.png", True),
    ],
)
def test_a_query_and_a_host_in_brackets_are_no_patterns(address: str, whether: bool) -> None:
    assert has_pattern(address) is whether


def test_a_pattern_in_a_folder_that_is_not_there_is_refused(folder: Path) -> None:
    Inputs(("b/*.jpg", "*/x", "./*.jpg")).check()

    with pytest.raises(InputError, match=r"fotos/\*\.jpg matches nothing: fotos/ is no folder here"):
        Inputs(("fotos/*.jpg",)).check()


def test_lists_that_match_a_pattern_are_read_only_where_it_names_them(folder: Path) -> None:
    (folder / "b" / "list.csv").write_text("path\na.jpg\n")
    inputs = Inputs(("b/*",), sort=True)

    assert [item.id for item in inputs] == ["b/c.PNG"]
    assert inputs.left_out == 2
    assert ids("b/*.csv") == ["a.jpg"]


def test_folders_that_a_pattern_can_not_reach_are_not_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    entered: list[str] = []
    really_scan = os.scandir

    def scan(path: str) -> Any:
        entered.append(path)
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert ids("*.jpg") == ["a.jpg"]
    assert entered == ["."]
    assert ids("*/*.PNG") == ["b/c.PNG"]
    assert sorted(entered) == [".", ".", "./b"]
    (folder / "other" / "d").mkdir(parents=True)
    entered.clear()
    assert ids("[bc]/*/*.jpeg") == ["b/d/e.jpeg"]
    assert entered == [".", "./b", "./b/d"]

    memory = fsspec.filesystem("memory")
    memory.pipe({"/far/a.jpg": b"A", "/far/in/b.jpg": b"B"})
    really_list = type(memory).ls
    listed: list[str] = []
    monkeypatch.setattr(
        type(memory), "ls", lambda self, path, **how: listed.append(path) or really_list(self, path, **how)
    )
    try:
        assert ids("memory://far/*.jpg") == ["memory:///far/a.jpg"]
        assert listed == ["/far"]
    finally:
        memory.rm("/far", recursive=True)


def test_links_in_a_circle_are_followed_once(folder: Path) -> None:
    (folder / "b" / "d" / "up").symlink_to("..")
    (folder / "b" / "here").symlink_to(".")
    (folder / "b" / "self.jpg").symlink_to("self.jpg")
    (folder / "other").mkdir()
    (folder / "other" / "link").symlink_to("../b")

    assert ids("b") == ["b/c.PNG", "b/d/e.jpeg", "b/self.jpg"]
    assert ids("other") == ["other/link/c.PNG", "other/link/d/e.jpeg", "other/link/self.jpg"]
    with pytest.raises(OSError, match="Too many levels"):
        items("b")[-1].read()


def test_a_folder_that_can_not_be_read_is_a_problem_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_scan = os.scandir

    def scan(path: str) -> Any:
        if path.endswith("b/d"):
            raise PermissionError(13, "Permission denied", path)
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)

    assert [(item.id, item.problem) for item in items("b")] == [
        ("b/c.PNG", None),
        ("b/d", "[Errno 13] Permission denied: 'b/d'"),
    ]
    assert ids("**/*.PNG") == ["b/c.PNG", "b/d"]


def test_pipes_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "b" / "pipe.jpg")

    assert ids("b") == ["b/c.PNG", "b/d/e.jpeg"]
    (folder / "list.txt").write_text("b/pipe.jpg\n")
    with pytest.raises(OSError, match=r"b/pipe\.jpg is no file"):
        items("list.txt")[0].read()


def test_counting_takes_nothing_from_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "list.txt")
    writer = threading.Thread(target=(folder / "list.txt").write_text, args=["a.jpg\nb/c.PNG\n"], daemon=True)
    writer.start()

    assert Inputs(("list.txt",)).count() is None
    assert ids("list.txt") == ["a.jpg", "b/c.PNG"]
    writer.join()


def test_a_name_that_no_file_can_have_is_an_os_error(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"a.jpg\0b.jpg\n")

    with pytest.raises(OSError, match="embedded null byte"):
        items("list.txt")[0].read()


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


@pytest.mark.parametrize(
    ("path", "pattern", "whether"),
    [
        ("a/b/c", "a/**/c", True),
        ("a/c", "a/**/c", True),
        ("a/b/c", "**", True),
        ("a/b/c", "a/*", False),
        ("a/b", "a?b", False),
        ("A", "a", False),
    ],
)
def test_a_star_stays_within_a_name_and_two_do_not(path: str, pattern: str, whether: bool) -> None:
    assert matches(path.split("/"), pattern.split("/")) is whether


NAMES = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3)


@given(path=NAMES, pattern=st.lists(st.sampled_from(["a", "*", "?", "a*", "**"]), min_size=1, max_size=4))
def test_a_folder_may_hold_what_matches_exactly_if_something_in_it_can(path: list[str], pattern: list[str]) -> None:
    held = [rest for size in range(1, 4) for rest in itertools.product(["a", "b", "ab"], repeat=size)]

    assert may_hold(path, pattern) == any(matches([*path, *rest], pattern) for rest in held)


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


def test_addresses_are_read_with_fsspec(folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/photos/a.jpg": b"A", "/photos/in/b.png": b"B", "/photos/c.txt": b"memory://photos/a.jpg\n"})
    memory.pipe({"/photos/.hidden/d.jpg": b"D", "/photos/.e.jpg": b"E"})
    try:
        found = items("memory://photos")
        assert [(item.id, item.read()) for item in found] == [
            ("memory:///photos/a.jpg", b"A"),
            ("memory:///photos/in/b.png", b"B"),
        ]
        assert [item.read() for item in items("memory://photos/c.txt")] == [b"A"]
        assert [item.read() for item in items("memory:///photos/**/*.png")] == [b"B"]
        assert Inputs(("memory://photos",)).count() is None
    finally:
        memory.rm("/photos", recursive=True)


def test_a_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)

    with pytest.raises(MissingExtraError, match=r"s3://x needs fsspec.*pip install 'resnet-ensemble\[batch\]'"):
        Inputs(("s3://x",)).check()


def test_an_address_that_no_driver_knows_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match="s9://x is no address that fsspec can read: Protocol not known: s9"):
        Inputs(("s9://x",)).check()
    with pytest.raises(OSError, match="Protocol not known"):
        Item("x", "s9://x/a.jpg").read()


def test_a_driver_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry").known_implementations
    monkeypatch.setitem(known, "s8", {"class": "no.Driver", "err": "Install s8fs"})

    with pytest.raises(MissingExtraError, match="s8://x needs a package that is not installed: Install s8fs"):
        Inputs(("s8://x",)).check()
    with pytest.raises(MissingExtraError, match="Install s8fs"):
        Item("x", "s8://x/a.jpg").read()


def test_a_driver_that_fails_in_its_own_way_is_an_os_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    class CredentialsError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise CredentialsError("no key")

    monkeypatch.setattr(fsspec, "open", fail)

    with pytest.raises(OSError, match=r"memory://a\.jpg: CredentialsError: no key"):
        Item("x", "memory://a.jpg").read()


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


# Which of them


def named(count: int) -> Iterator[Item]:
    return (Item(f"{n}.jpg", f"{n}.jpg") for n in range(count))


def test_a_sample_is_the_same_in_any_order() -> None:
    chosen = {item.id for item in sampled(named(2000), 0.1)}

    assert 150 < len(chosen) < 250
    assert {item.id for item in sampled(reversed(list(named(2000))), 0.1)} == chosen
    assert len(list(sampled(named(10), None))) == len(list(sampled(named(10), 1.0))) == 10


def test_seen_ids_are_known() -> None:
    seen = Seen(["a", "b"])

    assert [seen.add(id) for id in ("a", "c", "c", "b")] == [False, True, False, False]
