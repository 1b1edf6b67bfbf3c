"""Health, information, metrics and documentation."""

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import EngineRunError
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import images
from resnet_ensemble.server.app import NOT_OF_PREDICT, create_app
from resnet_ensemble.server.errors import KINDS
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.conftest import until, wait_until_ready
from tests.server.test_refusals import Gate, assert_problem

Png = Callable[..., bytes]
Serve = Callable[..., Any]
RAW = {"Content-Type": "image/png"}


def test_a_clients_request_id_comes_back_and_a_strange_one_does_not(client: TestClient) -> None:
    assert client.get("/livez", headers={"X-Request-ID": "job-7.a_b"}).headers["x-request-id"] == "job-7.a_b"
    assert client.get("/livez", headers={"X-Request-ID": "a b<script>"}).headers["x-request-id"].isalnum()


def test_alive_but_not_ready_until_the_engines_are_checked(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = threading.Event()

    def open_with(*_: object) -> FakeEngine:
        assert checked.wait(10)
        return FakeEngine(10)

    with TestClient(create_app(Service(Settings(), open_with=open_with))) as client:
        assert client.get("/livez").json() == {"status": "ok"}
        for response in (client.get("/readyz"), client.get("/info"), client.post("/predict", content=png())):
            assert_problem(response, "not_ready")
            assert response.headers["retry-after"] == "1"
        checked.set()
        wait_until_ready(client)
        assert client.head("/readyz").status_code == 200
        assert client.post("/predict", content=png()).status_code == 200


def test_a_bundle_that_fails_its_check_is_never_ready(tmp_path: Any) -> None:
    said: list[str] = []
    service = Service(Settings(bundle=tmp_path), on_fatal=said.append)
    with TestClient(create_app(service)) as client:
        until(lambda: said)
        assert "no bundle.json" in assert_problem(client.get("/readyz"), "not_ready")["detail"]


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(28, "No space left on device"), "No space left on device"), (RuntimeError("odd"), "can't be loaded")],
)
def test_whatever_stops_the_loading_stops_the_server(error: Exception, message: str) -> None:
    def fail(*_: Any) -> Any:
        raise error

    said: list[str] = []
    with TestClient(create_app(Service(Settings(), open_with=fail, on_fatal=said.append))) as client:
        until(lambda: said)
        assert message in assert_problem(client.get("/readyz"), "not_ready")["detail"]


def test_info_describes_what_is_served(client: TestClient) -> None:
    body = client.get("/info").json()

    assert body["labels"][:2] == ["airplane", "automobile"]
    assert body["protocols"] == {"center": 1, "flip": 2, "10crop": 10, "dense": 2, "multiscale": 10}
    assert (body["protocol"], body["stop"]) == ("10crop", "full")
    assert body["stop_rules"] == ["full", "exact"]
    assert body["members"][0]["cost"].keys() == {"seconds", "batch"}
    assert body["members"][0]["engine"]["backend"] == "fake"
    assert body["members"][0]["preprocessing"]["crop"] == 32
    assert body["limits"]["max_image_bytes"] == Settings().max_image_bytes


def test_metrics_name_the_engine_that_runs_now(serve: Serve, png: Png) -> None:
    opened: list[FakeEngine] = []

    def engine(classes: int) -> FakeEngine:
        opened.append(FakeEngine(classes))
        if len(opened) > 2:  # there were two members
            opened[-1].info = replace(opened[-1].info, precision="int8")
        return opened[-1]

    with serve(engine) as client:
        opened[0].kill()
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200

        found = re.findall(
            r'^resnet_engine_info\{.*member="(.*?)",precision="(.*?)"', client.get("/metrics").text, re.MULTILINE
        )
        assert found == [("resnet20", "int8"), ("resnet32", "fp32")]


