import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_ensemble.export import engine_store, engines, gate, host, sealed
from resnet_ensemble.export.build_engines import Workshop
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import EngineStore, Record, Stored, fingerprint
from resnet_ensemble.training.views import Preprocessing

BACKEND = "onnxruntime"


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(shipped.path, tmp_path / "cifar10")))


@pytest.fixture
def stored(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, bytes]:
    monkeypatch.setattr("resnet_ensemble.export.build_engines.SECONDS_PER_TIMING", 0.01)
    member = bundle.manifest.members[0]
    workshop = Workshop(bundle, member, gate.from_golden(bundle, member), own_calibration=True)
    record, content = workshop.build(BACKEND, "fp32")
    EngineStore(bundle).add(record, content)
    return record, content


def find(bundle: Bundle, member: int = 0) -> Stored | None:
    return EngineStore(bundle).find(bundle.manifest.members[member], BACKEND, "fp32")


def test_a_stored_engine_is_found_with_what_was_measured(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    assert find(bundle) == Stored(*stored)


def test_nothing_is_found_for_another_member_or_precision(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    assert find(bundle, member=1) is None
    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND, "int8") is None


def test_an_engine_of_another_calibration_is_not_used_where_one_is_asked_for(
    bundle: Bundle, stored: tuple[Record, bytes]
) -> None:
    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND, "fp32", "") == Stored(*stored)
    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND, "fp32", "other pictures") is None


def test_an_engine_of_another_cpu_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu", lambda: "another cpu")

    assert find(bundle) is None


def test_an_engine_of_another_backend_version_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.backend(BACKEND), "version", lambda: "0.0")

    assert find(bundle) is None


def test_the_fingerprint_depends_on_all_that_the_engine_does(bundle: Bundle) -> None:
    member = bundle.manifest.members[0]
    other = member.model_copy(update={"preprocessing": replace(member.preprocessing, padding=3)})
    fewer = Bundle(bundle.path, bundle.manifest.model_copy(update={"golden": bundle.manifest.golden[1:]}))

    prints = [
        fingerprint(bundle, member, BACKEND, "fp32", ""),
        fingerprint(bundle, member, BACKEND, "int8", ""),
        fingerprint(bundle, member, BACKEND, "int8", "photos"),
        fingerprint(bundle, other, BACKEND, "fp32", ""),
        fingerprint(fewer, member, BACKEND, "fp32", ""),
        fingerprint(bundle, member, "openvino", "fp32", ""),
    ]
    assert len(set(prints)) == len(prints)


def test_an_engine_that_passed_other_limits_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_store, "ERROR_MARGIN", 0.5)

    assert find(bundle) is None


def test_an_engine_that_other_code_made_or_judged_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, names in ((engines, "sources"), (engine_store, "_GATES")):
        with monkeypatch.context() as changed:
            file = tmp_path / f"{names}.py"
            file.write_text("# other code")
            changed.setattr(module, names, (lambda _, file=file: (file,)) if names == "sources" else (file,))
            assert find(bundle) is None
    assert find(bundle) is not None


@pytest.mark.parametrize("name", engines.BACKENDS)
def test_every_backend_names_the_files_that_it_compiles_with(name: str) -> None:
    assert all(file.is_file() for file in engines.sources(name))


@pytest.mark.parametrize(
    "changed",
    [
        {"views_per_second": {"1": 10.0}},
        {"views_per_second": {"10": 0.0}},
        {"views_per_second": {"10": "fast"}},
        {"agreement": None},
    ],
)
def test_a_report_of_another_version_is_ignored(
    bundle: Bundle, stored: tuple[Record, bytes], changed: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    file = EngineStore(bundle).folder / engine_store.REPORT
    report = sealed.loads(file.read_bytes())
    (key,) = report["engines"]
    report["engines"][key] |= changed
    file.write_bytes(sealed.dumps(report))

    assert find(bundle) is None
    assert "is damaged or of another version" in caplog.text


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped"])
def test_a_damaged_engine_is_not_found(bundle: Bundle, stored: tuple[Record, bytes], damage: str) -> None:
    file, content = EngineStore(bundle).folder / stored[0].file, stored[1]
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:100] + bytes([content[100] ^ 1]) + content[101:])

    assert find(bundle) is None


def test_the_best_is_the_fastest_that_passed(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    store, member = EngineStore(bundle), bundle.manifest.members[0]
    for precision, rate, verdict in (("bf16", 300.0, "passed"), ("int8", 900.0, "wrong too often")):
        record = replace(
            stored[0],
            backend="openvino",
            precision=precision,
            file=f"{precision}.engine",
            fingerprint=fingerprint(bundle, member, "openvino", precision, ""),
            views_per_second={"10": rate},
            verdict=verdict,
        )
        store.add(record, stored[1])
    store.add(replace(stored[0], views_per_second={"10": 200.0}), stored[1])

    available = {precision for _, precision in engines.available()}
    best = store.best(member)
    assert best is not None
    assert best.record.precision == ("bf16" if "bf16" in available else "fp32")
    only = store.best(member, BACKEND)
    assert only is not None
    assert only.record.precision == "fp32"


def test_the_server_opens_the_stored_engine_and_compiles_only_what_is_missing(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation = engines.backend(BACKEND)
    compiled: list[bytes] = []
    original = implementation.compile

    def compile_and_note(graph: bytes, precision: engines.Precision, seen: Preprocessing) -> bytes:
        compiled.append(graph)
        return original(graph, precision, seen)

    monkeypatch.setattr(implementation, "compile", compile_and_note)

    for member in bundle.manifest.members[:2]:
        engine_store.open_engine(bundle, member)

    assert compiled == [bundle.read(bundle.manifest.members[1])]


def test_a_second_builder_waits_for_the_first_and_says_so(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with EngineStore(bundle).building():
            order.append("second")

    with EngineStore(bundle).building():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()

    assert order == ["first", "second"]
    assert "another process builds engines in" in caplog.text
