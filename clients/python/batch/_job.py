"""A job: inputs in, rows out, whatever happens on the way."""

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from resnet_ensemble.client._client import AsyncClient
from resnet_ensemble.client._errors import ConnectionFailedError, StatusError
from resnet_ensemble.client._protocol import Options
from resnet_ensemble.client._retries import retryable
from resnet_ensemble.client._types import Info
from resnet_ensemble.client.batch import _ray
from resnet_ensemble.client.batch._extras import MissingExtraError
from resnet_ensemble.client.batch._inputs import PATH_COLUMN, Columns, Inputs
from resnet_ensemble.client.batch._output import Output, OutputError, form_of
from resnet_ensemble.client.batch._places import InputError, Item
from resnet_ensemble.client.batch._progress import Progress
from resnet_ensemble.client.batch._reader import Reader
from resnet_ensemble.client.batch._rows import Row
from resnet_ensemble.client.batch._selection import Seen, sampled
from resnet_ensemble.client.batch._sender import Sender, StopJobError
from resnet_ensemble.client.batch._servers import connect
from resnet_ensemble.client.batch._writer import SHARD_SECONDS, Writer

_AHEAD = 32  # inputs in hand beyond those in flight: read ahead, or waiting for another attempt
_TICK = 1.0  # seconds

Order: TypeAlias = Literal["completion", "input"]
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncClient]]


@dataclass(frozen=True)
class Job:
    """What to classify, how, and where the rows go.

    - inputs: folders, patterns, lists, archives, addresses, or "-"; see batch._inputs
    - output: a folder for shards, or one file that ends in .jsonl or .parquet
    - url, api_key: the server; by default as for a Client
    - bundle: classify in this process with this bundle instead
    - ray: do it in so many actors of Ray, each with the server or the bundle
    - top_k, protocol, stop: as in Client.classify
    - columns: names of the columns of lists; root: what relative paths in lists begin from
    - format: of the shards in a folder, "jsonl" or "parquet"; order: of the rows, as they are done or as the inputs
      (those of a later run, of new inputs or of errors done again, come after those that there are)
    - shard_rows: rows in a shard; what was not in one when a job is killed is done again
    - max_concurrency: requests in flight at most; how many there are follows the server
    - limit: take the first so many inputs; sample: take about this share of them
    - max_errors: stop when a run had more error rows than this
    - retry_errors: first take away the error rows that there are, and do their inputs again
    - force: begin again if the configuration or the bundle changed since the output was begun
    - timeout: seconds for an answer; patience: seconds without any answer after which the job stops
    """

    inputs: tuple[str, ...]
    output: Path
    url: str | None = None
    api_key: str | None = None
    bundle: Path | None = None
    ray: int | None = None
    top_k: int = 5
    protocol: str | None = None
    stop: str | None = None
    columns: Columns = PATH_COLUMN
    root: str | None = None
    format: str = "jsonl"
    order: Order = "completion"
    shard_rows: int = 1000
    max_concurrency: int = 64
    limit: int | None = None
    sample: float | None = None
    max_errors: int | None = None
    retry_errors: bool = False
    force: bool = False
    timeout: float = 60.0
    patience: float = 600.0

    def configuration(self, bundle: str, protocol: str, stop: str | None) -> dict[str, object]:
        """What all rows of an output have in common. `protocol` and `stop` are those of the server, if need be."""
        return {
            "format": form_of(self.output, self.format),
            "inputs": list(self.inputs),
            "root": self.root,
            "columns": dict(vars(self.columns)),
            "top_k": self.top_k,
            "protocol": self.protocol or protocol,
            "stop": self.stop or stop,
            "order": self.order,
            "bundle": bundle,
        }

    def items(self) -> Inputs:
        """Every input."""
        return Inputs(self.inputs, columns=self.columns, root=self.root, sort=self.order == "input")

    def chosen(self, inputs: Inputs) -> Iterator[Item]:
        """Those of the sample, up to the limit."""
        return itertools.islice(sampled(inputs, self.sample), self.limit)

    def count(self) -> int | None:
        """About how many there are, where that can be told without reading them."""
        total = self.items().count()
        if total is not None and self.sample is not None:
            total = round(total * self.sample)
        return total if total is None or self.limit is None else min(total, self.limit)

    def connect(self) -> AbstractAsyncContextManager[AsyncClient]:
        """Where the pictures go."""
        return connect(
            self.url, self.bundle, api_key=self.api_key, seconds=self.timeout, connections=self.max_concurrency
        )


