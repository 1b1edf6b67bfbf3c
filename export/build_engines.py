"""Build, verify and time every engine that this host can run for a bundle.

    python export/build_engines.py                    # the bundle in the repository
    python export/build_engines.py PATH/TO/BUNDLE

Hashes are verified first; each engine must give the bundle's golden probabilities; what was found is written to
BUNDLE.engines/ beside the bundle, where the server looks for it. A second run reuses what is still valid.
"""

import argparse
import hashlib
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("resnet_ensemble") is None:  # run by a Python without us: take the one of `make install`
    python = REPOSITORY / ".venv" / "bin" / "python"
    if not python.exists():
        sys.exit(
            f"build_engines: resnet_ensemble is not installed; run `make install` in {REPOSITORY}, then this again"
        )
    os.execv(python, [str(python), *sys.argv])  # noqa: S606  # no shell is wanted

import numpy as np
from tqdm import tqdm

from resnet_ensemble.export import engines, golden
from resnet_ensemble.export.bundle import Bundle, BundleError, Member
from resnet_ensemble.export.engine_store import REPORT, EngineStore, Record, fingerprint

SHIPPED = REPOSITORY / "bundles" / "cifar10"
TIMED_BATCHES = (1, 10, 40)
SECONDS_PER_TIMING = 0.4


def build(bundle: Bundle, member: Member, backend: str) -> tuple[Record, bytes]:
    """Compile a member, check it against the golden probabilities and time it. Raises BundleError."""
    implementation = engines.backend(backend)
    began = time.monotonic()
    compiled = implementation.compile(bundle.read(member))
    engine = implementation.load(compiled)
    seconds = time.monotonic() - began
    try:
        record = Record(
            member=member.name,
            backend=backend,
            version=engine.info.version,
            precision=engine.info.precision,
            fingerprint=fingerprint(bundle, member, backend),
            file=f"{member.name}-{backend}-{engine.info.precision}.engine",
            sha256=hashlib.sha256(compiled).hexdigest(),
            build_seconds=round(seconds, 3),
            golden_difference=golden.check(engine, bundle, member),
            views_per_second={str(n): rate(engine, member.preprocessing.crop, n) for n in TIMED_BATCHES},
        )
    finally:
        engine.close()
    return record, compiled


def rate(engine: engines.Engine, side: int, batch: int) -> float:
    """Views per second of one run at a time: the median over runs, after a warm-up."""
    views = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    engine.run(views)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS_PER_TIMING
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        engine.run(views)
        seconds.append(time.perf_counter() - began)
    return round(batch / statistics.median(seconds), 1)


def build_all(bundle: Bundle) -> list[tuple[Record, bool]]:
    """Every (member, backend) of this host: its record, and whether a stored engine was reused."""
    for member in bundle.manifest.members:
        bundle.read(member)
    for picture in bundle.manifest.golden:
        bundle.read(picture)
    store = EngineStore(bundle)
    found: list[tuple[Record, bool]] = []
    wanted = [(member, backend) for member in bundle.manifest.members for backend in engines.BACKENDS]
    for member, backend in tqdm(wanted, "engines", unit="engine", disable=None):
        stored = store.find(member, backend)
        if stored:
            found.append((stored[0], True))
            continue
        record, compiled = build(bundle, member, backend)
        store.add(record, compiled)
        found.append((record, False))
    return found


def table(found: list[tuple[Record, bool]], tolerance: float) -> str:
    """The records as aligned text."""
    rates = [f"views/s x{n}" for n in TIMED_BATCHES]
    rows = [["member", "backend", "precision", *rates, "max |dp|", "build s", "verdict"]]
    for record, reused in found:
        rows.append(
            [
                record.member,
                f"{record.backend} {record.version}",
                record.precision,
                *(f"{record.views_per_second[str(n)]:,.0f}" for n in TIMED_BATCHES),
                f"{record.golden_difference:.1e}",
                f"{record.build_seconds:.2f}",
                f"within {tolerance:g}" + (", reused" if reused else ", built"),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=SHIPPED, help="a bundle's folder (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        bundle = Bundle.open(arguments.bundle)
        found = build_all(bundle)
    except (BundleError, engines.BackendUnavailable, OSError) as problem:
        sys.exit(f"build_engines: {problem}")
    print(table(found, bundle.manifest.golden_tolerance))
    print(f"{bundle.identity}: written to {EngineStore(bundle).folder / REPORT}")


if __name__ == "__main__":
    main()
