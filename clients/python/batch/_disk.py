"""What a job does to the file system: few operations, so that a test can crash between any two, and within one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class Disk:
    """The operations. Each is on the disk when it returns."""

    def write(self, path: Path, fill: Callable[[BinaryIO], object]) -> int:
        """Write a whole file and flush it to the disk; none is left where that fails. Returns its size."""
        try:
            with path.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError:
            self.remove(path)
            raise

    def rename(self, old: Path, new: Path) -> None:
        """Put a file in another's place, at once."""
        os.replace(old, new)
        self._flush_folder(new.parent)

    def append(self, path: Path, line: bytes) -> None:
        """Add a line to a file, or leave it as it was: the next line must not follow half of this one."""
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def remove(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)

    def _flush_folder(self, folder: Path) -> None:
        if os.name == "posix":  # elsewhere a folder can't be opened
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