@dataclass(frozen=True)
class Summary:
    """How a job ended.

    - rows, errors: of this run; total_rows, total_errors: in the output
    - skipped: inputs that had a row already, or were named twice; left_out: files that are no pictures by their suffix
    - requests: sent, with `refusals` (429, 503, timeouts) among them
    - files: where the rows are
    - stopped: why it ended before its inputs did, or None; signal: the one that asked for it
    """

    rows: int
    errors: int
    total_rows: int
    total_errors: int
    skipped: int
    left_out: int
    seconds: float
    requests: int
    refusals: int
    views_used: int
    views_planned: int
    files: tuple[Path, ...]
    stopped: str | None = None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 3 with error rows; 1 if it had to stop; 128 and the signal's number (130 for Ctrl-C) if told to."""
        if self.signal is not None:
            return 128 + self.signal
        if self.stopped is not None:
            return 1
        return 3 if self.total_errors else 0


def run(
    job: Job,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda message: None,
    connect: Connect | None = None,
) -> Summary:
    """Do a job, or what is left of it. Ctrl-C and SIGTERM end it early and well, a second one ends the process.

    Where an event loop runs already, as in Jupyter, it is done in a thread: Ctrl-C ends it well, SIGTERM does not.

    - on_progress: called every second
    - tell: given a sentence when something happens that a person wants to know
    - connect: gives the client to use; by default what the job says

    Raises OutputError, InputError, MissingExtraError, BundleUnusableError, and ResnetError if no server of ours
    answers at the beginning.
    """
    doing = _Run(job, on_progress, tell)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(doing.run(connect or job.connect))
    with futures.ThreadPoolExecutor(1, thread_name_prefix="job") as pool:
        summary = pool.submit(asyncio.run, doing.run(connect or job.connect))
        while True:
            try:
                while not summary.done():
                    futures.wait([summary], _TICK)  # a Ctrl-C that comes just before a thread waits does not wake it
                return summary.result()
            except KeyboardInterrupt:
                doing.interrupt()


def _most_bytes(served: Info) -> int | None:
    limit = served.limits.get("max_image_bytes")
    return None if limit is None else int(limit)


