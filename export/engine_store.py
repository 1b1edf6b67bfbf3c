"""The engines built for a bundle on this host, in BUNDLE.engines/ beside it: derived, never in git.

An engine is used only if its fingerprint (graph, backend, version, CPU, golden values) is what it would be if it were
built now and its file has the recorded hash. Anything else is built again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from resnet_ensemble.export import engines, host
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.training.files import write_atomically

REPORT = "engines.json"


@dataclass(frozen=True)
class Record:
    """What was found of one engine. Rates in views/s by batch size, one run at a time."""

    member: str
    backend: str
    version: str
    precision: str
    fingerprint: str
    file: str
    sha256: str
    build_seconds: float
    golden_difference: float
    views_per_second: dict[str, float]


class EngineStore:
    """Finds and keeps the engines of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        path = bundle.path.resolve()
        self.folder = path.with_name(f"{path.name}.engines")

    def find(self, member: Member, backend: str) -> tuple[Record, bytes] | None:
        """A stored engine that is still valid, with its content, or None."""
        record = self._records().get(f"{member.name}/{backend}")
        if record is None or record.fingerprint != fingerprint(self.bundle, member, backend):
            return None
        try:
            content = (self.folder / record.file).read_bytes()
        except FileNotFoundError:
            return None
        return (record, content) if hashlib.sha256(content).hexdigest() == record.sha256 else None

    def add(self, record: Record, content: bytes) -> None:
        """Store an engine: first its file, then the report that names it."""
        write_atomically(self.folder / record.file, content)
        records = self._records() | {f"{record.member}/{record.backend}": record}
        report = {"cpu": host.cpu(), "engines": {name: asdict(kept) for name, kept in sorted(records.items())}}
        write_atomically(self.folder / REPORT, f"{json.dumps(report, indent=1)}\n".encode())

    def _records(self) -> dict[str, Record]:
        try:
            report = json.loads((self.folder / REPORT).read_text())
            return {name: Record(**values) for name, values in report["engines"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or of another version: build again
            return {}


def fingerprint(bundle: Bundle, member: Member, backend: str) -> str:
    """A hash of everything that an engine depends on. Raises BackendUnavailable."""
    manifest = bundle.manifest
    parts = {
        "graph": member.sha256,
        "preprocessing": asdict(member.preprocessing),
        "golden": [[golden.sha256, golden.probabilities[member.name]] for golden in manifest.golden],
        "tolerance": [manifest.golden_protocol, manifest.golden_tolerance],
        "backend": [backend, engines.backend(backend).version()],
        "cpu": host.cpu(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_engine(bundle: Bundle, member: Member, backend: str) -> engines.Engine:
    """A stored engine if it is valid, otherwise one compiled now. Raises BundleError, BackendUnavailable."""
    graph = bundle.read(member)
    implementation = engines.backend(backend)
    stored = EngineStore(bundle).find(member, backend)
    return implementation.load(stored[1] if stored else implementation.compile(graph))
