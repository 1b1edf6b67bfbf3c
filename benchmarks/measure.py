"""The measurements: all processes are started, then one after the other has its turn."""

import itertools
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from benchmarks import contestants, pictures
from benchmarks.contestants import (
    BUILT,
    CENTER,
    FULL,
    HOST,
    LITSERVE,
    LITSERVE_SINGLE,
    NAIVE,
    ONE,
    SINGLE,
    WORKLOADS,
    Server,
    Workload,
)
from benchmarks.extent import Extent
from benchmarks.jobs import Processes, Worker
from benchmarks.load import poisson
from benchmarks.summary import (
    BARE,
    EVEN,
    OK,
    OURS,
    PERFECT,
    PIPELINE,
    RANDOM,
    Cell,
    OpenLoop,
    Overload,
    Round,
    closed_round,
    median,
    open_loop,
    overload,
    percentile,
    queued,
    steady,
)
from resnet_ensemble.export import host
from resnet_ensemble.server.awake import LINGER

_PICTURES = 8  # drawn ones
_COMPARED = 4  # pictures that all servers must answer alike
_TOLERANCE = 1e-3  # between the probabilities that servers answer
_WARM_UP = 0.1  # of the time that is measured
_CALM = 3  # times the median of a lone request: a server that answers so quickly is not busy any more
_PATIENCE = 10.0  # seconds, in open loops
_SUSTAINED = 0.8  # of the capacity
_CAPACITY_ROUNDS = 5  # whose median it is: single ones differed by a quarter within minutes
_SAMPLE_SECONDS = 0.2
_WITH_ENSEMBLES = (NAIVE, LITSERVE)  # peers that serve all members, too: one of each kind

_P = TypeVar("_P", bound=Processes)


