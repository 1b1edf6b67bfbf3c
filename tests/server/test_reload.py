"""Another bundle takes over while requests are answered, or does not."""

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.export import sealed
from resnet_ensemble.export.bundle import Bundle, Member
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.conftest import until, wait_until_ready
from tests.server.test_process import metric, process, wait_for
from tests.server.test_process import wait_until_ready as wait_for_process
from tests.server.test_refusals import Gate, assert_problem

Png = Callable[..., bytes]
KEY = "0123456789abcdef"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


def change(bundle: Path, **fields: Any) -> None:
    """Other fields in a bundle's manifest."""
    file = bundle / "bundle.json"
    file.write_bytes(sealed.dumps(sealed.loads(file.read_bytes()) | fields))


@pytest.fixture
def bundles(tmp_path: Path, pair: Bundle) -> Path:
    """A folder of bundles: `served` and `next`, of other versions."""
    for name in ("served", "next"):
        shutil.copytree(pair.path, tmp_path / name)
        change(tmp_path / name, version=name)
    return tmp_path


@contextmanager
def serving(bundles: Path, open_with: Callable[..., Any] | None = None, **settings: Any) -> Iterator[TestClient]:
    """`bundles/served` on fake engines, or what `open_with` makes of a bundle and a member."""

    def fake(bundle: Bundle, member: Member, _: Settings) -> FakeEngine:
        return open_with(bundle, member) if open_with else FakeEngine(len(bundle.manifest.labels))

    chosen = Settings(**{"bundle": bundles / "served", "reload_from": bundles, "admin_key": KEY} | settings)
    with TestClient(create_app(Service(chosen, open_with=fake)), raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def reload(client: TestClient, **wanted: str) -> Any:
    return client.post("/admin/reload", json=wanted, headers=WITH_KEY)


def test_a_bundle_that_is_named_takes_over(bundles: Path, png: Png) -> None:
    with serving(bundles) as client:
        before = client.get("/info").json()["bundle"]
        body = reload(client, bundle="next").json()

        assert body["previous"] == before
        assert body["bundle"].startswith("cifar10-next-")
        assert client.get("/info").json()["bundle"] == body["bundle"]
        assert client.post("/predict", content=png()).headers["x-bundle"] == body["bundle"]
        assert client.get("/v2/models/cifar10").json()["versions"] == ["next"]
        text = client.get("/metrics").text
        assert f'resnet_bundle_info{{bundle="{body["bundle"]}"}} 1.0' in text
        assert before not in text
        assert 'resnet_reloads_total{result="switched"} 1.0' in text


def test_without_a_name_the_served_path_is_loaded_again(bundles: Path) -> None:
    with serving(bundles) as client:
        change(bundles / "served", version="edited")
        for send in (lambda: reload(client), lambda: client.post("/admin/reload", headers=WITH_KEY)):
            deadline = time.monotonic() + 10
            while (response := send()).status_code == 409:  # the one before is being closed
                assert time.monotonic() < deadline
            assert response.json()["bundle"].startswith("cifar10-edited-")


def test_no_request_fails_while_bundles_change(bundles: Path, png: Png) -> None:
    stop = threading.Event()

    def send(client: TestClient) -> list[tuple[int, str]]:
        seen = []
        while not stop.is_set():
            response = client.post("/predict", content=png(255))
            seen.append((response.status_code, response.headers.get("x-bundle", "")))
        return seen

    def slow(bundle: Bundle, member: Member) -> FakeEngine:
        return FakeEngine(10, seconds_per_view=0.0005)

    with serving(bundles, slow) as client, ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, client) for _ in range(4)]
        served = set()
        for name in ("next", "served", "next"):
            deadline = time.monotonic() + 20
            while (response := reload(client, bundle=name)).status_code == 409:
                assert time.monotonic() < deadline
            served.add(response.json()["bundle"])
        stop.set()
        seen = [entry for sender in senders for entry in sender.result()]

        assert {status for status, _ in seen} == {200}
        assert served <= {bundle for _, bundle in seen} | {response.json()["bundle"]}
        assert client.get("/readyz").status_code == 200


