"""What serving costs: this server beside its own pipeline without HTTP, and beside other servers, in one run.

    make bench                                        # or: python -m benchmarks.serving [BUNDLE] [--images FOLDER]
    python -m benchmarks.serving --quick              # does it work? The numbers mean nothing

JPEGs go in over HTTP, as files of a form. Measured are

    bare engines   the engines on ready-made views, nothing else
    pipeline       encoded picture to prediction in one process, without HTTP
    this server    in a process of its own, with the same engines
    naive server   FastAPI and ONNX Runtime as one writes it first (peers/naive_server.py); also with our engine
    LitServe       with batches of 8, and without (peers/litserve_server.py)

with 1, 8 and 32 clients in closed loops, in interleaved rounds; then in open loops, where requests arrive at random at
shares of the measured capacity; then at four fifths of it for a minute, at even intervals and at random, with a single
view and with ten crops of all members; then at three times the capacity. The other servers compute the same in FP32,
with the same graphs and views, which is checked before anything is measured.

Writes serving-NAME.md, .json and .png into benchmarks/results/, unless other processes took more than 5 % of the CPUs
meanwhile: then the report says that it is none, and lies in build/benchmark/.

How much exact stopping saves depends on how sure the networks are: give --images of the kind that you serve.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import acceptance, report
from benchmarks.contestants import CENTER, EVERY, EXACT, FULL, SINGLE
from benchmarks.extent import QUICK, Extent
from benchmarks.jobs import ROOT, kill_children, machine_busy_seconds
from benchmarks.measure import Benchmark
from benchmarks.report import Results
from resnet_ensemble.export import host
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.server.settings import SHIPPED_BUNDLE
from resnet_ensemble.training.files import write_atomically

_CIFAR10 = "cifar10"
_PACKAGES = ("fastapi", "httptools", "litserve", "onnxruntime", "uvicorn", "uvloop")


def measure(bundle: Path, images: Path | None, peers: str, extent: Extent) -> Results:
    """Everything, in one run."""
    opened = Bundle.open(bundle)
    with ExitStack() as stack:
        benchmark = Benchmark(stack, bundle, images, peers, extent)
        ceiling = benchmark.ceiling()
        began, busy, own = time.monotonic(), machine_busy_seconds(), benchmark.cpu_seconds()
        benchmark.run_closed()
        opens, sustained, overloaded = benchmark.run_open(), benchmark.run_sustained(), benchmark.run_overload()
        others = machine_busy_seconds() - busy - (benchmark.cpu_seconds() - own)
        seconds = time.monotonic() - began
        sizes = sum(map(len, benchmark.pictures)) // len(benchmark.pictures)
        about = {
            "bundle": f"{opened.identity}, {', '.join(member.name for member in opened.manifest.members)}",
            **{f"engines, {name}": engines for name, engines in benchmark.engines().items()},
            "pictures": f"{len(benchmark.pictures)} {'drawn' if images is None else 'given'}, {sizes} bytes on average",
            "machine": f"{host.cpu().split(' avx')[0]}, {host.cores()} cores, {platform.system()}",
            "software": f"Python {platform.python_version()}; {_versions(sys.executable)}",
            "other servers": _versions(peers),
            "command": " ".join(["python -m benchmarks.serving", *(Path(word).name or word for word in sys.argv[1:])]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "n": f"{extent.rounds} interleaved rounds of {extent.seconds:g} s a cell, each with new processes, of "
            f"single views {extent.rounds * extent.parts} of {extent.seconds / extent.parts:g} s and every picture at "
            f"least once; open loops {extent.open_rounds} times {extent.open_seconds:g} s a point",
            "other processes": f"{100 * others / seconds / (os.cpu_count() or 1):.1f} % of the CPUs",
        }
        ensembles = [workload.name for workload in benchmark.workloads if workload.name not in SINGLE]
        checks = [
            *acceptance.of_servers(benchmark.closed, CENTER),
            *acceptance.of_servers(benchmark.closed, EVERY),
            acceptance.of_stop_rules(
                benchmark.closed,
                FULL,
                EXACT,
                least=acceptance.EXACT_CIFAR10 if opened.manifest.name == _CIFAR10 else acceptance.EXACT,
            ),
            acceptance.of_fastest(benchmark.closed, FULL, ensembles),
            *acceptance.of_sustained(sustained, benchmark.closed),
            *acceptance.of_overload(overloaded),
        ]
        return Results(
            about=about,
            others=max(0.0, others / seconds / (os.cpu_count() or 1)),
            ceiling=ceiling,
            closed=benchmark.closed,
            open=opens,
            sustained=sustained,
            overload=overloaded,
            acceptance=checks,
            notes=benchmark.notes,
        )


def destination(given: Path | None, *, quick: bool, others: float) -> Path:
    """The folder to write into: only what was measured undisturbed, and in full, lies with the results."""
    if given is not None:
        return given
    return ROOT / "build" / "benchmark" if quick or others > report.CONTENDED else ROOT / "benchmarks" / "results"


def _versions(python: str) -> str:
    """Of the packages that servers consist of."""
    code = (
        "import importlib.metadata as m, json; d = {x.metadata['Name'].lower(): x.version for x in m.distributions()}; "
        f"print(json.dumps({{n: d[n] for n in {_PACKAGES!r} if n in d}}))"
    )
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout  # noqa: S603
    return ", ".join(f"{name} {version}" for name, version in json.loads(printed).items())


def _end(*_: object) -> None:
    """SIGTERM: no server outlives the benchmark, not even one that is just being started."""
    kill_children()
    sys.exit("ended by SIGTERM")


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED_BUNDLE)
    parser.add_argument("--images", type=Path, help="a folder of pictures to send (default: drawn JPEGs, 500 x 375)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell in each round (default: 3)")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of wait allowed under overload (default: 1)")
    parser.add_argument(
        "--peers", default=sys.executable, metavar="PYTHON", help="has the other servers' packages (default: this one)"
    )
    parser.add_argument(
        "--peers-only-center",
        action="store_true",
        help="other servers serve no ten crops: 32 requests of them need much memory without a scheduler",
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, without LitServe, into build/benchmark")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    extent = QUICK if arguments.quick else Extent(arguments.rounds, arguments.seconds, limit=arguments.limit)
    if arguments.peers_only_center:
        extent = replace(extent, of_peers=SINGLE)
    results = measure(arguments.bundle, arguments.images, arguments.peers, extent)
    out = destination(arguments.out, quick=arguments.quick, others=results.others)
    name = Bundle.open(arguments.bundle).manifest.name
    text = report.markdown(results, f"Serving {name}", CENTER)
    write_atomically(out / f"serving-{name}.md", text.encode())
    write_atomically(out / f"serving-{name}.json", report.as_json(results).encode())
    write_atomically(out / f"serving-{name}.png", report.draw(results, CENTER))
    print(text)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
