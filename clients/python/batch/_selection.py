"""Which of the inputs a run takes: a sample, the first so many, and of those the ones that have no row yet."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator

from resnet_ensemble.client.batch._places import Item


class Seen:
    """Ids, on the disk: memory does not grow with them. One thread uses it at a time."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        # "" is a database of SQLite's own, in a file that goes away with it
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA temp_store = FILE")
        self._database.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        for id in ids:  # noqa: A001  # the field's name
            self.add(id)

    def add(self, id: str) -> bool:  # noqa: A002  # the field's name
        """Whether it was new. Raises OSError when the disk is full."""
        key = hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:16]
        try:
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise OSError(f"the ids that have a row are kept in a temporary file: {error}; TMPDIR moves it") from error

    def close(self) -> None:
        """Give the disk back."""
        self._database.close()


def sampled(items: Iterable[Item], share: float | None) -> Iterator[Item]:
    """About this share of the items: the same ones in every run, in whatever order they come."""
    for item in items:
        if share is None or int.from_bytes(hashlib.sha256(item.id.encode()).digest()[:8]) < share * 2**64:
            yield item