def test_what_was_accepted_is_answered_by_the_old_bundle(bundles: Path, png: Png) -> None:
    gate = Gate()
    closed: list[str] = []

    def engine(bundle: Bundle, member: Member) -> FakeEngine:
        made = gate(10) if bundle.manifest.version == "served" else FakeEngine(10)
        made.close = lambda: closed.append(bundle.manifest.version)  # type: ignore[method-assign]
        return made

    # Most of its images are not even decoded when the other bundle takes over: that would be too many bytes.
    with serving(bundles, engine, max_view_bytes=1) as client, ThreadPoolExecutor() as pool:
        in_time = {"X-Request-Timeout": "10"}
        old = gate.hold(lambda: pool.submit(client.post, "/predict", files=[("image", png())] * 60, headers=in_time))
        assert reload(client, bundle="next").status_code == 200
        assert client.post("/predict", content=png()).headers["x-bundle"].startswith("cifar10-next-")
        assert_problem(reload(client), "reload_in_progress")
        assert closed == []
        gate.open.set()

        assert [entry["problem"] for entry in old.result().json()["results"]] == [None] * 60
        assert old.result().headers["x-bundle"].startswith("cifar10-served-")
        until(lambda: closed == ["served", "served"])


def test_one_bundle_is_loaded_at_a_time(bundles: Path) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def engine(bundle: Bundle, member: Member) -> FakeEngine:
        if bundle.manifest.version == "next":
            loading.set()
            assert go_on.wait(10)
        return FakeEngine(10)

    with serving(bundles, engine) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(reload, client, bundle="next")
        assert loading.wait(10)
        assert_problem(reload(client), "reload_in_progress")
        go_on.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "no bundle.json"),
        ("junk", "bundle.json is not JSON"),
        ("pipe", "it is no regular file"),
        ("thresholds", "stopping.json of cifar10 is not JSON"),
        ("engine", "no room on the device"),
    ],
)
def test_a_bundle_that_fails_leaves_the_old_one_and_tells_why(bundles: Path, png: Png, fault: str, reason: str) -> None:
    def engine(bundle: Bundle, member: Member) -> FakeEngine:
        if (bundle.manifest.version, fault) == ("next", "engine"):
            raise RuntimeError("no room on the device")
        return FakeEngine(10)

    if fault == "missing":
        shutil.rmtree(bundles / "next")
    if fault == "junk":
        (bundles / "next" / "bundle.json").write_text("{")
    if fault == "thresholds":
        (bundles / "next" / "stopping.json").write_text("{")
    if fault == "pipe":
        (bundles / "next" / "bundle.json").unlink()
        os.mkfifo(bundles / "next" / "bundle.json")
    with serving(bundles, engine) as client:
        before = client.get("/info").json()["bundle"]
        detail = assert_problem(reload(client, bundle="next"), "bundle_refused")["detail"]

        assert reason in detail
        assert client.post("/predict", content=png()).headers["x-bundle"] == before
        assert 'resnet_reloads_total{result="refused"} 1.0' in client.get("/metrics").text
        assert reload(client).status_code == 200  # of what is served


def test_an_engine_that_can_t_be_closed_keeps_no_other_from_it(bundles: Path) -> None:
    closed: list[tuple[str, str]] = []

    def engine(bundle: Bundle, member: Member) -> FakeEngine:
        made = FakeEngine(10)

        def close() -> None:
            closed.append((bundle.manifest.version, member.name))
            raise RuntimeError("the driver is gone")

        made.close = close  # type: ignore[method-assign]
        return made

    with serving(bundles, engine) as client:
        assert reload(client, bundle="next").status_code == 200
        until(lambda: len(closed) == 2)

    assert {*closed} == {(bundle, member) for bundle in ("served", "next") for member in ("resnet20", "resnet32")}


@pytest.mark.parametrize("named", ["..", "../served", "/etc", "link", "next/../../x"])
def test_a_path_outside_of_the_folder_is_refused(bundles: Path, tmp_path: Path, named: str) -> None:
    allowed = bundles / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(bundles / "next")
    with serving(bundles, reload_from=allowed) as client:
        assert_problem(reload(client, bundle=named), "bundle_not_allowed")


def test_without_a_folder_no_bundle_can_be_named(bundles: Path) -> None:
    with serving(bundles, reload_from=None) as client:
        assert "RESNET_RELOAD_FROM" in assert_problem(reload(client, bundle="next"), "bundle_not_allowed")["detail"]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer 0123456789abcdeX", KEY, f"bearer {KEY}x", "Bearer ö" * 9])
