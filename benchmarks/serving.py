"""What serving costs beside the bare engines, in one run.

    make bench                       # or: python benchmarks/serving.py [BUNDLE]

Images per second with every member and the bundle's own protocol, of

    bare      engines alone on ready-made views, one run a core
    pipeline  encoded image to prediction in one process, no HTTP
    http      the server in a process of its own, at 1, 8 and 32 concurrent requests, with latencies

The rounds are interleaved and medians are printed, because machines drift; the ratio to `bare` is what to compare.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import numpy as np

from resnet_ensemble.export import engine_store, host
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options
from resnet_ensemble.server.settings import SHIPPED_BUNDLE, Settings
from resnet_ensemble.training.views import PROTOCOLS

CONCURRENCY = (1, 8, 32)


@dataclass
class Cell:
    """Rates of all rounds in images/s, and latencies of all requests in seconds."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def described(engines: list[Engine]) -> str:
    """Which engines ran: "onnxruntime 1.32.0 fp32"."""
    return ", ".join(sorted({f"{e.info.backend} {e.info.version} {e.info.precision}" for e in engines}))


def bare(engines: list[Engine], views: int, side: int, seconds: float) -> float:
    """Images/s of the engines alone, one thread a core, each running whole images."""
    batch = np.random.default_rng(0).integers(0, 256, (views, side, side, 3), np.uint8)
    end = time.perf_counter() + seconds

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() < end:
            for engine in engines:
                engine.run(batch)
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(host.cores()) as pool:
        done = sum(pool.map(work, range(host.cores())))
    return done / (time.perf_counter() - began)


async def pipeline(classifier: Classifier, content: bytes, in_flight: int, seconds: float) -> float:
    """Images/s of decoding, views, scheduling and averaging in this process."""
    end, done = time.perf_counter() + seconds, 0

    async def work() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await classifier.classify([content], Options())
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    return done / (time.perf_counter() - began)


async def http(url: str, content: bytes, concurrency: int, seconds: float) -> tuple[float, list[float]]:
    """Images/s and latencies of so many clients, each sending its next request when the last is answered."""
    latencies: list[float] = []
    async with httpx2.AsyncClient(timeout=60) as client:
        end = time.perf_counter() + seconds

        async def work() -> None:
            while (began := time.perf_counter()) < end:
                response = await client.post(f"{url}/predict", content=content, headers={"Content-Type": "image/png"})
                response.raise_for_status()
                latencies.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return len(latencies) / (time.perf_counter() - began), latencies


def serve(bundle: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """A server process, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RESNET_PORT": str(port), "RESNET_BUNDLE": str(bundle)}
    process = subprocess.Popen(
        [sys.executable, "-m", "resnet_ensemble.server"], env=environment, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx2.get(f"{url}/readyz").status_code == httpx2.codes.OK:
                return process, url
        except httpx2.TransportError:
            time.sleep(0.1)
    sys.exit("the server did not start")


def table(cells: dict[str, Cell]) -> str:
    """Medians as a Markdown table."""
    reference = statistics.median(cells["bare"].rates)
    lines = ["| | images/s | of bare | p50 ms | p99 ms |", "|---|---|---|---|---|"]
    for name, cell in cells.items():
        rate = statistics.median(cell.rates)
        times = np.percentile(cell.latencies, (50, 99)) * 1000 if cell.latencies else None
        shown = [f"{value:.1f}" for value in times] if times is not None else ["", ""]
        lines.append(f"| {name} | {rate:.1f} | {rate / reference:.2f} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED_BUNDLE)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell in each round (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    engines = [engine_store.open_engine(bundle, member) for member in manifest.members]
    views, side = len(PROTOCOLS[manifest.protocol]), manifest.members[0].preprocessing.crop
    content = bundle.read(manifest.golden[0])
    classifier = load(Settings(bundle=arguments.bundle), Metrics())
    process, url = serve(arguments.bundle)
    cells = {name: Cell() for name in ("bare", "pipeline", *(f"http x{n}" for n in CONCURRENCY))}
    try:
        for _ in range(arguments.rounds):
            cells["bare"].rates.append(bare(engines, views, side, arguments.seconds))
            cells["pipeline"].rates.append(asyncio.run(pipeline(classifier, content, 8, arguments.seconds)))
            for n in CONCURRENCY:
                rate, latencies = asyncio.run(http(url, content, n, arguments.seconds))
                cells[f"http x{n}"].rates.append(rate)
                cells[f"http x{n}"].latencies += latencies
    finally:
        process.terminate()
        process.wait()
        classifier.close()
    about = (
        f"{bundle.identity}, {len(engines)} members, {manifest.protocol}, {views * len(engines)} views an image, "
        f"{manifest.golden[0].file}; {host.cpu().split(' avx')[0]}, {host.cores()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {described(engines)}, {datetime.now(UTC):%Y-%m-%d}, "
        f"median of {arguments.rounds} interleaved rounds of {arguments.seconds:g} s"
    )
    print(f"{table(cells)}\n\n{about}")
    if arguments.json:
        rows = {name: {"images_per_second": cell.rates} for name, cell in cells.items()}
        arguments.json.write_text(json.dumps({"about": about, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
