"""What is served is right or refused, never wrong: whatever happens to the files of a bundle and to its engines."""

import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_ensemble.export import build_engines, engines, golden, host, sealed, to_onnx
from resnet_ensemble.export.bundle import Bundle, BundleError, BundleInvalid
from resnet_ensemble.export.engine_store import EngineStore, Record
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.server.classifier import open_engine
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training.model import cifar
from resnet_ensemble.training.views import Preprocessing
from tests.server.test_process import process

ONE = ("--only", "resnet20")
HERE = tuple(name for name, precision in engines.available() if precision == "fp32")
ALL = 2 * len(HERE)  # engines in FP32, of two members


def run(bundle: Path, *arguments: str) -> str:
    """What build_engines.py prints, or the message with which it stops."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(build_engines, "SECONDS_PER_TIMING", 0.001)
        patch.setattr(build_engines, "TIMED_BATCHES", (10,))
        patch.setattr(sys, "argv", ["build_engines.py", str(bundle), "--precision", "fp32", *arguments])
        try:
            build_engines.main()
        except SystemExit as stop:
            assert isinstance(stop.code, str)
            return stop.code
    return printed.getvalue()


@pytest.fixture
def bundle(pair: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.path, tmp_path / "cifar10"))


@pytest.fixture(scope="module")
def with_engines(pair: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(pair.path, folder / "cifar10")
    assert run(folder / "cifar10").count(", built") == ALL
    return folder


@pytest.fixture
def built(with_engines: Path, tmp_path: Path) -> Path:
    """A bundle with FP32 engines of every backend beside it."""
    shutil.copytree(with_engines, tmp_path, dirs_exist_ok=True)
    return tmp_path / "cifar10"


@contextmanager
def disk_full_beyond(size: int) -> Iterator[None]:
    """No file may become larger: writes fail as on a full disk, in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def served(bundle: Path) -> list[Engine]:
    """The engines that a server would use. Raises BundleError."""
    opened, settings = Bundle.open(bundle), Settings(bundle=bundle)
    return [open_engine(opened, member, settings) for member in opened.manifest.members]


def assert_right(opened: list[Engine], pair: Bundle) -> None:
    """They give the probabilities that the untouched bundle records."""
    for engine, member in zip(opened, pair.manifest.members, strict=True):
        golden.check(engine, pair, member, allowed=pair.manifest.golden_tolerance)


