"""Health, information, metrics and documentation."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.errors import KINDS
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.server.test_refusals import assert_problem

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
        deadline = time.monotonic() + 10
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
        assert client.head("/readyz").status_code == 200
        assert client.post("/predict", content=png()).status_code == 200


def test_a_bundle_that_fails_its_check_is_never_ready(tmp_path: Any) -> None:
    said: list[str] = []
    service = Service(Settings(bundle=tmp_path), on_fatal=said.append)
    with TestClient(create_app(service)) as client:
        deadline = time.monotonic() + 10
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "no bundle.json" in assert_problem(client.get("/readyz"), "not_ready")["detail"]


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
    assert samples["resnet_images_in_flight"] == "0.0"
    assert samples["resnet_unfinished_views"] == "0.0"
    assert samples["resnet_ready"] == "1.0"
    assert any(name.startswith("resnet_batch_views_count") for name in samples)


def test_the_documentation_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs").text

    assert "http://" not in page.replace("http://testserver", "")
    assert "https://" not in page
    script = page.split('<script src="')[1].split('"')[0]
    assert client.get(script).status_code == 200
    assert client.get("/", follow_redirects=False).headers["location"] == "docs"


def test_the_openapi_document_lists_every_problem_of_predict(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]

    statuses = {str(kind.status) for code, kind in KINDS.items() if code not in ("not_found", "method_not_allowed")}
    assert statuses | {"200"} == operation["responses"].keys()
    assert {"multipart/form-data", "image/*"} <= operation["requestBody"]["content"].keys()
    assert json.dumps(operation).count("corrupt_image") >= 1
