"""Files that are either whole or absent."""

import errno
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """A file's content. Raises OSError, too, for what is no file, such as a pipe, which might never end."""

    def at_once(name: str, flags: int) -> int:  # opening a pipe waits for who writes into it, too
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file.read()


def check_writable(path: Path) -> None:
    """Raise OSError if `path` can't be written now: before long work whose result goes there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: a reader sees the old file or the new one, never a part."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files, each atomically, and replace none before all are on the disk: a full one changes nothing.

    Put a file that names others last. An OSError names the file that could not be written.
    """
    staged: list[Path] = []
    try:
        for path, content in files.items():
            try:
                _write_beside(path, content, staged)
            except OSError as error:  # of a write or a flush, which know no name
                raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        for name, path in zip(staged, files, strict=True):
            os.replace(name, path)
    finally:
        for name in staged:
            name.unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes, staged: list[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    staged.append(Path(name))
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(name).chmod(0o644)  # mkstemp makes files that only their owner can read