def test_metrics_count_what_happened(client: TestClient, png: Png) -> None:
    client.post("/predict", content=png(), headers=RAW)
    client.post("/predict", files=[("image", png()), ("image", b"junk")])
    client.get("/nothing")

    samples = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert samples['resnet_requests_total{method="POST",route="/predict",status="200"}'] == "2.0"
    assert samples['resnet_requests_total{method="GET",route="unmatched",status="404"}'] == "1.0"
    assert samples['resnet_errors_total{code="unsupported_image_format"}'] == "1.0"
    assert samples['resnet_images_total{protocol="10crop"}'] == "2.0"
    assert samples['resnet_stage_seconds_count{stage="total"}'] == "2.0"
    assert samples["resnet_image_views_count"] == "2.0"
    assert samples["resnet_views_planned_total"] == samples["resnet_views_used_total"] == "40.0"
    assert samples["resnet_views_saved_total"] == "0.0"
    assert samples['resnet_stops_total{at="end",rule="full"}'] == "2.0"
    assert samples['resnet_engine_restarts_total{member="resnet20"}'] == "0.0"
    assert samples["resnet_retried_images_total"] == "0.0"
    assert samples["resnet_waiting_views"] == samples["resnet_waiting_view_bytes"] == "0.0"
    assert samples["resnet_predicted_wait_seconds"] == "0.0"
    assert float(samples["resnet_batch_forming_seconds_count"]) >= 2
    assert any(name.startswith('resnet_bundle_info{bundle="cifar10-') for name in samples)
    assert any(name.startswith('resnet_engine_info{backend="fake"') for name in samples)
    assert samples["resnet_images_in_flight"] == "0.0"
    assert samples["resnet_unfinished_views"] == "0.0"
    assert samples["resnet_ready"] == "1.0"
    assert any(name.startswith("resnet_batch_views_count") for name in samples)


