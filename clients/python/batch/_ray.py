"""The same rows from many machines: Ray Data runs the pictures through actors, the driver keeps the output.

Each actor has a client of its own: of the server at --url, or of the bundle in its process. Pictures that are files or
addresses are read by the actors, so these have to see them; bytes from archives and columns travel.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_ensemble.client.batch._extras import MissingExtraError, needed
from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._progress import Progress
from resnet_ensemble.client.batch._rows import Row
from resnet_ensemble.client.batch._sender import Sender, StopJobError
from resnet_ensemble.client.batch._servers import connect

_BLOCK = 64  # inputs that an actor takes at a time
_SLAB_ITEMS = 50_000  # inputs in one pass: actors start once for each, and inputs are a stream
_SLAB_BYTES = 256 * 2**20  # of pictures that travel


@dataclass(frozen=True)
class Work:
    """What an actor needs to know. It is sent to it."""

    url: str | None
    api_key: str | None = field(repr=False)
    bundle: Path | None
    identity: str
    most_bytes: int | None
    top_k: int
    protocol: str | None
    stop: str | None
    max_concurrency: int
    timeout: float
    patience: float


@dataclass(frozen=True)
class Done:
    """What became of the input at `position`: its row, or why the job has to stop."""

    position: int
    row: Row | None
    stop: str | None


def classify(items: Iterable[Item], work: Work, *, workers: int, ordered: bool) -> Iterator[Done]:
    """Everything done, from `workers` actors. Begins a Ray of this machine unless RAY_ADDRESS names a cluster."""
    ray, data = needed("ray", "--ray", extra="ray"), needed("ray.data", "--ray", extra="ray")
    arrow = needed("pyarrow", "--ray", extra="ray")
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    try:
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = ordered
        context.enable_progress_bars = False
        for slab in slabs(enumerate(items)):
            blocks = [_table(arrow, slab[start : start + _BLOCK]) for start in range(0, len(slab), _BLOCK)]
            dataset = data.from_arrow(blocks).map_batches(
                Worker,
                fn_constructor_args=[work],
                batch_size=_BLOCK,
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=workers),
            )
            for done in dataset.iter_rows():
                row = None if done["row"] is None else json.loads(done["row"])
                yield Done(done["position"], row, done["stop"])
    finally:
        if began:
            ray.shutdown()


class Worker:
    """An actor: a client, and the loop that it lives in."""

    def __init__(self, work: Work) -> None:
        self._arrow = needed("pyarrow", "--ray", extra="ray")
        self._work = work
        self._runner = asyncio.Runner()
        self._sender = self._runner.run(self._connected(AsyncExitStack()))

    def __call__(self, table: Any) -> Any:
        """Rows of a block."""
        done = self._runner.run(self._all(table.to_pylist()))
        columns: dict[str, list[Any]] = {
            "position": [one.position for one in done],
            "row": [None if one.row is None else json.dumps(one.row) for one in done],
            "stop": [one.stop for one in done],
        }
        types = {"position": self._arrow.int64(), "row": self._arrow.string(), "stop": self._arrow.string()}
        return self._arrow.table(columns, schema=self._arrow.schema(types))

    async def _connected(self, stack: AsyncExitStack) -> Sender:
        work = self._work
        self._stack = stack  # it is closed with the process
        client = await stack.enter_async_context(
            connect(work.url, work.bundle, api_key=work.api_key, seconds=work.timeout, connections=work.max_concurrency)
        )
        return Sender(
            client,
            bundle=work.identity,
            most_bytes=work.most_bytes,
            top_k=work.top_k,
            protocol=work.protocol,
            stop=work.stop,
            max_concurrency=work.max_concurrency,
            patience=work.patience,
            progress=Progress(),
        )

    async def _all(self, block: list[dict[str, Any]]) -> list[Done]:
        return list(await asyncio.gather(*(self._one(**entry) for entry in block)))

    async def _one(self, position: int, id: str, path: bytes, content: bytes | None, problem: str | None) -> Done:  # noqa: A002  # the column's name
        item = Item(id, path.decode("utf-8", "surrogatepass"), content, problem)
        try:
            return Done(position, await self._sender.row(item), None)
        except (StopJobError, MissingExtraError) as error:
            return Done(position, None, str(error))


def slabs(items: Iterable[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """Cut a stream into lists that fit into memory."""
    following = iter(items)
    while first := list(itertools.islice(following, 1)):
        slab, size = first, len(first[0][1].content or b"")
        while len(slab) < _SLAB_ITEMS and size < _SLAB_BYTES and (more := next(following, None)):
            slab.append(more)
            size += len(more[1].content or b"")
        yield slab


def _table(arrow: Any, items: list[tuple[int, Item]]) -> Any:
    schema = arrow.schema(
        {
            "position": arrow.int64(),
            "id": arrow.string(),
            "path": arrow.binary(),  # a name that is not UTF-8 has halves of surrogate pairs, which no string may
            "content": arrow.large_binary(),
            "problem": arrow.string(),
        }
    )
    entries = [
        {"position": position, **vars(item), "path": item.path.encode("utf-8", "surrogatepass")}
        for position, item in items
    ]
    return arrow.Table.from_pylist(entries, schema=schema)