def flip(file: Path, place: float, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= bit
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def store(bundle: Path) -> Path:
    return bundle.parent / "cifar10.engines"


# The bundle


def test_every_changed_byte_of_the_manifest_is_refused_or_means_the_same(bundle: Path) -> None:
    file, manifest = bundle / "bundle.json", Bundle.open(bundle).manifest
    text = file.read_bytes()
    accepted = 0
    for place in range(0, len(text), 37):
        for bit in (1, 0x80):
            file.write_bytes(text[:place] + bytes([text[place] ^ bit]) + text[place + 1 :])
            try:
                assert Bundle.open(bundle).manifest == manifest
                accepted += 1
            except BundleInvalid as error:
                assert "restore it (git checkout" in str(error) or "export it again" in str(error)
    assert accepted < len(text) / 37


@pytest.mark.parametrize(
    "damage",
    [lambda file: flip(file, 0.02), lambda file: flip(file, 0.5, 0x80), cut],
    ids=["flipped", "no UTF-8", "cut"],
)
def test_a_damaged_manifest_stops_builder_and_server(bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(bundle / "bundle.json")

    with pytest.raises(BundleInvalid, match=r"bundle\.json is .*restore it"):
        served(bundle)
    assert "bundle.json is" in run(bundle)
    assert not store(bundle).exists()


@pytest.mark.parametrize("name", ["members/resnet20.onnx", "members/resnet32.onnx", "golden/ship.png"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_byte_in_a_file_of_the_bundle_stops_builder_and_server(bundle: Path, name: str, place: float) -> None:
    flip(bundle / name, place)

    message = f"{bundle / name} is not the file that bundle.json describes (SHA-256); restore it (git checkout"
    with pytest.raises(BundleError) as refused:
        served(bundle)
    assert message in str(refused.value)
    assert message in run(bundle)


def test_the_server_exits_and_says_why(bundle: Path) -> None:
    flip(bundle / "members" / "resnet32.onnx", 0.5)

    with process(RESNET_BUNDLE=str(bundle)) as (running, _):
        _, log = running.communicate(timeout=60)

    assert running.returncode == 1
    assert "not serving" in log
    assert "resnet32.onnx is not the file that bundle.json describes" in log
    assert "Traceback" not in log


def test_a_folder_in_place_of_a_file_is_named(bundle: Path) -> None:
    (bundle / "golden" / "ship.png").unlink()
    (bundle / "golden" / "ship.png").mkdir()

    assert "ship.png can't be read (Is a directory); restore it" in run(bundle)
    with pytest.raises(BundleError, match="Is a directory"):
        served(bundle)


# Stored engines


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("damage", [lambda file: flip(file, 0.5), cut, Path.unlink], ids=["flipped", "cut", "deleted"])
def test_a_damaged_engine_is_never_served_and_is_built_again(
    pair: Bundle, built: Path, caplog: pytest.LogCaptureFixture, backend: str, damage: Callable[[Path], None]
) -> None:
    prefer(built, backend)
    file = store(built) / f"resnet20-{backend}-fp32.engine"
    damage(file)

    opened = served(built)

    assert_right(opened, pair)
    assert [engine.info.backend == backend for engine in opened] == [False, True]
    assert f"{file} " in caplog.text
    assert "is not used; export/build_engines.py builds it again" in caplog.text
    printed = run(built)
    assert (printed.count(", built"), printed.count(", reused")) == (1, ALL - 1)


def forget_choice(bundle: Path) -> None:
    file = store(bundle) / "engines.json"
    file.write_bytes(sealed.dumps(sealed.loads(file.read_bytes()) | {"choice": None}))


def prefer(bundle: Path, backend: str) -> None:
    """Make the engines of one backend the fastest, and what was chosen before that of nobody."""
    forget_choice(bundle)
    kept = EngineStore(Bundle.open(bundle))
    for record in list(kept.records().values()):
        if record.backend == backend:
            kept.add(
                replace(record, views_per_second=dict.fromkeys(record.views_per_second, 1e9)), kept_file(bundle, record)
            )


def kept_file(bundle: Path, record: Record) -> bytes:
    return (store(bundle) / record.file).read_bytes()


def test_every_changed_byte_of_the_report_is_found_or_means_the_same(built: Path) -> None:
    file, records = store(built) / "engines.json", EngineStore(Bundle.open(built)).records()
    text = file.read_bytes()
    assert len(records) == ALL
    found = []
    for place in range(0, len(text), 17):
        file.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        found.append(EngineStore(Bundle.open(built)).records())
    assert all(read in ({}, records) for read in found)
    assert found.count({}) > len(found) / 2


@pytest.mark.parametrize(
    "damage",
    [lambda file: flip(file, 0.5), lambda file: flip(file, 0.5, 0x80), cut],
    ids=["flipped", "no UTF-8", "cut"],
)
def test_with_a_damaged_report_fp32_is_compiled_and_served(
    pair: Bundle, built: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    damage(store(built) / "engines.json")

    assert_right(served(built), pair)
    assert "engines.json is damaged or of another version, so no engine in it is used" in caplog.text


def test_with_a_damaged_report_all_is_built_again(built: Path) -> None:
    cut(store(built) / "engines.json")

    assert run(built, *ONE).count(", built") == len(HERE)
    assert run(built, *ONE).count(", reused") == len(HERE)


@pytest.mark.parametrize("change", ["backend version", "cpu"])
def test_engines_of_another_host_or_version_are_not_served_and_are_built_again(
    pair: Bundle, built: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "cpu":
        monkeypatch.setattr(host, "cpu", lambda: "another CPU")
    else:
        for name in HERE:
            monkeypatch.setattr(engines.backend(name), "version", lambda: "0.0")
    implementation, compiled = engines.backend(engines.DEFAULT), []
    original = implementation.compile

    def compile_and_note(graph: bytes, precision: engines.Precision, seen: Preprocessing) -> bytes:
        compiled.append(precision)
        return original(graph, precision, seen)

    monkeypatch.setattr(implementation, "compile", compile_and_note)

    assert_right(served(built), pair)
    assert compiled == ["fp32", "fp32"]
    assert "is of this bundle, host and backend version, so FP32 is compiled now" in caplog.text
    assert run(built, *ONE).count(", built") == len(HERE)


def test_engines_of_other_weights_are_not_served(pair: Bundle, built: Path) -> None:
    members = pair.manifest.members
    swapped = tuple(
        one.model_copy(update={"file": other.file, "sha256": other.sha256})
        for one, other in zip(members, members[::-1], strict=True)
    )
    other = Bundle(built, pair.manifest.model_copy(update={"members": swapped}))

    assert all(EngineStore(Bundle.open(built)).best(member) for member in members)
    assert not any(EngineStore(other).best(member) for member in swapped)


def test_an_engine_that_computes_wrongly_is_refused_although_its_hash_is_right(built: Path) -> None:
    forget_choice(built)
    kept = EngineStore(Bundle.open(built))
    right, other = (kept.records()[f"{member}/onnxruntime/fp32"] for member in ("resnet20", "resnet32"))
    content = kept_file(built, other)
    kept.add(replace(right, sha256=other.sha256, views_per_second={"10": 1e9}), content)

    with pytest.raises(
        golden.GoldenMismatch, match=r"resnet20 on onnxruntime .* differs from the golden probabilities"
    ):
        served(built)


# Disks that are full, and builders that are killed


@pytest.mark.parametrize(("size", "built"), [(50_000, 0), (1_100_000, 1)])
def test_a_full_disk_stops_the_builder_and_leaves_what_was_built(
    pair: Bundle, bundle: Path, size: int, built: int
) -> None:
    """With 50 kB not even the backend's temporary file fits; with 1.1 MB the first engine does, but no other."""
    with disk_full_beyond(size):
        message = run(bundle)

    assert "is the disk full?" in message or re.search(r"File too large: '.*\.engine'", message)
    assert "nothing is half-written: run it again when this is solved" in message
    names = {path.name for path in store(bundle).iterdir()}
    assert names == {"lock"} | ({"engines.json", "resnet20-onnxruntime-fp32.engine"} if built else set())
    assert_right(served(bundle), pair)
    printed = run(bundle, *ONE)
    assert (printed.count(", built"), printed.count(", reused")) == (len(HERE) - built, built)


def test_a_server_without_room_for_a_temporary_file_says_so(bundle: Path) -> None:
    with disk_full_beyond(50_000), pytest.raises(OSError, match=r"ONNX Runtime can't write .*: is the disk full\?"):
        served(bundle)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_stops_the_export_and_leaves_the_bundle_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    torch.save(cifar(8, classes=3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "mine.toml").write_text(f"""
        labels = "{tmp_path}/labels.txt"
        members = [{{ weights = "{tmp_path}/mine.pth", resize = 32, crop = 32 }}]
    """)
    command = ["to_onnx.py", "--ensemble", str(tmp_path / "mine.toml"), "--bundle", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(to_onnx, "to_onnx", lambda graph: b"a graph")  # the writing is what matters
    if existing:
        to_onnx.main()
        torch.save(cifar(8, classes=3).state_dict(), tmp_path / "mine.pth")
    before = contents(tmp_path / "made")
    flush = os.fsync

    def fail_at_the_manifest(handle: int) -> None:
        if b'"format": 1' in Path(f"/proc/self/fd/{handle}").read_bytes()[:200]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail_at_the_manifest)

    with pytest.raises(
        SystemExit, match=r"No space left on device: '.*bundle\.json'; no file of the bundle was replaced"
    ):
        to_onnx.main()
    assert contents(tmp_path / "made") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_builder_leaves_a_store_that_the_next_one_completes(root: Path, pair: Bundle, bundle: Path) -> None:
    command = [sys.executable, "export/build_engines.py", str(bundle), "--precision", "fp32"]
    killed = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (store(bundle) / "engines.json").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()

    assert_right(served(bundle), pair)
    printed = run(bundle)
    assert printed.count(", built") + printed.count(", reused") == ALL
    assert printed.count(", built") > 0