class _Run:
    def __init__(self, job: Job, on_progress: Callable[[Progress], None], tell: Callable[[str], None]) -> None:
        self._job = job
        self._on_progress = on_progress
        self._tell = tell
        self._progress = Progress()
        self._inputs = job.items()
        self._stop: Callable[[], None] = lambda: None
        self._reason: str | None = None
        self._signal: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def interrupt(self) -> None:
        """Do what Ctrl-C does, from another thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, signal.SIGINT)

    async def run(self, connect: Connect) -> Summary:
        began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._inputs.check()
        async with connect() as client:
            served = await self._served(client)
            self._inputs.most_bytes = _most_bytes(served)
            configuration = self._job.configuration(served.bundle, served.protocol, served.stop)
            with Output(self._job.output, form=self._job.format) as output:
                try:
                    self._begin(output, configuration)
                except OSError as error:
                    raise OutputError(f"{self._job.output} can't be written: {error}") from error
                with self._signals():
                    if self._reason is None:  # not interrupted yet
                        if self._job.ray is None:
                            await self._classify(client, served, output)
                        else:
                            await self._classify_with_ray(self._job.ray, served, output)
                if self._reason is None:
                    try:
                        output.finish()
                    except OSError as error:
                        self._halt(f"the rows can't be written: {error}")
                return self._summary(output, time.monotonic() - began)

    def _begin(self, output: Output, configuration: dict[str, object]) -> None:
        """Raises OutputError and OSError."""
        lost = output.begin(configuration, force=self._job.force)
        if lost is not None:
            self._tell(f"beginning again: {lost}")
        if self._job.retry_errors:
            self._tell(f"doing {output.drop_errors():,} inputs again that have error rows")
        elif output.rows:
            self._tell(f"resuming: there are {output.rows:,} rows already")

    async def _served(self, client: AsyncClient) -> Info:
        """What the server serves, when it does."""
        latest = time.monotonic() + self._job.patience
        told = False
        while True:
            try:
                return await client.info()
            except (ConnectionFailedError, StatusError) as error:
                passing = not isinstance(error, StatusError) or retryable(error.status)
                if not passing or self._reason is not None or time.monotonic() > latest:
                    raise
                if not told:
                    self._tell(f"waiting up to {self._job.patience:g} s for the server: {error}")
                    told = True
                await asyncio.sleep(0.5)

    async def _classify(self, client: AsyncClient, served: Info, output: Output) -> None:
        job = self._job
        reader = Reader(self._without_row(output), job.max_concurrency + _AHEAD)
        writer = self._writer(output)
        sender = Sender(
            client,
            bundle=served.bundle,
            most_bytes=_most_bytes(served),
            top_k=job.top_k,
            # Said with every picture: the server may be started again with other defaults.
            protocol=job.protocol or served.protocol,
            stop=job.stop or served.stop,
            max_concurrency=job.max_concurrency,
            patience=job.patience,
            progress=self._progress,
        )

        def stop() -> None:
            reader.stop()
            sender.drain()

        async def one(position: int, item: Item) -> None:
            try:
                row = await sender.row(item)
                if row is not None:
                    self._count(row)
                    reader.release(await writer.add(position, row))
            except (StopJobError, MissingExtraError) as error:
                self._halt(str(error))
            except OSError as error:
                self._halt(f"the rows can't be written: {error}")

        self._stop = stop
        positions = itertools.count()
        async with self._writing(writer), asyncio.TaskGroup() as group:
            try:
                async for item in reader:
                    group.create_task(one(next(positions), item))
            except (InputError, MissingExtraError, OSError) as error:
                self._reason = str(error)  # what was read before is finished

    async def _classify_with_ray(self, workers: int, served: Info, output: Output) -> None:
        job = self._job
        options = Options(job.url, job.api_key)  # those of this environment: the actors have others
        work = _ray.Work(
            url=None if job.bundle else options.base(),
            api_key=None if job.bundle else options.key(),
            bundle=job.bundle and job.bundle.resolve(),
            identity=served.bundle,
            most_bytes=_most_bytes(served),
            top_k=job.top_k,
            protocol=job.protocol or served.protocol,
            stop=job.stop or served.stop,
            max_concurrency=max(1, job.max_concurrency // workers),
            timeout=job.timeout,
            patience=job.patience,
        )
        items = self._without_row(output)
        reader = Reader(_ray.classify(items, work, workers=workers, ordered=job.order == "input"), _AHEAD)
        self._stop = reader.stop
        writer = self._writer(output)
        async with self._writing(writer):
            try:
                async for done in reader:
                    if done.row is None:
                        self._halt(str(done.stop))
                        break
                    self._count(done.row)
                    await writer.add(done.position, done.row)
                    reader.release(1)
            except (InputError, MissingExtraError, OSError) as error:
                self._reason = str(error)

    def _writer(self, output: Output) -> Writer:
        return Writer(output, ordered=self._job.order == "input", shard_rows=self._job.shard_rows)

    @asynccontextmanager
    async def _writing(self, writer: Writer) -> AsyncIterator[None]:
        """Tell the progress meanwhile, and have every row on the disk afterwards."""
        ticking = asyncio.create_task(self._tick(writer))
        threading.Thread(target=self._count_inputs, name="count", daemon=True).start()
        try:
            yield
            await writer.flush()
        except OSError as error:
            self._halt(f"the rows can't be written: {error}")
        finally:
            ticking.cancel()
        self._on_progress(self._progress)

    def _without_row(self, output: Output) -> Iterator[Item]:
        """The inputs to do. It runs in the reader's thread: of a million rows, ids take a while."""
        seen = Seen(output.ids())
        for item in self._job.chosen(self._inputs):
            if seen.add(item.id):
                yield item
            else:
                self._progress.skipped += 1

    def _count_inputs(self) -> None:
        """For the progress; it runs in a thread of its own. What can't be counted is told by the run itself."""
        with suppress(Exception):
            self._progress.total = self._job.count()

    def _count(self, row: Row) -> None:
        progress, most = self._progress, self._job.max_errors
        progress.rows += 1
        progress.views_used += row["views_used"] or 0
        progress.views_planned += row["views_planned"] or 0
        if row["error_code"] is not None:
            progress.errors += 1
            if most is not None and progress.errors > most:
                self._halt(f"more than {most:,} error rows, the last one of {row['path']}: {row['error_message']}")

    def _halt(self, reason: str) -> None:
        """Begin nothing more; the first reason counts."""
        self._reason = self._reason or reason
        self._stop()

    async def _tick(self, writer: Writer) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._on_progress(self._progress)
            try:
                await writer.flush(older_than=SHARD_SECONDS)
            except OSError as error:
                self._halt(f"the rows can't be written: {error}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal ends the job well, a second one the process, whatever a thread of it waits for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def end(number: signal.Signals) -> None:
            for each in usual:
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)
            self._tell("finishing what is in flight; once more to leave at once")
            self._end(number)

        for number in usual:
            loop.add_signal_handler(number, end, number)
        try:
            yield
        finally:
            for number, handler in usual.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self, number: signal.Signals) -> None:
        self._signal = number
        self._halt(f"interrupted by {number.name}")

    def _summary(self, output: Output, seconds: float) -> Summary:
        progress = self._progress
        return Summary(
            rows=progress.rows,
            errors=progress.errors,
            total_rows=output.rows,
            total_errors=output.errors,
            skipped=progress.skipped,
            left_out=self._inputs.left_out,
            seconds=seconds,
            requests=progress.requests,
            refusals=progress.refusals,
            views_used=progress.views_used,
            views_planned=progress.views_planned,
            files=tuple(output.files()),
            stopped=self._reason,
            signal=self._signal,
        )
