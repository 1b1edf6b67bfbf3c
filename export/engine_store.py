"""The engines built for a bundle on this host, in BUNDLE.engines/ beside it: derived, never in git.

An engine is used only if its fingerprint (graph, calibration, backend, version, device, golden values, limits of the
gate, the code that makes and judges it) is what it would be if it were built now and its file has the recorded hash.
Anything else is built again, and a server that finds nothing better runs FP32, compiled when it starts; both say in the
log what was wrong with the stored one.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter, ValidationError

from resnet_ensemble.export import engines, golden, host, sealed
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engines import (
    BackendUnavailable,
    Engine,
    EngineBuildError,
    EngineLoadError,
    EngineRunError,
    NotInstalled,
    Precision,
)
from resnet_ensemble.export.gate import ERROR_MARGIN, LIMITS
from resnet_ensemble.training.files import read_regular, write_together

log = logging.getLogger(__name__)

REPORT = "engines.json"
# Views in the batches that engines are timed with, and those whose rate decides which engine is the fastest.
TIMED_BATCHES = (1, 10, 40)
DECISIVE_BATCH = 10
# What else makes an engine and judges it; all of it is in its fingerprint.
_GATES = tuple(Path(__file__).with_name(name) for name in ("quantize.py", "precisions.py", "gate.py"))
REMEDY = "export/build_engines.py builds it again"


def _timed(rates: dict[str, float]) -> dict[str, float]:
    if not rates.get(str(DECISIVE_BATCH), 0) > 0:
        raise ValueError(f"there is no rate in batches of {DECISIVE_BATCH}")
    return rates


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
    correlation: float
    unsteadiness: float
    error: float | None
    reference_error: float | None
    views_per_second: Annotated[dict[str, float], AfterValidator(_timed)]
    verdict: str  # `passed`, or why not

    @property
    def rate(self) -> float:
        """Views/s in batches of the size that decides."""
        return self.views_per_second[str(DECISIVE_BATCH)]

    @property
    def key(self) -> str:
        """Its name in the report."""
        return f"{self.member}/{self.backend}/{self.precision}"


@dataclass(frozen=True)
class Choice:
    """Engines that were found to be FP32's ensemble together (choice.py). Errors in %, None without labels."""

    members: tuple[str, ...]  # SHA-256 of the graphs; in any other ensemble they were not found to be anything
    engines: dict[str, str]  # SHA-256 by member; one that is missing gets FP32, compiled when a server starts
    among: str  # a hash of what was chosen from
    pictures: str  # a hash of what was compared on
    images: int
    agreement: float
    difference: float
    error: float | None
    reference_error: float | None
    refused: int  # combinations that would have been faster


def graphs(bundle: Bundle) -> tuple[str, ...]:
    """The SHA-256 of each member's graph."""
    return tuple(member.sha256 for member in bundle.manifest.members)


@dataclass(frozen=True)
class Stored:
    """A valid engine: what was found of it, and its file's content."""

    record: Record
    content: bytes


_RECORDS = TypeAdapter(dict[str, Record])
_CHOICE = TypeAdapter(Choice | None)


