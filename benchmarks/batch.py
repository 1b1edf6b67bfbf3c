"""Does a batch job find the server's pace? `resnet-batch` beside fixed numbers of requests in flight, in one run.

    python -m benchmarks.batch [BUNDLE] [--images FOLDER] [--limit 0.25]

The server has a short queue: it refuses what would wait for more than --limit seconds. With too few requests in flight
it is idle at times, with too many it spends its time on refusals. The same pictures go to it, in interleaved rounds,

    resnet-batch   as a batch job that writes its rows
    N in flight    by AsyncClient.classify_many, which sends a picture that was refused again when the server says so
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx2
from tqdm import tqdm

from benchmarks import contestants, pictures
from benchmarks.contestants import HOST, Server
from resnet_ensemble.client import AsyncClient, Prediction
from resnet_ensemble.client.batch import Columns, Job, run
from resnet_ensemble.export import host
from resnet_ensemble.server.settings import SHIPPED_BUNDLE

FIXED = (1, 2, 4, 8, 16, 32, 64)
_DRAWN = 8  # pictures
_REFUSED = 503
_ADAPTIVE = "resnet-batch"


@dataclass(frozen=True)
class Round:
    """Images answered in a second, and the share of the requests that the server refused."""

    rate: float
    refused: float


class Bench:
    """A server with a short queue, and what is sent to it."""

    def __init__(self, server: Server, folder: Path, sent: list[Path], protocol: str) -> None:
        self._server = server
        self._url = f"http://{HOST}:{server.port}"
        self._folder = folder
        self._sent = sent
        self._protocol = protocol

    def fixed(self, flying: int) -> Round:
        """So many requests in flight."""
        return asyncio.run(self._fixed(flying))

    def adaptive(self) -> Round:
        """A job, from its list to its last row."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            listed = Path(folder, "list.jsonl")
            named = ({"id": f"{i}", "path": str(path)} for i, path in enumerate(self._sent))
            listed.write_text("".join(f"{json.dumps(row)}\n" for row in named))
            began = time.monotonic()
            summary = run(
                Job(
                    (str(listed),),
                    Path(folder, "rows"),
                    url=self._url,
                    protocol=self._protocol,
                    columns=Columns(id="id"),
                )
            )
            seconds = time.monotonic() - began
        if summary.exit_code or summary.rows != len(self._sent):
            raise SystemExit(f"the job did not do its work: {summary}")
        return Round(summary.rows / seconds, summary.refusals / summary.requests)

    async def _fixed(self, flying: int) -> Round:
        async with self._client() as (client, statuses):
            began = time.monotonic()
            answers = [
                answer async for answer in client.classify_many(self._sent, protocol=self._protocol, concurrency=flying)
            ]
            seconds = time.monotonic() - began
        failed = [answer for answer in answers if not isinstance(answer, Prediction)]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(answers)} pictures were not answered: {failed[0]}")
        return Round(len(answers) / seconds, statuses[_REFUSED] / statuses.total())

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[tuple[AsyncClient, Counter[int]]]:
        statuses: Counter[int] = Counter()

        async def count(response: httpx2.Response) -> None:
            statuses[response.status_code] += 1

        async with httpx2.AsyncClient(timeout=60, event_hooks={"response": [count]}) as http:
            yield AsyncClient(self._url, max_retries=100, retry_seconds=600, http_client=http), statuses


@contextmanager
def bench(bundle: Path, images: Path | None, limit: float, count: int, protocol: str) -> Iterator[Bench]:
    """Start the server, and write the pictures to files."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, content in enumerate(pictures.draw(_DRAWN) if images is None else pictures.read(images)):
            files.append(Path(folder, f"{i:03}.jpg"))
            files[-1].write_bytes(content)
        with contestants.ours(bundle, Path(folder), limit=limit) as server:
            server.wait_until_ready(files[0].read_bytes(), f"/predict?protocol={protocol}")
            yield Bench(server, Path(folder), [files[i % len(files)] for i in range(count)], protocol)


def measure(bench: Bench, rounds: int) -> dict[str, list[Round]]:
    """Every way in every round, each time in another order."""
    ways: dict[str, Callable[[], Round]] = {_ADAPTIVE: bench.adaptive}
    ways |= {f"{flying} in flight": partial(bench.fixed, flying) for flying in FIXED}
    bench.fixed(FIXED[-1])  # the server has to learn its pace first
    found: defaultdict[str, list[Round]] = defaultdict(list)
    for number in tqdm(range(rounds), "rounds", disable=None):
        for name in random.Random(number).sample(list(ways), len(ways)):  # noqa: S311  # nothing secret
            found[name].append(ways[name]())
    return {name: found[name] for name in ways}


def main() -> None:
    """Parse the command line, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED_BUNDLE)
    parser.add_argument("--images", type=Path, help="a folder of pictures to send (default: drawn JPEGs, 500 x 375)")
    parser.add_argument("--limit", type=float, default=0.25, help="seconds of wait that are allowed (default: 0.25)")
    parser.add_argument("--count", type=int, default=1000, help="pictures in a round (default: 1000)")
    parser.add_argument("--protocol", default="center", help="(default: center)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved (default: 3)")
    given = parser.parse_args()
    with bench(given.bundle, given.images, given.limit, given.count, given.protocol) as prepared:
        found = measure(prepared, given.rounds)
    rates = {name: statistics.median(one.rate for one in rounds) for name, rounds in found.items()}
    best = max(rate for name, rate in rates.items() if name != _ADAPTIVE)
    print("| | images/s | of the best fixed | refused |\n|---|---|---|---|")
    for name, rounds in found.items():
        refused = statistics.median(one.refused for one in rounds)
        print(f"| {name} | {rates[name]:.1f} | {rates[name] / best:.2f} | {100 * refused:.1f} % |")
    print(
        f"\n{given.bundle.name}, {given.protocol}, {given.count} pictures a round, waits of at most {given.limit:g} s; "
        f"{host.cpu().split(' avx')[0]}, {host.cores()} cores, Python {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}, medians of {given.rounds} interleaved rounds"
    )


if __name__ == "__main__":
    main()
