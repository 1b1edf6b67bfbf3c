import errno
import os
from pathlib import Path

import pytest

from resnet_ensemble.training.files import write_atomically, write_together


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