class Benchmark:
    """Every process that takes part, ready.

    - images: a folder of pictures to send; drawn ones without it
    - peers: a Python that has what the other servers need
    - notes: what was left out, and why
    """

    def __init__(self, stack: ExitStack, bundle: Path, images: Path | None, peers: str, extent: Extent) -> None:
        self._stack = stack
        self._extent = extent
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.pictures = pictures.draw(_PICTURES) if images is None else pictures.read(images)
        sent = self._folder / "pictures"
        sent.mkdir()
        for i, content in enumerate(self.pictures):
            (sent / f"{i:03}").write_bytes(content)
        self.notes: list[str] = []
        self.closed: dict[Cell, list[Round]] = {}
        self._everyone: list[Processes] = []
        self._bundles = contestants.bundles(bundle, self._folder)
        if BUILT not in self._bundles:
            self.notes.append(f"{BUILT}: there are none; `python export/build_engines.py BUNDLE` makes them")
        self.workloads = [w for w in WORKLOADS if w.name in extent.workloads and w.bundle in self._bundles]
        self._load = self._start(Worker("load", self._folder / "load.log", str(sent)))
        served = dict.fromkeys(workload.bundle for workload in self.workloads)
        self._inprocess = {name: self._start(self._worker(name, sent)) for name in served}
        self._ours = {name: self._serve(contestants.ours(self._bundles[name], self._folder)) for name in served}
        self._limited = self._serve(contestants.ours(self._bundles[ONE], self._folder, limit=extent.limit))
        self._leave_out_what_is_not_offered()
        self._peers = [
            (self._serve(contestants.peer(name, peers, self._bundles[w.bundle], w.protocol, self._folder)), w)
            for w, name in self._wanted_peers(peers)
        ]
        self._check_answers()

    def ceiling(self) -> dict[int, float]:
        """Requests/s of the load generator against an endpoint that does nothing, by clients."""
        port = contestants.free_port()
        command = [sys.executable, "-m", "benchmarks.peers.nothing", str(port)]
        server = self._serve(Server("nothing", command, self._folder, port))
        return {n: self._closed_http(server, "/", n, self._extent.seconds).rate for n in self._extent.clients}

    def run_closed(self) -> None:
        """Every cell in every round, and those of single views in every part of one.

        Each round has processes of its own: of two that did the same, side by side, one took a tenth more CPU for as
        long as it lived.
        """
        cells = self._cells()
        self.closed = {cell: [] for cell in cells}
        all_turns = turns(list(cells), self._extent.rounds, self._extent.parts)
        for number, turn in enumerate(tqdm(all_turns, "closed loops", disable=None)):
            if number and not number % self._extent.parts:
                self._restart()
            for cell in turn:
                self.closed[cell].append(cells[cell]())

    def run_open(self) -> list[OpenLoop]:
        """Every server of the center view at every share of our capacity."""
        extent = self._extent
        servers = [self._ours[ONE], *(server for server, workload in self._peers if workload.name == CENTER)]
        parts: dict[tuple[int, float], list[dict[str, Any]]] = {
            point: [] for point in itertools.product(range(len(servers)), extent.shares)
        }
        for number in tqdm(range(extent.open_rounds), "open loops", disable=None):
            for i, share in random.Random(number).sample(list(parts), len(parts)):  # noqa: S311
                rate = share * self._capacity
                parts[i, share].append(self._open_http(servers[i], CENTER, rate, extent.open_seconds, seed=number))
        return [
            open_loop(CENTER, servers[i].name, share, share * self._capacity, found)
            for (i, share), found in parts.items()
        ]

    def run_sustained(self) -> list[OpenLoop]:
        """Four fifths of our capacity, for long: a single view of one member, and ten crops of all."""
        return [found for name in (CENTER, FULL) for found in self._sustained(name)]

    def _sustained(self, workload: str) -> list[OpenLoop]:
        """At even intervals, at random, and what a perfect queue would do.

        The capacity is measured just before each, and after it: machines drift, and what is above the capacity makes
        every queue grow. If it is another one afterwards, the load is measured again, at a share of that.
        """
        server, seconds, cores = self._server(workload), self._extent.sustained_seconds, host.cores()
        found = []
        after = self._capacity_now(server, workload)
        for name in (EVEN, RANDOM):
            for _ in range(self._extent.sustained_tries):
                capacity = after
                rate = _SUSTAINED * capacity
                answer = self._open_http(server, workload, rate, seconds, even=name == EVEN)
                after = self._capacity_now(server, workload)
                if steady(after / capacity):
                    break
            load = open_loop(workload, f"{name}, {seconds:g} s", _SUSTAINED, rate, [answer])
            found.append(replace(load, pace=after / capacity))
        perfect = queued(poisson(rate, seconds, seed=0), cores / capacity, cores)
        best = {"answers": {"seconds": perfect, "status": [OK] * len(perfect)}, "late": [0.0]}
        return [*found, open_loop(workload, f"{PERFECT}, {seconds:g} s", _SUSTAINED, rate, [best])]

    def run_overload(self) -> Overload:
        """Several times our capacity, against a server with a limit of the wait."""
        extent = self._extent
        share, rate = extent.overload_share, extent.overload_share * self._capacity
        with _awake(self._limited):
            self._ask(self._limited, self._path(CENTER), concurrency=max(extent.clients), seconds=extent.seconds)
            with _sampled(self._limited.resident_bytes) as resident:
                answer = self._ask(
                    self._limited,
                    self._path(CENTER),
                    rate=rate,
                    seconds=extent.overload_seconds,
                    patience=_PATIENCE + extent.limit,
                    recovered_below=_CALM * self._alone,
                )
        return overload(answer, share=share, rate=rate, limit=extent.limit, resident=resident)

    def engines(self) -> dict[str, str]:
        """What runs each bundle: "resnet20 on onnxruntime 1.32.0 fp32"."""
        described = {}
        for name, server in self._ours.items():
            with _awake(server):
                members = server.info()["members"]
            described[name] = ", ".join(
                "{} on {backend} {version} {precision}".format(member["name"], **member["engine"]) for member in members
            )
        return described

    def cpu_seconds(self) -> float:
        """Of all processes that take part, this one too."""
        return time.process_time() + sum(processes.cpu_seconds() for processes in self._everyone)

    @property
    def _capacity(self) -> float:
        return median(self.closed[Cell(CENTER, OURS, max(self._extent.clients))]).rate

    def _capacity_now(self, server: Server, workload: str) -> float:
        """Images/s with the most clients."""
        path, most = self._path(workload), max(self._extent.clients)
        rounds = [self._closed_http(server, path, most, self._extent.seconds) for _ in range(_CAPACITY_ROUNDS)]
        return median(rounds).rate

    @property
    def _alone(self) -> float:
        return median(self.closed[Cell(CENTER, OURS, 1)]).p50

    def _path(self, workload: str) -> str:
        return next(w.path for w in self.workloads if w.name == workload)

    def _server(self, workload: str) -> Server:
        return next(self._ours[w.bundle] for w in self.workloads if w.name == workload)

    def _worker(self, bundle: str, sent: Path) -> Worker:
        log = self._folder / f"inprocess-{bundle.replace(' ', '-')}.log"
        return Worker("inprocess", log, str(self._bundles[bundle]), str(sent))

    def _start(self, processes: _P) -> _P:
        self._stack.enter_context(processes)
        self._everyone.append(processes)
        return processes

    def _serve(self, server: Server) -> Server:
        """Start it, wait, and pause it."""
        self._start(server)
        self._wait_for(server)
        return server

    def _wait_for(self, server: Server) -> None:
        server.wait_until_ready(self.pictures[0], "/predict")
        server.pause()

    def _restart(self) -> None:
        """What closed loops measure. One after the other, so that each starts alone."""
        for worker in self._inprocess.values():
            worker.restart()
            worker.do(system="pipeline", query={}, concurrency=1, seconds=0)  # it is ready when it answers
        for server in (*self._ours.values(), *(server for server, _ in self._peers)):
            server.restart()
            self._wait_for(server)

    def _wanted_peers(self, python: str) -> list[tuple[Workload, str]]:
        wanted = [
            (workload, name)
            for workload in self.workloads
            if workload.name in self._extent.of_peers
            for name in self._extent.peers
            if workload.name == CENTER or name in _WITH_ENSEMBLES
        ]
        if not any(name in (LITSERVE, LITSERVE_SINGLE) for _, name in wanted):
            return wanted
        command = [python, "-c", "import litserve"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
            return wanted
        self.notes.append(f"{LITSERVE}: it is not installed in {Path(python).name}; `make bench` installs it")
        return [(w, name) for w, name in wanted if name not in (LITSERVE, LITSERVE_SINGLE)]

    def _leave_out_what_is_not_offered(self) -> None:
        for workload in list(self.workloads):
            server = self._ours[workload.bundle]
            with _awake(server):
                if workload.stop in server.info()["stop_rules"]:
                    status, answer = server.predict(self.pictures[0], workload.path)
                    reason = "" if status == 200 else f"{status} {answer.get('detail', '')}"
                else:
                    reason = f"the server has no stop rule `{workload.stop}`"
            if reason:
                self.workloads.remove(workload)
                self.notes.append(f"{workload.name}: {reason}")

    def _check_answers(self) -> None:
        """Raise SystemExit unless all servers answer the same."""
        for server, workload in self._peers:
            reference = self._ours[workload.bundle]
            with _awake(server), _awake(reference):
                for picture in self.pictures[:_COMPARED]:
                    theirs, right = (one.predict(picture, workload.path)[1] for one in (server, reference))
                    difference = abs(theirs["probability"] - right["probability"])
                    if theirs["label"] != right["label"] or difference > _TOLERANCE:
                        raise SystemExit(f"{server.name} answers {theirs}, and {OURS} {right['top'][0]}")

    def _cells(self) -> dict[Cell, Callable[[], Round]]:
        """Every cell, and how it is measured."""
        cells: dict[Cell, Callable[[], Round]] = {}
        for workload in self.workloads:
            if workload.stop == "full":
                cells[Cell(workload.name, BARE, 0)] = self._inprocess_round(workload, "bare", 0)
            for n in self._extent.clients:
                if workload.name in SINGLE or n == max(self._extent.clients):
                    cells[Cell(workload.name, PIPELINE, n)] = self._inprocess_round(workload, "pipeline", n)
                ours = self._ours[workload.bundle]
                for server in (ours, *(server for server, its in self._peers if its is workload)):
                    cells[Cell(workload.name, server.name, n)] = self._http_round(server, workload, n)
        return cells

    def _length(self, workload: Workload) -> dict[str, float]:
        """Of a round. With single views every picture has its turn, or who is slow would not get to the large ones."""
        if workload.name in SINGLE:
            return {"seconds": self._extent.seconds / self._extent.parts, "least": len(self.pictures)}
        return {"seconds": self._extent.seconds}

    def _http_round(self, server: Server, workload: Workload, clients: int) -> Callable[[], Round]:
        return lambda: self._closed_http(server, workload.path, clients, **self._length(workload))

    def _inprocess_round(self, workload: Workload, system: str, clients: int) -> Callable[[], Round]:
        worker, length = self._inprocess[workload.bundle], self._length(workload)

        def measure() -> Round:
            job = {"system": system, "query": workload.query, "concurrency": clients}
            if clients:
                worker.do(**{**job, "concurrency": 1}, seconds=_WARM_UP * length["seconds"])
            before = worker.cpu_seconds()
            answer = worker.do(**job, **length)
            latencies = answer["latencies"]
            return Round(
                rate=answer["images"] / answer["seconds"],
                p50=percentile(latencies, 0.50),
                p95=percentile(latencies, 0.95),
                p99=percentile(latencies, 0.99),
                server_cpu=(worker.cpu_seconds() - before) / answer["images"],
                resident=worker.resident_bytes(),
                requests=answer["images"],
            )

        return measure

    def _closed_http(self, server: Server, path: str, clients: int, seconds: float, least: float = 0) -> Round:
        with _awake(server):
            self._ask(server, path, concurrency=1, seconds=_WARM_UP * seconds)
            before = server.cpu_seconds()
            answer = self._ask(server, path, concurrency=clients, seconds=seconds, least=least)
            return closed_round(answer, server.cpu_seconds() - before, server.resident_bytes())

    def _open_http(
        self, server: Server, workload: str, rate: float, seconds: float, *, seed: int = 0, even: bool = False
    ) -> dict[str, Any]:
        with _awake(server):
            alone = self.closed.get(Cell(workload, server.name, 1))
            return self._ask(
                server,
                self._path(workload),
                rate=rate,
                seconds=seconds,
                seed=seed,
                even=even,
                patience=_PATIENCE,
                settled_below=_CALM * (median(alone).p50 if alone else self._alone),
            )

    def _ask(self, server: Server, path: str, **job: Any) -> dict[str, Any]:
        return self._load.do(host=HOST, port=server.port, path=path, **job)


def turns(cells: Sequence[Cell], rounds: int, parts: int) -> list[list[Cell]]:
    """Which cells are measured, one part of a round after the other: those of single views in each, others in one.

    Each time in another order, since neighbours may influence each other.
    """
    single = [cell for cell in cells if cell.workload in SINGLE]
    return [
        random.Random(number).sample(turn, len(turn))  # noqa: S311  # nothing secret
        for number in range(rounds * parts)
        for turn in [single if number % parts else list(cells)]
    ]


@contextmanager
def _awake(server: Server) -> Iterator[None]:
    server.go_on()
    try:
        yield
    finally:
        time.sleep(LINGER)  # a server that is stopped while it keeps CPUs from halting would do so for others, too
        server.pause()


@contextmanager
def _sampled(read: Callable[[], float]) -> Iterator[list[float]]:
    """What `read` says now, and then again and again until the end."""
    samples = [read()]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            samples.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
