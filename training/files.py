"""Files that are either whole or absent."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


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
