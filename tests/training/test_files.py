import errno
import os
from pathlib import Path

import pytest

from resnet_ensemble.training.files import check_writable, read_regular, write_atomically, write_together


def test_a_file_is_written_with_its_folder_and_is_readable_by_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"content")

    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_of_several_files_none_is_replaced_before_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    flush, flushed = os.fsync, []

    def fail_the_second_time(handle: int) -> None:
        flushed.append(handle)
        if len(flushed) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail_the_second_time)

    with pytest.raises(OSError, match=r"No space left on device: '.*/b'") as raised:
        write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert raised.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_several_files_are_written(tmp_path: Path) -> None:
    write_together({tmp_path / "x" / "a": b"1", tmp_path / "b": b"2"})

    assert (tmp_path / "x" / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"12"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")

    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "link") == b"content"
    with pytest.raises(OSError, match=r"it is no regular file: '.*pipe'"):
        read_regular(tmp_path / "pipe")  # nobody writes into it
    with pytest.raises(OSError, match="no regular file"):
        read_regular(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing")


def test_whether_a_file_could_be_written_is_found_without_writing_it(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")

    check_writable(tmp_path / "old")
    check_writable(tmp_path / "deeper" / "new")

    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["deeper", "old"]
    assert (tmp_path / "old").read_bytes() == b"old"
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path / "deeper")
    with pytest.raises(OSError, match=r": '.*old/new'"):
        check_writable(tmp_path / "old" / "new")
