"""Which engines the members of an ensemble get: the fastest that together are still FP32's ensemble.

Each has passed the gate by itself, on single views. But engines that are wrong on the same pictures may be wrong
together, so what the bundle answers is compared, too: the average of all members over ten crops. On 143 photographs
a ResNet-18 of OpenVINO and a ResNet-50 of ONNX Runtime, both in INT8, had FP32's label on 140, and both of OpenVINO,
4 % slower, on all (two Zen 3 cores, 2026-11-26).
"""

import hashlib
import heapq
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from resnet_ensemble.export import engines, gate, host
from resnet_ensemble.export.bundle import Member
from resnet_ensemble.export.engine_store import Choice, EngineStore, Record, graphs
from resnet_ensemble.export.engines import Engine, EngineLoadError, EngineRunError
from resnet_ensemble.export.gate import Pictures
from resnet_ensemble.training.views import make_views

log = logging.getLogger(__name__)

_PROTOCOL = "10crop"
# FP32, compiled when a server starts, where no FP32 was stored: after everything that was.
_SLOWEST = 1e6  # seconds for a view

Candidate = Record | None  # None: that FP32
Answers = NDArray[np.float64]  # (pictures, classes)


def choose(store: EngineStore, pictures: Mapping[str, Pictures], *, given: bool) -> Choice:
    """Find and store the choice, or keep the one that is stored if nothing that it depends on has changed.

    - pictures: of each member
    - given: whether they were; if not, a choice that was made on others is kept, too
    """
    members = store.bundle.manifest.members
    candidates = [_candidates(store, member) for member in members]
    seen = hashlib.sha256("".join(pictures[member.name].identity for member in members).encode()).hexdigest()
    among = _identity(candidates)
    kept = store.choice()
    if kept and kept.among == among and (not given or kept.pictures == seen):
        return kept
    answers = _Answers(store, pictures)
    expected = answers.average([answers.reference(member) for member in members])
    labels = pictures[members[0].name].encoded_labels
    refused = 0
    for combination in tqdm(fastest_first(candidates), "which together", unit="", leave=False, disable=None):
        found = [answers.of(member, one) for member, one in zip(members, combination, strict=True)]
        if all(map(_is_answer, found)):
            average = answers.average(found)
            # First what is quick: of six members, thousands of combinations may come before one that passes.
            if gate.agreement(average, expected) >= gate.ENSEMBLE.agreement:
                finding = gate.compare(average, expected, labels)
                if finding.verdict(gate.ENSEMBLE) == "passed":
                    break
        refused += 1
    chosen = {member.name: one.sha256 for member, one in zip(members, combination, strict=True) if one}
    choice = Choice(
        members=graphs(store.bundle),
        engines=chosen,
        among=among,
        pictures=seen,
        images=finding.views,
        agreement=finding.agreement,
        difference=finding.difference,
        error=finding.error,
        reference_error=finding.reference_error,
        refused=refused,
    )
    store.choose(choice)
    return choice


def _candidates(store: EngineStore, member: Member) -> list[Candidate]:
    """Engines that passed, the fastest first, and the FP32 that always runs, so that some combination passes."""
    return [*store.passed(member), None]


def _identity(candidates: Sequence[Sequence[Candidate]]) -> str:
    """A hash of what is chosen from, and of what decides."""
    known = [[(one.key, one.sha256, one.rate) for one in of_member if one] for of_member in candidates]
    return hashlib.sha256(json.dumps([known, asdict(gate.ENSEMBLE), gate.ERROR_MARGIN]).encode()).hexdigest()


def fastest_first(candidates: Sequence[Sequence[Candidate]]) -> Iterator[tuple[Candidate, ...]]:
    """Every combination, by the seconds that one view through every member takes.

    Each member's candidates come the fastest first. One after the other, since six members of a GPU host have millions.
    """

    def combination(places: tuple[int, ...]) -> tuple[Candidate, ...]:
        return tuple(of_member[place] for of_member, place in zip(candidates, places, strict=True))

    def seconds(places: tuple[int, ...]) -> float:
        return sum(1 / one.rate if one else _SLOWEST for one in combination(places))

    first = (0,) * len(candidates)
    waiting, known = [(seconds(first), first)], {first}
    while waiting:
        _, places = heapq.heappop(waiting)
        yield combination(places)
        for i, place in enumerate(places):
            following = (*places[:i], place + 1, *places[i + 1 :])
            if place + 1 < len(candidates[i]) and following not in known:
                known.add(following)
                heapq.heappush(waiting, (seconds(following), following))


class _Answers:
    """What engines answer to ten crops of every picture, found when it is first asked for."""

    def __init__(self, store: EngineStore, pictures: Mapping[str, Pictures]) -> None:
        self._store = store
        self._pictures = pictures
        self._found: dict[str, Answers] = {}  # by the member's name, or by the engine's

    @staticmethod
    def average(members: Sequence[Answers]) -> NDArray[np.float32]:
        """Of the ensemble: each member counts the same."""
        mean: NDArray[np.float32] = np.mean(members, axis=0).astype(np.float32)
        return mean

    def reference(self, member: Member) -> Answers:
        """FP32's, of the fastest that passed and runs."""
        stored = [record for record in self._store.passed(member) if record.precision == "fp32"]
        answers = (self.of(member, one) for one in (*stored, None))
        return next(filter(_is_answer, answers))

    def of(self, member: Member, candidate: Candidate) -> Answers:
        """NaN where the engine does not run, which is no reason to stop: others do."""
        name = candidate.key if candidate else member.name
        if name not in self._found:
            try:
                engine = _opened(self._store, member, candidate)
                try:
                    self._found[name] = _run(engine, self._pictures[member.name], member, name)
                finally:
                    engine.close()
            except (EngineLoadError, EngineRunError) as error:
                if candidate is None:
                    raise
                engines.check_not_lost(engines.backend(candidate.backend), name, error)
                log.warning("%s is not chosen: %s", name, error)
                shape = len(self._pictures[member.name].encoded), len(self._store.bundle.manifest.labels)
                self._found[name] = np.full(shape, np.nan)
        return self._found[name]


def _is_answer(answers: Answers) -> bool:
    """Or of an engine that does not run."""
    return bool(np.isfinite(answers[0, 0]) and np.isfinite(answers).all())


def _opened(store: EngineStore, member: Member, candidate: Candidate) -> Engine:
    if candidate is None:
        backend = engines.backend(engines.DEFAULT)
        compiled = backend.compile(store.bundle.read(member), "fp32", member.preprocessing)
        return backend.load(compiled, "fp32")
    stored = store.find(member, candidate.backend, candidate.precision)
    if stored is None:
        raise EngineLoadError(f"{candidate.file} was changed meanwhile")
    return engines.backend(candidate.backend).load(stored.content, candidate.precision)


def _run(engine: Engine, pictures: Pictures, member: Member, name: str) -> Answers:
    def mean(encoded: bytes) -> NDArray[np.float64]:
        views = make_views(gate.upright(encoded), member.preprocessing, _PROTOCOL)
        answer: NDArray[np.float64] = engine.run(views).mean(axis=0, dtype=np.float64)
        return answer

    with ThreadPoolExecutor(host.cores()) as pool:
        found = pool.map(mean, pictures.encoded)
        return np.stack(list(tqdm(found, f"ten crops, {name}", total=len(pictures.encoded), leave=False, disable=None)))
