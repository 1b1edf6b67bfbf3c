import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_ensemble.export import engine_store, engines, host
from resnet_ensemble.export.build_engines import build
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import EngineStore, Record, fingerprint

BACKEND = "onnxruntime"


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(shipped.path, tmp_path / "cifar10")))


@pytest.fixture
def stored(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, bytes]:
    monkeypatch.setattr("resnet_ensemble.export.build_engines.SECONDS_PER_TIMING", 0.01)
    record, content = build(bundle, bundle.manifest.members[0], BACKEND)
    EngineStore(bundle).add(record, content)
    return record, content


def test_a_stored_engine_is_found_with_what_was_measured(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND) == stored


def test_nothing_is_found_for_another_member(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    assert EngineStore(bundle).find(bundle.manifest.members[1], BACKEND) is None


def test_an_engine_of_another_cpu_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu", lambda: "another cpu")

    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND) is None


def test_an_engine_of_another_backend_version_is_not_used(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.backend(BACKEND), "version", lambda: "0.0")

    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND) is None


def test_the_fingerprint_depends_on_golden_values_and_preprocessing(bundle: Bundle) -> None:
    member = bundle.manifest.members[0]
    other = member.model_copy(update={"preprocessing": replace(member.preprocessing, padding=3)})
    fewer = Bundle(bundle.path, bundle.manifest.model_copy(update={"golden": bundle.manifest.golden[1:]}))

    assert len({fingerprint(bundle, member, BACKEND), fingerprint(bundle, other, BACKEND)}) == 2
    assert fingerprint(fewer, member, BACKEND) != fingerprint(bundle, member, BACKEND)


def test_a_report_of_another_version_is_ignored(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    (EngineStore(bundle).folder / engine_store.REPORT).write_text('{"engines": {"a/b": {"unknown": 1}}}')

    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND) is None


def test_a_deleted_engine_is_not_found(bundle: Bundle, stored: tuple[Record, bytes]) -> None:
    (EngineStore(bundle).folder / stored[0].file).unlink()

    assert EngineStore(bundle).find(bundle.manifest.members[0], BACKEND) is None


def test_the_server_opens_the_stored_engine_and_compiles_only_what_is_missing(
    bundle: Bundle, stored: tuple[Record, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bytes] = []
    implementation = engines.backend(BACKEND)
    monkeypatch.setattr(implementation, "load", loaded.append)
    monkeypatch.setattr(implementation, "compile", lambda graph: b"compiled now")

    for member in bundle.manifest.members[:2]:
        engine_store.open_engine(bundle, member, BACKEND)

    assert loaded == [stored[1], b"compiled now"]
