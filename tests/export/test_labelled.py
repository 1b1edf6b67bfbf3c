import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.export import labelled
from resnet_ensemble.export.labelled import PictureUnreadable

LABELS = ("cat", "dog", "ship")


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def found(root: Path, labels: tuple[str, ...] = LABELS) -> dict[str, int | None]:
    return {str(picture.path.relative_to(root)): picture.label for picture in labelled.find(root, labels)}


def test_the_nearest_folder_that_is_named_like_a_label_tells_the_class(tmp_path: Path) -> None:
    write(tmp_path, "ship/a.png", "ship/more/b.JPG", "val/cat/c.webp", "ship/dog/d.tiff", "other/e.png", "f.png")
    write(tmp_path, "ship/.DS_Store", "ship/notes.txt")
    (tmp_path / "ship" / "folder.png").mkdir()

    assert found(tmp_path) == {
        "f.png": None,
        "other/e.png": None,
        "ship/a.png": 2,
        "ship/dog/d.tiff": 1,
        "ship/more/b.JPG": 2,
        "val/cat/c.webp": 0,
    }


def test_a_folder_above_all_of_them_does_not(tmp_path: Path) -> None:
    write(tmp_path / "cat", "a.png")

    assert found(tmp_path / "cat") == {"a.png": None}


def test_imagenet_s_folders_are_the_classes_in_their_order_if_there_are_a_thousand(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"n{9 * i:08}").mkdir()
    write(tmp_path, "n00000018/a.png", "n00000000/b.png")
    thousand = tuple(f"class {i}" for i in range(1000))

    assert found(tmp_path, thousand) == {"n00000000/b.png": 0, "n00000018/a.png": 2}
    assert set(found(tmp_path, thousand[:999]).values()) == {None}


def test_ten_of_imagenet_s_folders_are_not_ten_other_classes(tmp_path: Path) -> None:
    write(tmp_path, "n01440764/a.png", "n02102040/b.png", "n02979186/c.png")

    assert set(found(tmp_path).values()) == {None}


def test_links_to_folders_are_followed_and_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/a.png", "data/dog/b.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog" / "back").symlink_to(tmp_path / "data")

    assert found(tmp_path / "data") == {"cat/a.png": 0, "dog/b.png": 1}


def test_of_equal_labels_a_folder_is_the_first(tmp_path: Path) -> None:
    write(tmp_path, "crane/a.png")

    assert found(tmp_path, ("cat", "crane", "dog", "crane")) == {"crane/a.png": 1}


def test_there_may_be_nothing(tmp_path: Path) -> None:
    assert found(tmp_path) == found(tmp_path / "missing") == {}


def test_what_can_t_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.png")
    link, pipe = labelled.find(tmp_path, LABELS)

    with pytest.raises(PictureUnreadable, match=r"link\.png can't be read \(No such file or directory\); remove it"):
        link.read()
    with pytest.raises(PictureUnreadable, match=r"pipe\.png can't be read \(it is no regular file\)"):
        pipe.read()


@given(st.lists(st.sampled_from([*LABELS, "val", "more"]), max_size=4))
def test_folders_between_change_nothing(folders: list[str]) -> None:
    numbers = {label: number for number, label in enumerate(LABELS)}
    known = [numbers[name] for name in folders if name in numbers]

    assert labelled._label(Path(*folders, "a.png"), numbers) == (known[-1] if known else None)


def test_a_folder_has_a_name_that_any_file_can_hold(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()

    assert labelled.name_of(folder).encode() == "caf\N{REPLACEMENT CHARACTER}".encode()
