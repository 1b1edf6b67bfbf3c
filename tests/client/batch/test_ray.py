"""The same job with Ray. Ray is heavy and not in the development environment; pip install 'resnet-ensemble[ray]'."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._ray import Work, Worker, _table, slabs
from resnet_ensemble.client.batch._rows import Row, printable
from resnet_ensemble.export.bundle import Bundle
from tests.client.batch.conftest import rows_of

Png = Callable[..., bytes]
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")


def job(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-m", "resnet_ensemble.client.batch", "photos", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finished(running: "subprocess.Popen[str]") -> int:
    _, told = running.communicate(timeout=240)
    assert running.returncode in (0, 3), told
    return running.returncode


def without_latency(rows: list[Row]) -> list[Row]:
    return sorted(({**row, "latency_ms": None, "bundle": None} for row in rows), key=lambda row: str(row["id"]))


def test_a_stream_is_cut_into_lists_by_number_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_ensemble.client.batch import _ray

    monkeypatch.setattr(_ray, "_SLAB_ITEMS", 3)
    monkeypatch.setattr(_ray, "_SLAB_BYTES", 10)
    sizes = [0, 0, 0, 0, 0, 12, 4, 4, 4, 4]

    cut = list(slabs(enumerate(Item(str(n), str(n), bytes(size)) for n, size in enumerate(sizes))))

    assert [[position for position, _ in slab] for slab in cut] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_an_actor_reads_files_whose_names_may_be_any_bytes(tmp_path: Path) -> None:
    names = [f"{tmp_path}/{os.fsdecode(name)}" for name in (b"caf\xe9.jpg", b"\xff\n.jpg", "ä😀.jpg".encode())]
    for name in names:
        Path(name).write_text("a picture")
    names.append("\ud800.jpg")  # half a pair, which JSON can spell; no file has that name
    items = list(enumerate(Item(printable(name), name) for name in names))
    # It reads more than the server takes, so that none is needed.
    worker = Worker(Work(None, None, None, "cifar10-2-0", 3, 5, None, None, 8, 60.0, 600.0))

    done = worker(_table(pa, items)).to_pylist()
    worker._runner.close()

    rows = [json.loads(one["row"]) for one in done]
    assert [row["error_code"] for row in rows] == ["image_too_large"] * 3 + ["unreadable"]
    assert [row["path"] for row in rows] == [row["id"] for row in rows] == [printable(name) for name in names]


@needs_ray
def test_two_actors_give_the_rows_of_the_server_and_a_killed_job_is_resumed(
    shipped: Bundle, tmp_path: Path, png: Png, fake_server: str
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(200):
        (tmp_path / "photos" / f"{number:03}.png").write_bytes(png(number) if number != 7 else b"no picture")
    assert finished(job(tmp_path, "--output", "served.jsonl", "--url", fake_server)) == 3
    served = without_latency(rows_of(tmp_path / "served.jsonl"))

    with_server = ["--output", "ray.jsonl", "--url", fake_server, "--ray", "2", "--shard-rows", "10"]
    killed = job(tmp_path, *with_server)
    ledger = tmp_path / "ray.jsonl.shards" / "_ledger"
    while not ledger.exists() or len(ledger.read_text().splitlines()) < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert finished(job(tmp_path, *with_server)) == 3

    assert without_latency(rows_of(tmp_path / "ray.jsonl")) == served


@needs_ray
def test_two_actors_with_the_bundle_give_the_rows_of_one_process(shipped: Bundle, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for file in (shipped.path / "golden").iterdir():
        (tmp_path / "photos" / file.name).write_bytes(file.read_bytes())
    with_bundle = ["--bundle", str(shipped.path), "--order", "input", "--max-concurrency", "2"]

    assert finished(job(tmp_path, "--output", "here.jsonl", *with_bundle)) == 0
    assert finished(job(tmp_path, "--output", "ray.jsonl", *with_bundle, "--ray", "2")) == 0

    assert [row["id"] for row in rows_of(tmp_path / "ray.jsonl")] == [
        row["id"] for row in rows_of(tmp_path / "here.jsonl")
    ]
    assert without_latency(rows_of(tmp_path / "ray.jsonl")) == without_latency(rows_of(tmp_path / "here.jsonl"))