def test_without_the_key_nothing_is_done(bundles: Path, header: str) -> None:
    with serving(bundles) as client:
        response = client.post("/admin/reload", content=b"x" * 10**6, headers={"Authorization": header.encode()})

        assert_problem(response, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
        assert 'resnet_reloads_total{result="switched"} 0.0' in client.get("/metrics").text


def test_where_no_key_is_set_there_is_no_admin(client: TestClient) -> None:
    for headers in ({}, WITH_KEY, {"Authorization": "Bearer None"}):
        assert_problem(client.post("/admin/reload", headers=headers), "not_found")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_option"),
        (b"[]", "invalid_option"),
        (b'{"bundel": "next"}', "invalid_option"),
        (b'{"bundle": 7}', "invalid_option"),
        (b'{"bundle": ""}', "invalid_option"),
        (b'{"bundle": "a\\u0000b"}', "invalid_option"),
        (b" " * 5000, "request_too_large"),
    ],
)
def test_a_body_that_names_no_bundle_is_refused(bundles: Path, content: bytes, code: str) -> None:
    with serving(bundles) as client:
        assert_problem(client.post("/admin/reload", content=content, headers=WITH_KEY), code)


def test_a_server_that_is_not_ready_does_not_reload(tmp_path: Path) -> None:
    with TestClient(create_app(Service(Settings(bundle=tmp_path, admin_key=KEY)))) as client:
        assert_problem(reload(client), "not_ready")


def test_a_reload_whose_request_is_cancelled_is_finished_and_its_engines_are_closed(bundles: Path) -> None:
    """Uvicorn cancels requests at the drain limit; threads of an engine that nobody closes would end with 1."""
    loading, go_on = threading.Event(), threading.Event()
    opened: list[FakeEngine] = []
    closed: list[FakeEngine] = []

    def engine(bundle: Bundle, *_: object) -> FakeEngine:
        if opened[1:]:
            loading.set()
            assert go_on.wait(10)
        made = FakeEngine(10)
        made.close = lambda: closed.append(made)  # type: ignore[method-assign]
        opened.append(made)
        return made

    async def reload_and_stop() -> None:
        service = Service(Settings(bundle=bundles / "served"), open_with=engine)
        await service.start()
        await asyncio.to_thread(until, lambda: b"resnet_ready 1.0" in service.measurements())
        request = asyncio.create_task(service.reload())
        await asyncio.to_thread(loading.wait, 10)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.05)
        go_on.set()
        await stopping

    asyncio.run(reload_and_stop())
    assert len(opened) == 4
    assert {*map(id, closed)} == {*map(id, opened)}


def test_a_link_that_leads_to_itself_is_no_failure_of_ours(bundles: Path) -> None:
    (bundles / "loop").symlink_to("loop")
    with serving(bundles) as client:
        assert_problem(reload(client, bundle="loop"), "bundle_refused")


def test_sighup_loads_again_and_a_wrong_bundle_is_not_served(bundles: Path) -> None:
    served = bundles / "served"
    golden = json.loads((served / "bundle.json").read_text())["golden"]
    ship = (served / "golden" / "ship.png").read_bytes()
    switched = threading.Event()

    def send(url: str) -> list[int]:
        statuses = []
        while not switched.is_set():
            statuses.append(httpx2.post(f"{url}/predict", content=ship, timeout=30).status_code)
        return statuses

    with process(RESNET_BUNDLE=str(served), RESNET_ADMIN_KEY=KEY) as (running, url), ThreadPoolExecutor() as pool:
        wait_for_process(url)
        sender = pool.submit(send, url)
        change(served, version="sound")
        running.send_signal(signal.SIGHUP)
        wait_for(url, 'resnet_reloads_total{result="switched"}', 1)
        switched.set()
        assert set(sender.result()) == {200}
        assert httpx2.get(f"{url}/info").json()["bundle"].startswith("cifar10-sound-")

        wrong = [
            entry | {"probabilities": {name: row[::-1] for name, row in entry["probabilities"].items()}}
            for entry in golden
        ]
        change(served, version="wrong", golden=wrong)
        response = httpx2.post(f"{url}/admin/reload", headers=WITH_KEY, timeout=30)
        assert "golden" in assert_problem(response, "bundle_refused")["detail"]
        running.send_signal(signal.SIGHUP)
        wait_for(url, 'resnet_reloads_total{result="refused"}', 2)
        assert metric(url, "resnet_ready") == 1
        assert httpx2.get(f"{url}/info").json()["bundle"].startswith("cifar10-sound-")

        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
