"""The HTTP interface on fake engines, which answer by brightness: black is airplane (0), white is truck (9)."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.errors import KINDS
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings

Png = Callable[..., bytes]
Serve = Callable[..., Any]
RAW = {"Content-Type": "image/png"}


def assert_problem(response: Any, code: str) -> dict[str, Any]:
    """An RFC 9457 document of the code, with the status that the table has for it."""
    body: dict[str, Any] = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (body["code"], body["status"]) == (code, response.status_code) == (code, KINDS[code].status)
    assert body["type"] == f"urn:resnet-ensemble:problem:{code}"
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    return body


class Fails(FakeEngine):
    """Fails on white views."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, fails=lambda view: bool(view.min() == 255))


class Gate:
    """Makes fake engines that, once held, wait until the gate is opened."""

    def __init__(self, **options: Any) -> None:
        self.open, self.entered, self.options = threading.Event(), threading.Event(), options
        self.open.set()

    def __call__(self, classes: int) -> FakeEngine:
        gate = self

        class Gated(FakeEngine):
            def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
                gate.entered.set()
                assert gate.open.wait(10)
                return super().run(views)

        return Gated(classes, **self.options)

    def hold(self, send: Callable[[], "Future[Any]"]) -> "Future[Any]":
        """Close the gate, send a request, and wait until an engine has it."""
        self.open.clear()
        self.entered.clear()
        request = send()
        assert self.entered.wait(10)
        return request


# Predictions


@pytest.mark.parametrize(("brightness", "label", "index"), [(0, "airplane", 0), (255, "truck", 9)])
def test_a_form_with_one_image_is_answered_with_its_prediction(
    client: TestClient, png: Png, brightness: int, label: str, index: int
) -> None:
    response = client.post("/predict", files={"image": png(brightness)})

    body = response.json()
    assert response.status_code == 200
    assert (body["label"], body["index"]) == (label, index)
    assert body["probability"] == body["top"][0]["probability"] > 0.5


def test_a_raw_body_is_answered_as_a_form_is(client: TestClient, png: Png) -> None:
    form = client.post("/predict", files={"image": png(90)}).json()

    for headers in (RAW, {"Content-Type": "image/jpeg"}, {"Content-Type": "application/octet-stream"}, {}):
        raw = client.post("/predict", content=png(90), headers=headers).json()
        assert raw["top"] == form["top"]


def test_the_default_is_every_member_and_ten_views(client: TestClient, png: Png) -> None:
    body = client.post("/predict", content=png(), headers=RAW).json()

    members = len(body["members"])
    assert members >= 2
    assert (body["protocol"], body["stop_rule"]) == ("10crop", "full")
    assert body["views_used"] == body["views_planned"] == 10 * members


@pytest.mark.parametrize(("protocol", "views"), [("center", 1), ("flip", 2), ("10crop", 10)])
def test_the_protocol_is_chosen_per_request(client: TestClient, png: Png, protocol: str, views: int) -> None:
    query = client.post("/predict", params={"protocol": protocol}, content=png(), headers=RAW)
    form = client.post("/predict", files={"image": png()}, data={"protocol": protocol})

    for body in (query.json(), form.json()):
        assert body["protocol"] == protocol
        assert body["views_used"] == views * len(body["members"])


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_top_k_answers_the_most_probable_classes_in_order(
    client: TestClient, png: Png, top_k: int, expected: int
) -> None:
    body = client.post("/predict", params={"top_k": top_k}, files={"image": png(100)}).json()

    probabilities = [entry["probability"] for entry in body["top"]]
    assert len(probabilities) == expected
    assert probabilities == sorted(probabilities, reverse=True)


def test_all_probabilities_sum_to_one(client: TestClient, png: Png) -> None:
    body = client.post("/predict", params={"top_k": 10}, content=png(77), headers=RAW).json()

    assert sum(entry["probability"] for entry in body["top"]) == pytest.approx(1, abs=1e-6)


def test_each_member_votes(serve: Serve, png: Png) -> None:
    engines = iter([FakeEngine(10), Constant(3), *(FakeEngine(10) for _ in range(8))])
    with serve(lambda _: next(engines)) as client:
        body = client.post("/predict", content=png(0), headers=RAW).json()

    assert [vote["index"] for vote in body["members"][:2]] == [0, 3]
    assert {"member", "label", "index", "probability"} == body["members"][0].keys()


class Constant(FakeEngine):
    """Sure of one class, whatever it sees."""

    def __init__(self, index: int) -> None:
        super().__init__(10)
        self.index = index

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.eye(10, dtype=np.float32)[[self.index] * len(views)]


