"""What needs no server: the engines alone, and the whole pipeline in one process.

bare      engines on ready-made views, one thread a core
pipeline  encoded picture to prediction: decoding, views, batches, averaging; no HTTP
"""

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.jobs import serve_jobs
from resnet_ensemble.export import host
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.server import images
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training.views import make_blocks

# Views of one piece of work of a thread: a batch of the largest size that engines are timed at.
_VIEWS = 40


def bare(classifier: Classifier, picture: bytes, protocol: str, seconds: float) -> dict[str, Any]:
    """Images/s of the engines, on batches as large as the server makes them at most."""
    image = images.decode(picture, max_pixels=2**30)
    members = classifier.bundle.manifest.members
    runs: list[tuple[Engine, NDArray[np.uint8]]] = []
    views = sum(len(block) for block in make_blocks(image, members[0].preprocessing, protocol))
    group = math.ceil(_VIEWS / views)  # pictures of one piece of work
    for member, engine, cost in zip(members, classifier.engines, classifier.costs, strict=True):
        for block in make_blocks(image, member.preprocessing, protocol):
            count, height, width, _ = block.shape
            size = max(1, cost.batch * member.preprocessing.crop**2 // (height * width))
            batch = np.concatenate([block] * group)  # (count * group, h, w, 3)
            runs += [(engine, batch[start : start + size]) for start in range(0, count * group, size)]
    began = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() < began + seconds:
            for engine, batch in runs:
                engine.run(batch)
            done += group
        return done

    with ThreadPoolExecutor(host.cores()) as pool:
        done = sum(pool.map(work, range(host.cores())))
    return {"seconds": time.perf_counter() - began, "images": done, "latencies": []}


async def pipeline(
    classifier: Classifier, pictures: Sequence[bytes], options: Options, concurrency: int, seconds: float, least: int
) -> dict[str, Any]:
    """As the closed loop of load.py, with a call in place of a request. Raises ApiError."""
    latencies: list[float] = []
    began = time.perf_counter()

    begun = 0

    async def client() -> None:
        nonlocal begun
        while (now := time.perf_counter()) < began + seconds or begun < least:
            picture = pictures[begun % len(pictures)]
            begun += 1
            (answer,) = await classifier.classify([picture], options)
            if isinstance(answer, ApiError):
                raise answer
            answer.model_dump_json()  # what a server sends
            latencies.append(time.perf_counter() - now)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return {"seconds": time.perf_counter() - began, "images": len(latencies), "latencies": latencies}


def main() -> None:
    """Do jobs with one bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="a folder; its files are classified in turn")
    arguments = parser.parse_args()
    pictures = [file.read_bytes() for file in sorted(arguments.pictures.iterdir())]
    settings = Settings(bundle=arguments.bundle, max_wait_seconds=3600, timeout_seconds=3600)
    classifier = load(settings, Metrics())

    def do(system: str, query: dict[str, str], concurrency: int, seconds: float, least: int = 0) -> dict[str, Any]:
        if system == "bare":
            return bare(classifier, pictures[0], query["protocol"], seconds)
        options = Options.model_validate(query)
        return asyncio.run(pipeline(classifier, pictures, options, concurrency, seconds, least))

    try:
        serve_jobs(do)
    finally:
        classifier.close()


if __name__ == "__main__":
    main()
