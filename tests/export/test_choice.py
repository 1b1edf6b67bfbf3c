import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_ensemble.export import engines, gate
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.choice import choose, fastest_first
from resnet_ensemble.export.engine_store import EngineStore, Record, fingerprint
from resnet_ensemble.export.engines import EngineInfo, EngineLoadError, Precision
from resnet_ensemble.export.gate import Pictures

IMAGES = 100
FAST, SLOW = 1000.0, 100.0  # views/s


class Voter:
    """Grey pictures of brightness 2 i, for i below 100. On some it moves a little from the right class to the next."""

    def __init__(self, off: list[int]) -> None:
        self.info = EngineInfo("fake", "1", "fp32", "cpu", threads=1)
        self._off = off

    def run(self, views: np.ndarray) -> np.ndarray:
        answers = np.zeros((len(views), 10), np.float32)
        for answer, picture in zip(answers, views[:, 16, 16, 0] // 2, strict=True):
            right = picture % 10
            answer[right], answer[(right + 1) % 10] = (0.45, 0.55) if picture in self._off else (0.6, 0.4)
        return answers

    def close(self) -> None:
        pass


@pytest.fixture
def store(pair: Bundle, tmp_path: Path) -> EngineStore:
    return EngineStore(Bundle.open(Path(shutil.copytree(pair.path, tmp_path / "cifar10"))))


@pytest.fixture
def pictures(store: EngineStore) -> dict[str, Pictures]:
    def encoded(brightness: int) -> bytes:
        content = io.BytesIO()
        Image.new("RGB", (32, 32), (brightness,) * 3).save(content, "PNG")
        return content.getvalue()

    none = np.zeros((0, 32, 32, 3), np.uint8)
    seen = Pictures(IMAGES, none, (), None, none, "grey", tuple(encoded(2 * i) for i in range(IMAGES)), None)
    return {member.name: seen for member in store.bundle.manifest.members}


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What engines were opened, in order: an engine's file says on which pictures it is off."""
    opened: list[bytes] = []

    def load(compiled: bytes, precision: Precision, threads: int = 1) -> Voter:
        opened.append(compiled)
        if compiled == b"does not run here":
            raise EngineLoadError(compiled.decode())
        return Voter(json.loads(compiled) if compiled.startswith(b"[") else [])

    for name in engines.ON["cpu"]:
        monkeypatch.setattr(engines.backend(name), "load", load)
    return opened


def add(
    store: EngineStore, member: int, precision: Precision, rate: float, off: list[int] | bytes, **changes: Any
) -> Record:
    """An engine that passed."""
    of = store.bundle.manifest.members[member]
    content = off if isinstance(off, bytes) else json.dumps(off).encode()
    record = Record(
        member=of.name,
        backend="onnxruntime",
        version="1",
        precision=precision,
        calibration="",
        fingerprint=fingerprint(store.bundle, of, "onnxruntime", precision, ""),
        file=f"{of.name}-{precision}.engine",
        sha256=sha256(content).hexdigest(),
        size=len(content),
        build_seconds=0.0,
        golden_difference=0.0,
        gate_pictures="",
        gate_views=IMAGES,
        agreement=1.0,
        difference=0.0,
        correlation=1.0,
        unsteadiness=0.0,
        error=None,
        reference_error=None,
        views_per_second={"10": rate},
        verdict="passed",
    )
    record = replace(record, **changes)
    store.add(record, content)
    return record


def chosen(store: EngineStore) -> list[Precision | None]:
    """As a server finds it: of each member."""
    fresh = EngineStore(store.bundle)
    best = [fresh.best(member) for member in store.bundle.manifest.members]
    return [stored.record.precision if stored else None for stored in best]


def test_engines_that_are_wrong_on_the_same_pictures_are_not_chosen_together(
    store: EngineStore, pictures: dict[str, Pictures]
) -> None:
    for member, slow in enumerate((SLOW, 2 * SLOW)):
        add(store, member, "int8", FAST, [1, 2, 3])
        add(store, member, "fp32", slow, [])
    assert chosen(store) == ["int8", "int8"]

    found = choose(store, pictures, given=True)

    # FP32 of the second costs less than of the first.
    assert chosen(store) == ["int8", "fp32"]
    assert (found.images, found.agreement, found.refused) == (IMAGES, 1.0, 1)
    assert found.difference == pytest.approx(0.075)


@pytest.mark.parametrize("off", [([1, 2, 3], [4, 5, 6]), ([1, 2], [1, 2])], ids=["on others", "on few"])
def test_the_fastest_are_chosen_where_they_are_right_together(
    store: EngineStore, pictures: dict[str, Pictures], off: tuple[list[int], list[int]]
) -> None:
    for member in range(2):
        add(store, member, "int8", FAST, off[member])
        add(store, member, "fp32", SLOW, [])

    found = choose(store, pictures, given=True)

    assert chosen(store) == ["int8", "int8"]
    assert found.agreement == 1 - len({*off[0]} & {*off[1]}) / IMAGES
    assert found.refused == 0


def test_where_no_fp32_was_built_a_member_gets_the_one_that_a_server_compiles(
    store: EngineStore, pictures: dict[str, Pictures]
) -> None:
    add(store, 0, "int8", FAST, [1, 2, 3])
    add(store, 1, "int8", SLOW, [1, 2, 3])

    found = choose(store, pictures, given=True)

    assert (list(found.engines), chosen(store)) == (["resnet20"], ["int8", None])


def test_an_error_that_is_too_high_is_no_choice_although_labels_agree_often(
    store: EngineStore, pictures: dict[str, Pictures]
) -> None:
    for member in range(2):
        add(store, member, "int8", FAST, [1, 2])
        add(store, member, "fp32", SLOW, [])
    labelled = {
        name: replace(seen, encoded_labels=np.arange(IMAGES) % 10, identity="labelled")
        for name, seen in pictures.items()
    }

    found = choose(store, labelled, given=True)

    assert (found.error, found.reference_error, found.refused) == (0.0, 0.0, 1)
    assert chosen(store).count("int8") == 1


def test_combinations_come_by_the_time_of_a_view(store: EngineStore) -> None:
    of_members = [[add(store, member, "int8", rate, []) for rate in (40.0, 20.0, 10.0)] for member in range(2)]

    found = list(fastest_first([[*records, None] for records in of_members]))

    known = [sum(1 / one.views_per_second["10"] if one else 1e6 for one in combination) for combination in found]
    assert known == sorted(known)
    assert len({tuple(map(id, combination)) for combination in found}) == len(found) == 16
    assert found[-1] == (None, None)


def test_where_no_stored_fp32_runs_the_one_that_is_compiled_is_compared_with(
    store: EngineStore, pictures: dict[str, Pictures]
) -> None:
    for member in range(2):
        add(store, member, "fp32", SLOW, b"does not run here")
        add(store, member, "int8", FAST, [1, 2, 3])

    found = choose(store, pictures, given=True)

    assert (found.agreement, found.refused) == (1.0, 4)  # INT8 twice, and what has an FP32 that does not run
    assert sorted(map(str, chosen(store))) == ["None", "int8"]


def test_an_engine_that_does_not_run_is_not_chosen(
    store: EngineStore, pictures: dict[str, Pictures], caplog: pytest.LogCaptureFixture
) -> None:
    for member in range(2):
        add(store, member, "fp32", SLOW, [])
    add(store, 0, "int8", FAST, b"does not run here")

    choose(store, pictures, given=True)

    assert chosen(store) == ["fp32", "fp32"]
    assert "resnet20/onnxruntime/int8 is not chosen: does not run here" in caplog.text


@pytest.mark.parametrize("first", [list(range(IMAGES // 2)), b"does not run here"], ids=["wrong", "does not run"])
def test_only_what_has_the_labels_is_compared_in_full(
    store: EngineStore, pictures: dict[str, Pictures], monkeypatch: pytest.MonkeyPatch, first: list[int] | bytes
) -> None:
    for member in range(2):
        add(store, member, "fp32", SLOW, [])
        add(store, member, "int8", FAST, list(range(IMAGES // 2)) if member else first)
    compared: list[Any] = []
    compare = gate.compare
    monkeypatch.setattr(gate, "compare", lambda *given: compared.append(given) or compare(*given))

    found = choose(store, pictures, given=True)

    assert sorted(map(str, chosen(store))) == ["fp32", "int8"]  # together, they are wrong on the same pictures
    assert found.refused >= 1
    assert len(compared) == 1


def test_a_choice_is_kept_until_something_that_it_depends_on_changes(
    store: EngineStore, pictures: dict[str, Pictures], loaded: list[bytes]
) -> None:
    def runs(given: bool, seen: dict[str, Pictures] = pictures) -> bool:
        loaded.clear()
        choose(EngineStore(store.bundle), seen, given=given)
        return bool(loaded)

    other = {name: replace(seen, identity="others") for name, seen in pictures.items()}
    for member in range(2):
        add(store, member, "fp32", SLOW, [])

    assert (runs(given=True), runs(given=True), runs(given=False)) == (True, False, False)
    assert not runs(given=False, seen=other)
    assert runs(given=True, seen=other)
    add(store, 1, "int8", FAST, [])
    assert runs(given=False)
    assert chosen(store) == ["fp32", "int8"]


@pytest.mark.parametrize("change", ["built again", "refused", "of another graph"])
def test_where_a_chosen_engine_is_not_there_any_more_all_run_in_fp32_and_the_log_tells(
    store: EngineStore, pictures: dict[str, Pictures], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    for member in range(2):
        add(store, member, "int8", FAST, [1, 2, 3])
        add(store, member, "fp32", SLOW, [])
    choose(store, pictures, given=True)
    assert "fp32" in chosen(store)

    slow = chosen(store).index("fp32")
    changes: dict[str, Callable[[], object]] = {
        "built again": lambda: add(store, slow, "fp32", SLOW, [7]),
        "refused": lambda: add(store, slow, "fp32", SLOW, [], verdict="wrong"),
        "of another graph": lambda: add(store, slow, "fp32", SLOW, [], fingerprint="another"),
    }
    changes[change]()

    assert EngineStore(store.bundle).choice() is None
    left = ["fp32", "fp32"]
    if change != "built again":
        left[slow] = None  # type: ignore[call-overload]
    assert chosen(store) == left
    assert "that were chosen together, " in caplog.text
    assert "can't be used here, so FP32 is" in caplog.text


def test_where_a_chosen_engine_s_backend_is_not_installed_all_run_in_fp32(
    store: EngineStore, pictures: dict[str, Pictures], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for member in range(2):
        add(store, member, "int8", FAST, [1])
        add(store, member, "fp32", SLOW, [])
    first = store.bundle.manifest.members[0]
    wanted = fingerprint(store.bundle, first, "openvino", "int8", "")
    add(store, 0, "int8", 2 * FAST, [2], backend="openvino", fingerprint=wanted, file="another.engine")
    choose(store, pictures, given=True)
    assert chosen(store) == ["int8", "int8"]

    monkeypatch.setattr(engines, "runs", lambda name, _: name == "onnxruntime")

    assert chosen(store) == ["fp32", "fp32"]
    assert "resnet20/openvino/int8 can't be used here, so FP32 is" in caplog.text


def test_with_a_choice_a_damaged_file_gives_way_to_fp32_and_not_to_what_was_not_compared(
    store: EngineStore, pictures: dict[str, Pictures]
) -> None:
    for member in range(2):
        add(store, member, "int8", FAST, [])
        wanted = fingerprint(store.bundle, store.bundle.manifest.members[member], "openvino", "int8", "")
        add(store, member, "int8", FAST / 2, [1], backend="openvino", fingerprint=wanted, file=f"{member}.engine")
        add(store, member, "fp32", SLOW, [])
    choose(store, pictures, given=True)
    (store.folder / "resnet32-int8.engine").write_bytes(b"[9]")

    assert chosen(store) == ["int8", "fp32"]


@pytest.mark.parametrize("left", [(0,), (1,), (1, 0)], ids=["the first", "the second", "another order"])
def test_a_choice_for_another_ensemble_is_none(
    store: EngineStore, pictures: dict[str, Pictures], left: tuple[int, ...]
) -> None:
    """Or what was built for a bundle that has followed in the same folder would never be used."""
    for member, slow in enumerate((SLOW, 2 * SLOW)):
        add(store, member, "int8", FAST, [1, 2, 3])
        add(store, member, "fp32", slow, [])
    choose(store, pictures, given=True)
    manifest = store.bundle.manifest
    members = tuple(manifest.members[place] for place in left)
    other = EngineStore(Bundle(store.bundle.path, manifest.model_copy(update={"members": members})))

    assert other.choice() is None
    best = [other.best(member) for member in members]
    assert [found and found.record.precision for found in best] == ["int8"] * len(left)


def test_a_report_with_a_choice_that_is_none_is_not_used(
    store: EngineStore, pictures: dict[str, Pictures], caplog: pytest.LogCaptureFixture
) -> None:
    for member in range(2):
        add(store, member, "fp32", SLOW, [])
    kept = choose(store, pictures, given=True)
    assert EngineStore(store.bundle).choice() == kept
    report = json.loads((store.folder / "engines.json").read_text())
    del report["choice"]["agreement"], report["sha256"]
    (store.folder / "engines.json").write_text(json.dumps(report))

    assert chosen(store) == [None, None]
    assert "is damaged or of another version" in caplog.text