class EngineStore:
    """Finds and keeps the engines of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._records: dict[str, Record] | None = None
        self._choice: Choice | None = None
        path = bundle.path.resolve()
        self.folder = path.with_name(f"{path.name}.engines")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Only one process builds at a time; a second one waits, and then finds what the first has built."""
        import fcntl  # noqa: PLC0415  # which Windows lacks, where a server can run

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another process builds engines in %s; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._records = None
            yield

    def find(self, member: Member, backend: str, precision: Precision, calibration: str | None = None) -> Stored | None:
        """An engine that is still valid, or None. Without `calibration`, one of any will do."""
        record = self.current(member, backend, precision)
        if record is None or (calibration is not None and record.calibration != calibration):
            return None
        return self._read(record)

    def passed(self, member: Member, backend: str | None = None) -> list[Record]:
        """Of the valid engines that passed the gate, the fastest first; of one backend or of all that run here.

        No backend is imported that has no engine.
        """
        found = [
            record
            for record in self.records().values()
            if (record.member, record.verdict) == (member.name, "passed")
            and backend in (None, record.backend)
            and engines.runs(record.backend, record.precision)
            and self.current(member, record.backend, record.precision)
        ]
        return sorted(found, key=lambda record: record.rate, reverse=True)

    def best(self, member: Member, backend: str | None = None) -> Stored | None:
        """The engine that was chosen for a member, or of one backend, or without a choice, the fastest that passed.

        If what was chosen for another member can't be used any more, FP32: nothing else was compared together.
        """
        passed = self.passed(member, backend)
        choice = self.choice() if backend is None else None
        if backend is None and not choice and self._choice:
            _warn(
                f"of the engines in {self.folder} that were chosen together, {', '.join(self._missing(self._choice))} "
                f"can't be used here, so FP32 is; install what is missing, or {REMEDY}"
            )
            passed = [record for record in passed if record.precision == "fp32"]
        if choice:
            chosen = choice.engines.get(member.name)
            if chosen is None:
                return None
            # If its file is damaged, FP32.
            passed = [record for record in passed if record.sha256 == chosen or record.precision == "fp32"]
            passed.sort(key=lambda record: record.sha256 != chosen)
        return next(filter(None, map(self._read, passed)), None)

    def choice(self) -> Choice | None:
        """What was chosen for all members together, if all of it is still valid."""
        self.records()
        return None if self._choice is None or self._missing(self._choice) else self._choice

    def _missing(self, choice: Choice) -> list[str]:
        """Engines that were chosen and are not valid here."""
        missing = []
        for member in self.bundle.manifest.members:
            chosen = choice.engines.get(member.name)
            if chosen and chosen not in {record.sha256 for record in self.passed(member)}:
                of_member = [record for record in self.records().values() if record.member == member.name]
                named = [record.key for record in of_member if record.sha256 == chosen]
                missing.append(named[0] if named else f"one of {member.name}")
        return missing

    def choose(self, choice: Choice) -> None:
        """Store a choice."""
        self._write(self.records(), choice, {})
        self._choice = choice

    def add(self, record: Record, content: bytes) -> None:
        """Store an engine and the report that names it."""
        records = self.records() | {record.key: record}
        self._write(records, self._choice, {self.folder / record.file: content})
        self._records = records

    def _write(self, records: dict[str, Record], choice: Choice | None, files: dict[Path, bytes]) -> None:
        report = {
            "cpu": host.cpu(),
            "engines": {name: asdict(kept) for name, kept in sorted(records.items())},
            "choice": choice and asdict(choice),
        }
        write_together({**files, self.folder / REPORT: sealed.dumps(report)})

    def records(self) -> dict[str, Record]:
        """Everything in the report, valid or not."""
        if self._records is None:
            self._records, self._choice = self._report()
            if self._choice and self._choice.members != graphs(self.bundle):
                self._choice = None
        return self._records

    def _report(self) -> tuple[dict[str, Record], Choice | None]:
        file = self.folder / REPORT
        try:
            report = sealed.loads(read_regular(file))
            return _RECORDS.validate_python(report["engines"]), _CHOICE.validate_python(report["choice"])
        except FileNotFoundError:  # nothing was built yet
            return {}, None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        _warn(f"{file} is damaged or of another version, so no engine in it is used ({reason}); {REMEDY}")
        return {}, None

    def current(self, member: Member, backend: str, precision: Precision) -> Record | None:
        """The record of an engine, if it would be built in the same way now."""
        record = self.records().get(f"{member.name}/{backend}/{precision}")
        if record is None:
            return None
        wanted = fingerprint(self.bundle, member, backend, precision, record.calibration)
        return record if record.fingerprint == wanted else None

    def _read(self, record: Record) -> Stored | None:
        file = self.folder / record.file
        try:
            content = read_regular(file)
        except OSError as error:
            log.warning("%s can't be read (%s), so it is not used; %s", file, error.strerror, REMEDY)
            return None
        if hashlib.sha256(content).hexdigest() != record.sha256:
            log.warning("%s is not the file that %s describes, so it is not used; %s", file, REPORT, REMEDY)
            return None
        return Stored(record, content)


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
        "limits": [asdict(LIMITS[precision]), ERROR_MARGIN],
        "device": implementation.identity(member.preprocessing),
        "code": [_hash(file) for file in (*engines.sources(backend), *_GATES)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def _warn(message: str) -> None:
    """Once, however often a store or an engine is opened."""
    log.warning("%s", message)


@lru_cache
def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def open_engine(bundle: Bundle, member: Member, backend: str | None = None, threads: int = 1) -> Engine:
    """The fastest engine that was built and passed, otherwise FP32 compiled now; checked against the golden pictures.

    FP32 is ONNX Runtime's, on the GPU if it can use one.

    `threads`: of the CPU, for each run. Raises BundleError, BackendUnavailable.
    """
    graph = bundle.read(member)
    store = EngineStore(bundle)
    stored = store.best(member, backend)
    name = stored.record.backend if stored else backend or _default(store)
    precision: Precision = stored.record.precision if stored else "fp32"
    if stored is None and any(record.member == member.name for record in store.records().values()):
        log.warning(
            "%s: no engine in %s both passed and is of this bundle, host and backend version, so FP32 is compiled now; "
            "export/build_engines.py builds them again",
            member.name,
            store.folder,
        )
    implementation = engines.backend(name)
    try:
        compiled = stored.content if stored else implementation.compile(graph, precision, member.preprocessing)
        engine = implementation.load(compiled, precision, threads)
        try:
            difference = golden.check(engine, bundle, member, allowed=tolerance(bundle, precision))
        except BaseException:
            engine.close()  # on a GPU, nothing else frees its memory
            raise
    except (EngineBuildError, EngineRunError, EngineLoadError) as error:
        remedy = ""
        if backend is None and name in engines.ON["cuda"]:
            remedy = f". To run on the CPU, ask for the backend {engines.DEFAULT}"
        elif isinstance(error, EngineLoadError):
            raise
        raise BackendUnavailable(f"{member.name} can't run on {name}: {error}{remedy}") from None
    info = engine.info
    log.info("%s on %s %s %s: golden check %.1e", member.name, info.backend, info.version, info.precision, difference)
    return engine


def _default(store: EngineStore) -> str:
    """What runs a member without an engine: ONNX Runtime, on the GPU if it can use one.

    Where others have engines, and all of them for the CPU, it is the CPU's.
    """
    records = store.records().values()
    if records and not any(record.backend in engines.ON["cuda"] for record in records):
        return engines.DEFAULT
    try:
        engines.backend("onnxruntime-cuda").precisions()
    except BackendUnavailable as why:
        if not isinstance(why, NotInstalled) and import_module("onnxruntime").get_device() == "GPU":
            _warn(f"ONNX Runtime for GPUs is installed and runs on the CPU: {why}")
        return engines.DEFAULT
    return "onnxruntime-cuda"


def tolerance(bundle: Bundle, precision: Precision) -> float:
    """By how much an engine may differ from the golden probabilities."""
    return bundle.manifest.golden_tolerance if precision == "fp32" else LIMITS[precision].difference