def test_timings_are_in_the_body_and_in_the_headers(client: TestClient, png: Png) -> None:
    response = client.post("/predict", files={"image": png()})

    timings = response.json()["timings_ms"]
    assert list(timings) == ["decode", "views", "queue", "inference", "average", "total"]
    assert all(value >= 0 for value in timings.values())
    assert timings["total"] >= timings["inference"]
    stages = [entry.split(";")[0] for entry in response.headers["server-timing"].split(", ")]
    assert stages == list(timings)
    assert response.headers["x-views-used"] == str(response.json()["views_used"])
    assert response.headers["x-protocol"] == "10crop"
    assert response.headers["x-bundle"] == response.json()["bundle"]


def test_several_images_are_answered_in_order_each_failing_alone(client: TestClient, png: Png) -> None:
    parts = [
        ("image", (f"{i}.png", content)) for i, content in enumerate([png(255), b"junk", png(0), b"", png(255)[:40]])
    ]

    response = client.post("/predict", files=parts)

    results = response.json()["results"]
    assert response.status_code == 200
    assert [(r["position"], r["filename"]) for r in results] == [(i, f"{i}.png") for i in range(5)]
    assert [r["prediction"] and r["prediction"]["label"] for r in results] == ["truck", None, "airplane", None, None]
    codes = [r["problem"] and r["problem"]["code"] for r in results]
    assert codes == [None, "unsupported_image_format", None, "empty_image", "corrupt_image"]


def test_an_image_that_breaks_a_model_fails_alone(serve: Serve, png: Png) -> None:
    with serve(Fails) as client:
        parts = [("image", png(brightness)) for brightness in (0, 255, 30)]
        results = client.post("/predict", files=parts).json()["results"]

        assert [r["problem"] and r["problem"]["code"] for r in results] == [None, "engine_failure", None]
        assert_problem(client.post("/predict", content=png(255), headers=RAW), "engine_failure")


def test_concurrent_requests_share_batches_and_get_their_own_answers(serve: Serve, png: Png) -> None:
    engines: list[FakeEngine] = []

    def engine(classes: int) -> FakeEngine:
        engines.append(FakeEngine(classes, seconds_per_view=0.0005))
        return engines[-1]

    with serve(engine, streams=1) as client, ThreadPoolExecutor(16) as pool:
        for warm in engines:
            warm.batches.clear()
        brightness = [int(b) for b in np.random.default_rng(0).integers(0, 256, 64)]
        answers = list(pool.map(lambda b: client.post("/predict", content=png(b), headers=RAW).json(), brightness))

    for value, answer in zip(brightness, answers, strict=True):
        assert abs(answer["index"] - value / 255 * 9) <= 0.51
    batches = [size for e in engines for size in e.batches]
    assert max(batches) > 10  # more than one image's views


# Refusals


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_image"), (b"no image", "unsupported_image_format"), (b"BM" + b"\0" * 40, "corrupt_image")],
)
def test_a_bad_image_is_answered_with_a_problem(client: TestClient, content: bytes, code: str) -> None:
    assert_problem(client.post("/predict", content=content, headers=RAW), code)
    assert_problem(client.post("/predict", files={"image": ("x", content)}), code)


def test_another_path_is_not_found(client: TestClient) -> None:
    assert_problem(client.get("/nothing"), "not_found")


