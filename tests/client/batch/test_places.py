"""Files, folders, patterns and addresses, as the arguments of a job."""

import importlib
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.client.batch import InputError, MissingExtraError
from resnet_ensemble.client.batch._inputs import Inputs
from resnet_ensemble.client.batch._places import Item, has_pattern, matches, may_hold
from tests.client.batch.test_inputs import ids, items


def test_a_folder_gives_its_pictures_and_those_of_the_folders_in_it(folder: Path) -> None:
    inputs = Inputs(("b",), sort=True)

    assert [(item.id, item.read()) for item in inputs] == [("b/c.PNG", b"b/c.PNG"), ("b/d/e.jpeg", b"b/d/e.jpeg")]
    assert inputs.left_out == 1
    assert inputs.count() == 2
    assert sorted(item.id for item in Inputs((".",))) == ["./a.jpg", "./b/c.PNG", "./b/d/e.jpeg"]


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


def test_a_name_that_no_file_can_have_is_an_os_error(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"a.jpg\0b.jpg\n")

    with pytest.raises(OSError, match="embedded null byte"):
        items("list.txt")[0].read()


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