def test_metrics_count_what_stopping_early_saves(client: TestClient, png: Png) -> None:
    answer = client.post("/predict?stop=exact", content=png(), headers=RAW).json()
    assert 0 < answer["views_used"] < answer["views_planned"] == 20

    def sample(name: str) -> float:
        (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
        return float(line.rsplit(" ", 1)[1])

    assert sample("resnet_views_planned_total") == 20
    assert sample("resnet_views_used_total") == answer["views_used"]
    assert sample("resnet_views_saved_total") == 20 - answer["views_used"]
    assert sample('resnet_stops_total{at="early",rule="exact"}') == 1


def test_the_documentation_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs").text

    assert "http://" not in page.replace("http://testserver", "")
    assert "https://" not in page
    script = page.split('<script src="')[1].split('"')[0]
    assert client.get(script).status_code == 200
    assert client.get("/", follow_redirects=False).headers["location"] == "docs"


def test_the_openapi_document_lists_every_problem_of_predict(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]

    statuses = {str(kind.status) for code, kind in KINDS.items() if code not in NOT_OF_PREDICT}
    assert statuses | {"200"} == operation["responses"].keys()
    assert {"multipart/form-data", "image/*"} <= operation["requestBody"]["content"].keys()
    assert json.dumps(operation).count("corrupt_image") >= 1


def test_a_dead_engine_is_opened_anew_and_readiness_tells(png: Png) -> None:
    engines: list[FakeEngine] = []
    go = threading.Event()
    go.set()

    def open_with(*_: object) -> FakeEngine:
        assert go.wait(10)
        engines.append(FakeEngine(10))
        return engines[-1]

    with TestClient(create_app(Service(Settings(), open_with=open_with))) as client, ThreadPoolExecutor() as pool:
        until(lambda: client.get("/readyz").status_code == 200)
        go.clear()
        engines[0].kill()
        request = pool.submit(client.post, "/predict", content=png(255), headers=RAW)
        until(lambda: client.get("/readyz").status_code == 503)

        assert "resnet20 died and is being opened anew" in assert_problem(client.get("/readyz"), "not_ready")["detail"]
        assert "resnet_ready 0.0" in client.get("/metrics").text
        go.set()
        assert request.result().json()["label"] == "truck"
        until(lambda: client.get("/readyz").status_code == 200)
        assert 'resnet_engine_restarts_total{member="resnet20"} 1.0' in client.get("/metrics").text


def test_an_engine_that_can_not_be_opened_anew_closes_the_door(pair: Bundle, png: Png) -> None:
    engines: list[FakeEngine] = []

    def open_with(*_: object) -> FakeEngine:
        if len(engines) == 2:
            raise OSError("no device")
        engines.append(FakeEngine(10))
        return engines[-1]

    service = Service(Settings(bundle=pair.path), open_with=open_with)
    with TestClient(create_app(service)) as client:
        wait_until_ready(client)
        engines[1].kill()

        waited = assert_problem(client.post("/predict", content=png(), headers=RAW), "not_ready")
        assert "died, and could not be opened anew yet" in waited["detail"]
        refused = assert_problem(client.post("/predict", content=png(), headers=RAW), "not_ready")
        assert "resnet32 died and is being opened anew; it failed with OSError: no device" in refused["detail"]


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_where_an_engine_can_not_be_opened_anew_on_a_gpu_the_process_asks_to_be_restarted(
    pair: Bundle, png: Png, backend: str
) -> None:
    """Most of CUDA's errors stay until the process ends; on a CPU there is nothing like that."""
    engines: list[FakeEngine] = []
    lost = threading.Event()

    def open_with(*_: object) -> FakeEngine:
        if lost.is_set():
            raise EngineRunError("cudaErrorIllegalAddress")
        engines.append(FakeEngine(10))
        engines[-1].info = replace(engines[-1].info, backend=backend)
        return engines[-1]

    with TestClient(create_app(Service(Settings(bundle=pair.path), open_with=open_with))) as client:
        wait_until_ready(client)
        lost.set()
        engines[1].kill()
        assert_problem(client.post("/predict", content=png(), headers=RAW), "not_ready")
        if backend == "tensorrt":
            refused = assert_problem(client.get("/livez"), "not_ready")
            assert "failed with EngineRunError: cudaErrorIllegalAddress" in refused["detail"]
            assert client.get("/readyz").json()["detail"] == refused["detail"]
            lost.clear()
            wait_until_ready(client)
        assert client.get("/livez").status_code == 200


def test_a_hung_engine_is_told_by_liveness_and_to_whom_it_concerns(serve: Serve, png: Png) -> None:
    gate = Gate()
    with serve(gate, streams=1, engine_timeout_seconds=0.5) as client:
        gate.open.clear()
        refused = assert_problem(client.post("/predict", content=png(), headers=RAW), "not_ready")
        assert "must be restarted" in refused["detail"]
        alive, ready = (assert_problem(client.get(path), "not_ready")["detail"] for path in ("/livez", "/readyz"))
        hung, other = ("resnet20", "resnet32") if "resnet20" in alive else ("resnet32", "resnet20")
        assert alive == ready == f"the engine of {hung} hangs: this process must be restarted"
        assert_problem(client.post("/predict", content=png(), headers=RAW), "not_ready")
        assert client.get("/v2/health/live").status_code == 503
        assert client.get(f"/v2/models/cifar10-{hung}/ready").status_code == 503
        assert client.get(f"/v2/models/cifar10-{other}/ready").status_code == 200
        text = client.get("/metrics").text
        assert f'resnet_engine_hangs_total{{member="{hung}"}} 1.0' in text
        assert "resnet_ready 0.0" in text

        gate.open.set()
        wait_until_ready(client)
        assert client.get("/livez").status_code == 200
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200


def test_the_event_loop_goes_on_while_decoders_and_engines_are_stuck(
    serve: Serve, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = images.decode
    go, decoding, running = threading.Event(), threading.Semaphore(0), threading.Event()

    class Stuck(FakeEngine):
        """In its first run after `running` was cleared, so that one worker is left for decoding."""

        def run(self, views: Any) -> Any:
            first = not running.is_set()
            running.set()
            assert not first or go.wait(10)
            return super().run(views)

    def decode(content: bytes, **options: Any) -> Any:
        image = original(content, **options)
        if image.width > 32:
            decoding.release()
            assert go.wait(10)
        return image

    go.set()
    with serve(Stuck, streams=2) as client, ThreadPoolExecutor(2) as pool:
        go.clear()
        running.clear()
        small = pool.submit(client.post, "/predict?protocol=center", content=png(), headers=RAW)
        assert running.wait(10)
        monkeypatch.setattr("resnet_ensemble.server.classifier.images.decode", decode)
        large = pool.submit(client.post, "/predict", files=[("image", png(0, (40, 40)))] * 20)
        assert decoding.acquire(timeout=10)

        for path in ("/livez", "/readyz", "/info", "/metrics"):
            assert client.get(path).status_code == 200
        assert_problem(
            client.post("/predict", content=b"", headers=RAW | {"X-Request-Timeout": "0.1"}), "deadline_exceeded"
        )
        assert not small.done()
        assert not large.done()
        go.set()
        assert small.result().status_code == large.result().status_code == 200