def test_another_method_is_told_which_are_allowed(client: TestClient) -> None:
    response = client.get("/predict")

    assert_problem(response, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_told_how_to_send_an_image(client: TestClient, png: Png, content_type: str) -> None:
    problem = assert_problem(
        client.post("/predict", content=png(), headers={"Content-Type": content_type}), "unsupported_media_type"
    )

    assert "curl -F image=@cat.jpg" in problem["detail"]


@pytest.mark.parametrize(
    "options",
    [{"top_k": "0"}, {"top_k": "1001"}, {"top_k": "many"}, {"protocol": "11crop"}, {"topk": "3"}],
    ids=str,
)
def test_a_wrong_option_is_named_wherever_it_is_given(client: TestClient, png: Png, options: dict[str, str]) -> None:
    (name,) = options

    for response in (
        client.post("/predict", params=options, content=png(), headers=RAW),
        client.post("/predict", files={"image": png()}, data=options),
    ):
        assert name in assert_problem(response, "invalid_option")["detail"]


def test_an_option_in_the_query_counts_over_one_in_the_form(client: TestClient, png: Png) -> None:
    both = client.post("/predict", params={"top_k": 1}, files={"image": png()}, data={"top_k": "2"})

    assert len(both.json()["top"]) == 1


def test_an_option_given_twice_in_the_form_is_refused(client: TestClient, png: Png) -> None:
    assert_problem(client.post("/predict", files={"image": png()}, data={"top_k": ["1", "2"]}), "invalid_option")


def test_a_form_without_an_image_is_told_its_name(client: TestClient, png: Png) -> None:
    assert_problem(client.post("/predict", files={"image": (None, "cat.jpg")}), "missing_image")
    assert "'image'" in assert_problem(client.post("/predict", files={"file": png()}), "invalid_option")["detail"]
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(client.post("/predict", content=b"--x--\r\n", headers=boundary), "missing_image")


@pytest.mark.parametrize("header", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_malformed_form_is_refused(client: TestClient, header: str) -> None:
    assert_problem(
        client.post("/predict", content=b"not a form", headers={"Content-Type": header}), "malformed_request"
    )


def test_too_many_images_are_refused(serve: Serve, png: Png) -> None:
    with serve(max_images_per_request=2) as client:
        assert_problem(client.post("/predict", files=[("image", png())] * 3), "too_many_images")
        assert client.post("/predict", files=[("image", png())] * 2).status_code == 200


def test_an_image_with_too_many_bytes_fails_alone(serve: Serve, png: Png) -> None:
    with serve(max_image_bytes=200) as client:
        large = png(0, (500, 500), "BMP")
        assert_problem(client.post("/predict", content=large, headers=RAW), "image_too_large")
        results = client.post("/predict", files=[("image", large), ("image", png())]).json()["results"]

    assert [r["problem"] and r["problem"]["code"] for r in results] == ["image_too_large", None]


def test_a_request_that_announces_too_many_bytes_is_refused_unread(serve: Serve) -> None:
    with serve(max_image_bytes=100, max_request_bytes=1000) as client:
        assert_problem(client.post("/predict", content=b"x" * 1001, headers=RAW), "request_too_large")


def test_a_request_that_streams_too_many_bytes_is_refused(serve: Serve) -> None:
    def endless() -> Any:
        for _ in range(50):
            yield b"x" * 100

    with serve(max_image_bytes=100, max_request_bytes=1000) as client:
        assert_problem(client.post("/predict", content=endless(), headers=RAW), "request_too_large")


def test_too_many_pixels_are_refused(serve: Serve, png: Png) -> None:
    with serve(max_image_pixels=100) as client:
        assert_problem(client.post("/predict", content=png(0, (11, 10)), headers=RAW), "too_many_pixels")


def test_a_client_above_its_quota_is_refused(serve: Serve, png: Png) -> None:
    gate = Gate()
    with serve(gate, max_images_per_client=2, max_images_per_request=2) as client, ThreadPoolExecutor() as pool:
        first = gate.hold(lambda: pool.submit(client.post, "/predict", files=[("image", png())] * 2))
        response = client.post("/predict", content=png(), headers=RAW)
        gate.open.set()

        assert_problem(response, "quota_exceeded")
        assert response.headers["retry-after"] == "1"
        assert first.result().status_code == 200
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200


def test_an_overloaded_server_says_when_to_come_back(serve: Serve, png: Png) -> None:
    gate = Gate(seconds_per_view=0.002)
    with serve(gate, streams=1, max_wait_seconds=0.02) as client, ThreadPoolExecutor() as pool:
        first = gate.hold(lambda: pool.submit(client.post, "/predict", files=[("image", png())] * 5))
        response = client.post("/predict", content=png(), headers=RAW)
        gate.open.set()

        assert_problem(response, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert first.result().status_code == 200
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200


def test_an_unexpected_failure_is_a_problem_without_internals(
    serve: Serve, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with serve() as client:
        monkeypatch.setattr("resnet_ensemble.server.ensemble.average", fail)
        response = client.post("/predict", content=png(), headers=RAW)
        assert_problem(response, "internal_error")
        assert "secret" not in response.text
        monkeypatch.undo()
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200


# Around predictions


def test_a_clients_request_id_comes_back_and_a_strange_one_does_not(client: TestClient) -> None:
    assert client.get("/livez", headers={"X-Request-ID": "job-7.a_b"}).headers["x-request-id"] == "job-7.a_b"
    assert client.get("/livez", headers={"X-Request-ID": "a b<script>"}).headers["x-request-id"].isalnum()


def test_alive_but_not_ready_until_the_engines_are_checked(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = threading.Event()

    def open_with(bundle: Any, _: Settings) -> list[FakeEngine]:
        assert checked.wait(10)
        return [FakeEngine(10) for _ in bundle.manifest.members]

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
    assert body["protocols"] == {"center": 1, "flip": 2, "10crop": 10}
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
