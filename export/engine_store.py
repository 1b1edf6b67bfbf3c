"""The engines built for a bundle on this host, in BUNDLE.engines/ beside it: derived, never in git.

An engine is used only if its fingerprint (graph, calibration, backend, version, device, golden values) is what it would
be if it were built now and its file has the recorded hash. Anything else is built again.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from resnet_ensemble.export import engines, golden, host
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engines import Engine, Precision
from resnet_ensemble.export.gate import LIMITS
from resnet_ensemble.training.files import write_atomically

log = logging.getLogger(__name__)

REPORT = "engines.json"
# The batch size whose rate decides which engine is the fastest.
DECISIVE_BATCH = 10


@dataclass(frozen=True)
class Record:
    """What was found of one engine. Rates in views/s by batch size, one run at a time; errors in %."""

    member: str
    backend: str
    version: str
    precision: Precision
    calibration: str  # identity of what INT8 was calibrated on; empty for other precisions
    fingerprint: str
    file: str
    sha256: str
    size: int  # bytes
    build_seconds: float
    golden_difference: float
    gate_pictures: str
    gate_views: int
    agreement: float
    difference: float
    error: float | None
    reference_error: float | None
    views_per_second: dict[str, float]
    verdict: str  # `passed`, or why not

    @property
    def key(self) -> str:
        """Its name in the report."""
        return f"{self.member}/{self.backend}/{self.precision}"


class EngineStore:
    """Finds and keeps the engines of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        path = bundle.path.resolve()
        self.folder = path.with_name(f"{path.name}.engines")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Only one process builds at a time; a second one waits, and then finds what the first has built."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find(self, member: Member, backend: str, precision: Precision, calibration: str | None = None) -> Record | None:
        """What was found of an engine that is still valid, or None. Without `calibration`, any will do."""
        record = self.records().get(f"{member.name}/{backend}/{precision}")
        if record is None or (calibration is not None and record.calibration != calibration):
            return None
        if record.fingerprint != fingerprint(self.bundle, member, backend, precision, record.calibration):
            return None
        return record if self._content(record) is not None else None

    def read(self, record: Record) -> bytes:
        """The engine of a record that `find` has just given."""
        content = self._content(record)
        assert content is not None
        return content

    def best(self, member: Member, backend: str | None = None) -> Record | None:
        """The fastest valid engine that passed the gate, of one backend or of all that are installed."""
        found = [
            record
            for name, precision in engines.available()
            if backend in (None, name) and (record := self.find(member, name, precision)) and record.verdict == "passed"
        ]
        return max(found, key=lambda record: record.views_per_second[str(DECISIVE_BATCH)], default=None)

    def add(self, record: Record, content: bytes) -> None:
        """Store an engine: first its file, then the report that names it."""
        write_atomically(self.folder / record.file, content)
        records = self.records() | {record.key: record}
        report = {"cpu": host.cpu(), "engines": {name: asdict(kept) for name, kept in sorted(records.items())}}
        write_atomically(self.folder / REPORT, f"{json.dumps(report, indent=1)}\n".encode())

    def records(self) -> dict[str, Record]:
        """Everything in the report, valid or not."""
        try:
            report = json.loads((self.folder / REPORT).read_text())
            return {name: Record(**values) for name, values in report["engines"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or of another version: build again
            return {}

    def _content(self, record: Record) -> bytes | None:
        try:
            content = (self.folder / record.file).read_bytes()
        except FileNotFoundError:
            return None
        return content if hashlib.sha256(content).hexdigest() == record.sha256 else None


def fingerprint(bundle: Bundle, member: Member, backend: str, precision: Precision, calibration: str) -> str:
    """A hash of everything that an engine depends on. Raises BackendUnavailable."""
    manifest = bundle.manifest
    implementation = engines.backend(backend)
    parts = {
        "graph": member.sha256,
        "preprocessing": asdict(member.preprocessing),
        "golden": [[golden.sha256, golden.probabilities[member.name]] for golden in manifest.golden],
        "tolerance": [manifest.golden_protocol, manifest.golden_tolerance],
        "backend": [backend, implementation.version(), precision],
        "calibration": calibration,
        "device": implementation.identity(member.preprocessing),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_engine(bundle: Bundle, member: Member, backend: str | None = None) -> Engine:
    """The fastest engine that was built and passed, otherwise FP32 compiled now; checked against the golden pictures.

    Raises BundleError, BackendUnavailable, EngineBuildError.
    """
    graph = bundle.read(member)
    store = EngineStore(bundle)
    record = store.best(member, backend)
    if record is None:
        name = backend or engines.DEFAULT
        implementation = engines.backend(name)
        engine = implementation.load(implementation.compile(graph, "fp32", member.preprocessing), "fp32")
    else:
        engine = engines.backend(record.backend).load(store.read(record), record.precision)
    allowed = tolerance(bundle, "fp32" if record is None else record.precision)
    difference = golden.check(engine, bundle, member, allowed=allowed)
    info = engine.info
    log.info("%s on %s %s %s: golden check %.1e", member.name, info.backend, info.version, info.precision, difference)
    return engine


def tolerance(bundle: Bundle, precision: Precision) -> float:
    """By how much an engine may differ from the golden probabilities."""
    return bundle.manifest.golden_tolerance if precision == "fp32" else LIMITS[precision].difference
