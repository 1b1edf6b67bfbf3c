"""Who is measured with what: the bundles, the servers, the workloads."""

import http.client
import json
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.jobs import Processes
from benchmarks.load import BOUNDARY, form
from benchmarks.summary import OURS
from resnet_ensemble.export import host, sealed
from resnet_ensemble.export.bundle import MANIFEST, Bundle
from resnet_ensemble.export.engine_store import EngineStore

HOST = "127.0.0.1"
# The bundles that are served: one member and all of them, in FP32 by ONNX Runtime because no engines lie beside them,
# and the bundle as it is, with the engines that build_engines.py found the fastest.
ONE, FP32, BUILT = "one member", "FP32", "built engines"
CENTER, EVERY = "one member, center, FP32", "all members, center, FP32"
SINGLE = (CENTER, EVERY)
FULL, EXACT = "10crop full, FP32", "10crop exact, FP32"
NAIVE, NAIVE_SAME, LITSERVE, LITSERVE_SINGLE = (
    "naive server",
    "naive server, our engine",
    "LitServe",
    "LitServe without batches",
)
_NO_LIMIT = "3600"  # seconds
_START_SECONDS = 120
_LITSERVE_BATCH = 8  # of its documentation


@dataclass(frozen=True)
class Workload:
    """What is asked of a bundle."""

    name: str
    bundle: str
    protocol: str
    stop: str = "full"

    @property
    def path(self) -> str:
        """The route with the options."""
        return f"/predict?{urlencode(self.query)}"

    @property
    def query(self) -> dict[str, str]:
        """The options."""
        return {"protocol": self.protocol, "stop": self.stop}


WORKLOADS = (
    Workload(CENTER, ONE, "center"),
    Workload(EVERY, FP32, "center"),
    Workload(FULL, FP32, "10crop"),
    Workload(EXACT, FP32, "10crop", "exact"),
    Workload("10crop calibrated, FP32", FP32, "10crop", "calibrated"),
    Workload("dense full, FP32", FP32, "dense"),
    Workload("10crop full, built engines", BUILT, "10crop"),
    Workload("10crop exact, built engines", BUILT, "10crop", "exact"),
    Workload("10crop calibrated, built engines", BUILT, "10crop", "calibrated"),
    Workload("dense full, built engines", BUILT, "dense"),
    Workload("dense exact, built engines", BUILT, "dense", "exact"),
    Workload("dense calibrated, built engines", BUILT, "dense", "calibrated"),
)
QUICK_WORKLOADS = (CENTER, FULL, EXACT)


class Server(Processes):
    """A server on a port of its own. Its processes are paused but when it is used."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.port = port
        log = folder / f"{name}-{port}.log".replace(" ", "-")
        super().__init__(command, log, environment)

    def wait_until_ready(self, picture: bytes, path: str) -> None:
        """Until it answers a picture. Raises SystemExit if it ends or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.main.poll() is None:
            try:
                status, _ = self.predict(picture, path)
            except OSError:  # it does not listen yet
                status = 0
            if status == http.client.OK:
                return
            time.sleep(0.1)
        raise SystemExit(f"{self.name} did not become ready: {self.failure()}")

    def predict(self, picture: bytes, path: str) -> tuple[int, dict[str, Any]]:
        """Status and answer to one picture."""
        body = form(path, picture).partition(b"\r\n\r\n")[2]
        return self._request("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})

    def info(self) -> dict[str, Any]:
        """What our server says of itself."""
        return self._request("GET", "/info")[1]

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_START_SECONDS)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()


def bundles(given: Path, folder: Path) -> dict[str, Path]:
    """The bundle by the names above; `BUILT` only where an engine was built for it."""
    bundle = Bundle.open(given)
    found = {ONE: folder / ONE.replace(" ", "-"), FP32: folder / "all-members"}
    shutil.copytree(given, found[FP32], ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(found[FP32], found[ONE])
    _keep_first_member(found[ONE] / MANIFEST)
    store = EngineStore(bundle)
    if any(store.best(member) for member in bundle.manifest.members):
        found[BUILT] = given
    return found


def ours(bundle: Path, folder: Path, *, limit: float | None = None) -> Server:
    """Our server. Without a limit of the wait nothing is refused."""
    port = free_port()
    environment = {
        "RESNET_BUNDLE": str(bundle),
        "RESNET_HOST": HOST,
        "RESNET_PORT": str(port),
        "RESNET_MAX_WAIT_SECONDS": _NO_LIMIT if limit is None else str(limit),
        "RESNET_TIMEOUT_SECONDS": _NO_LIMIT,
    }
    return Server(OURS, [sys.executable, "-m", "resnet_ensemble.server"], folder, port, environment)


def peer(name: str, python: str, bundle: Path, protocol: str, folder: Path) -> Server:
    """Another server with the same graphs in FP32.

    Those with "our engine" and LitServe run one thread a run, one run a core, as this server does, which is faster on
    small networks than ONNX Runtime's default. The plain naive server has the default.
    """
    port = free_port()
    module = "litserve_server" if name in (LITSERVE, LITSERVE_SINGLE) else "naive_server"
    command = [python, "-m", f"benchmarks.peers.{module}", "--bundle", str(bundle), "--protocol", protocol]
    command += ["--port", str(port)]
    if name != NAIVE:
        command += ["--threads", "1"]
    if module == "litserve_server":
        batch = _LITSERVE_BATCH if name == LITSERVE else 1
        command += ["--workers", str(host.cores()), "--batch", str(batch)]
    return Server(name, command, folder, port)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _keep_first_member(file: Path) -> None:
    manifest = sealed.loads(file.read_bytes())
    first = manifest["members"][0]
    for golden in manifest["golden"]:
        golden["probabilities"] = {first["name"]: golden["probabilities"][first["name"]]}
    manifest.update(members=[first], measured=[])
    file.write_bytes(sealed.dumps(manifest))
