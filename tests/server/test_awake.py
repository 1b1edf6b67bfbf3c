"""With files in the kernel's place."""

import asyncio
import base64
import functools
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import ParamSpec

import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.server import awake
from resnet_ensemble.server.awake import Awake

P = ParamSpec("P")


def in_a_loop(test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def written(device: Path) -> bytes:
    return device.read_bytes()


def rewrite(file: Path, text: str) -> None:
    """An empty text: no file."""
    file.unlink()
    if text:
        file.write_text(text)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "LINGER", 0.05)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    file = tmp_path / "cpu_dma_latency"
    file.touch()
    return file


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    file = tmp_path / "current_driver"
    file.write_text("haltpoll\n")
    return file


@in_a_loop
async def test_cpus_are_kept_awake_while_a_request_is_answered_and_a_little_longer(device: Path, driver: Path) -> None:
    cpus = Awake(device, driver)
    assert not cpus.holds

    with cpus.working():
        assert cpus.holds
        assert written(device) == struct.pack("i", 0)
        await asyncio.sleep(0.1)
        assert cpus.holds
    assert cpus.holds
    await asyncio.sleep(0.1)
    assert not cpus.holds


@in_a_loop
async def test_the_gaps_of_a_stream_of_requests_are_bridged(
    device: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "LINGER", 10.0)  # however late a busy machine is
    cpus = Awake(device, driver)

    for _ in range(8):
        with cpus.working():
            pass
        await asyncio.sleep(0.02)
        assert cpus.holds
    cpus.close()


@in_a_loop
async def test_the_last_of_several_requests_lets_them_halt(device: Path, driver: Path) -> None:
    cpus = Awake(device, driver)

    with cpus.working():
        with cpus.working():
            pass
        await asyncio.sleep(0.1)
        assert cpus.holds
    await asyncio.sleep(0.1)
    assert not cpus.holds


@in_a_loop
async def test_every_hold_ends_and_leaves_no_file_open(device: Path, driver: Path) -> None:
    before = open_files()
    cpus = Awake(device, driver)

    for _ in range(3):
        with pytest.raises(ZeroDivisionError), cpus.working():
            raise ZeroDivisionError
        await asyncio.sleep(0.1)
    with cpus.working():
        cpus.close()

    assert not cpus.holds
    assert open_files() == before


@pytest.mark.parametrize("name", ["intel_idle\n", "none\n", ""])
@in_a_loop
async def test_on_other_machines_cpus_may_halt(device: Path, driver: Path, name: str) -> None:
    rewrite(driver, name)
    cpus = Awake(device, driver)

    with cpus.working():
        assert not cpus.holds
    assert not written(device)


@in_a_loop
async def test_where_there_is_no_device_they_may_halt(tmp_path: Path, driver: Path) -> None:
    cpus = Awake(tmp_path / "none", driver)

    with cpus.working():
        assert not cpus.holds


@in_a_loop
async def test_a_device_that_refuses_is_told_of_once(
    device: Path, driver: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpus = Awake(device, driver)
    rewrite(device, "")

    for _ in range(2):
        with cpus.working():
            assert not cpus.holds

    (record,) = caplog.records
    assert "CPUs may halt between requests" in record.message


@pytest.mark.parametrize("route", ["/predict", "/v2/models/cifar10/infer"])
def test_a_request_for_a_prediction_keeps_them_awake(
    client: TestClient, png: Callable[..., bytes], device: Path, driver: Path, route: str
) -> None:
    client.app.state.service.awake = Awake(device, driver)  # type: ignore[attr-defined]
    client.get("/info")
    assert not written(device)

    if route == "/predict":
        answer = client.post(route, content=png(90))
    else:
        image = base64.b64encode(png(90)).decode()
        inputs = [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}]
        answer = client.post(route, json={"inputs": inputs})

    assert answer.status_code == 200, answer.text
    assert written(device)
