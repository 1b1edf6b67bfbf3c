"""Every answer of the HTTP interface that is not a prediction."""

import gzip
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.errors import KINDS

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
    [{"top_k": "0"}, {"top_k": "1001"}, {"top_k": "many"}, {"protocol": "11crop"}, {"topk": "3"}, {"stop": "early"}]
    + [{"abstain_below": value} for value in ("1.1", "-0.1", "nan", "half")],
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


def test_an_option_given_twice_in_the_query_is_refused(client: TestClient, png: Png) -> None:
    response = client.post("/predict?top_k=1&top_k=2", content=png(), headers=RAW)

    assert "twice" in assert_problem(response, "invalid_option")["detail"]


def test_an_image_needs_no_file_name(client: TestClient, png: Png) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/png\r\n\r\n'
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}

    response = client.post("/predict", content=head + png(255) + b"\r\n--x--\r\n", headers=boundary)

    assert response.json()["label"] == "truck"


@pytest.mark.parametrize("images", [1, 3])
def test_a_form_that_is_cut_off_is_refused_whole(client: TestClient, png: Png, images: int) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png() + b"\r\n"
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}

    for content in (part * images, (part * images)[:-20]):
        problem = assert_problem(client.post("/predict", content=content, headers=boundary), "malformed_request")
        assert "cut off" in problem["detail"]


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_charset_that_nothing_is_written_in_makes_no_difference(client: TestClient, charset: str) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n\xff1\r\n--x--\r\n'
    header = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}

    assert_problem(client.post("/predict", content=content, headers=header), "missing_image")


def test_a_part_whose_only_name_is_no_ascii_is_a_file(client: TestClient, png: Png) -> None:
    """Older clients write it as RFC 5987 has it, which RFC 7578 forbids."""
    part = b"--x\r\nContent-Disposition: form-data; name=image; filename*=UTF-8''gr%C3%B6%C3%9Fe.png\r\n\r\n" + png()
    response = client.post(
        "/predict", content=part + b"\r\n--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    assert response.status_code == 200, response.text


def test_a_file_name_is_answered_as_it_was_sent_and_odd_bytes_in_it_are_no_reason_to_refuse(
    client: TestClient, png: Png
) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n' + png() + b"\r\n"
    content = b"".join(head.replace(b"%s", name) for name in ("größe.png".encode(), b"\xff.png", b"")) + b"--x--\r\n"

    response = client.post("/predict", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})

    assert [result["filename"] for result in response.json()["results"]] == ["größe.png", "\ufffd.png", None]


def test_an_option_of_a_form_may_be_short_only(client: TestClient, png: Png) -> None:
    response = client.post("/predict", files={"image": png()}, data={"protocol": "1" * 70_000})

    assert "70000 bytes" in assert_problem(response, "invalid_option")["detail"]


def test_a_compressed_image_is_told_to_come_as_it_is(client: TestClient, png: Png) -> None:
    response = client.post("/predict", content=gzip.compress(png()), headers=RAW | {"Content-Encoding": "gzip"})

    assert "'gzip'" in assert_problem(response, "unsupported_media_type")["detail"]


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
        rejected = client.get("/metrics").text
        gate.open.set()

        assert_problem(response, "overloaded")
        assert 'resnet_rejected_total{reason="wait"} 1.0' in rejected
        assert int(response.headers["retry-after"]) >= 1
        assert first.result().status_code == 200
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200


def test_a_request_that_takes_longer_than_it_may_is_told_and_its_views_are_dropped(serve: Serve, png: Png) -> None:
    gate = Gate()
    with serve(gate, streams=1) as client, ThreadPoolExecutor() as pool:
        first = gate.hold(lambda: pool.submit(client.post, "/predict", files={"image": png()}))
        late = client.post("/predict", files=[("image", png())] * 2, headers={"X-Request-Timeout": "0.1"})
        single = client.post("/predict", content=png(), headers=RAW | {"X-Request-Timeout": "0.1"})
        views = client.get("/metrics").text.split("\nresnet_unfinished_views ")[1].split("\n")[0]
        gate.open.set()

        assert_problem(single, "deadline_exceeded")
        assert [r["problem"]["code"] for r in late.json()["results"]] == ["deadline_exceeded"] * 2
        assert float(views) <= 20  # only the first request's
        assert first.result().status_code == 200


def test_the_time_of_requests_that_do_not_say_it_is_a_setting(serve: Serve, png: Png) -> None:
    gate = Gate()
    with serve(gate, streams=1, timeout_seconds=0.1) as client:
        gate.open.clear()
        assert_problem(client.post("/predict", content=png(), headers=RAW), "deadline_exceeded")
        gate.open.set()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "3601"])
def test_a_time_that_is_none_is_refused(client: TestClient, png: Png, value: str) -> None:
    response = client.post("/predict", content=png(), headers=RAW | {"X-Request-Timeout": value})

    assert "X-Request-Timeout" in assert_problem(response, "invalid_option")["detail"]


def test_bodies_that_do_not_fit_into_memory_together_are_refused_unread(serve: Serve, png: Png) -> None:
    gate = Gate()
    limits = {"max_image_bytes": 1000, "max_request_bytes": 1000, "max_pending_bytes": 1000}
    with serve(gate, **limits) as client, ThreadPoolExecutor() as pool:
        content = png().ljust(600, b"\0")
        first = gate.hold(lambda: pool.submit(client.post, "/predict", content=content, headers=RAW))
        response = client.post("/predict", content=content, headers=RAW)
        unannounced = client.post("/predict", content=iter([content]), headers=RAW)
        gate.open.set()

        for refused in (response, unannounced):
            assert "600 more would come" in assert_problem(refused, "overloaded")["detail"]
            assert refused.headers["retry-after"] == "1"
        assert first.result().status_code == 200
        assert client.post("/predict", content=content, headers=RAW).status_code == 200


def test_small_bodies_that_announce_no_length_are_answered_together(serve: Serve, png: Png) -> None:
    gate = Gate()
    limits = {"max_image_bytes": 1000, "max_request_bytes": 1000, "max_pending_bytes": 1000}
    with serve(gate, **limits) as client, ThreadPoolExecutor() as pool:
        send = lambda: client.post("/predict", content=iter([png()]), headers=RAW)  # noqa: E731
        first = gate.hold(lambda: pool.submit(send))
        second = pool.submit(send)
        gate.open.set()

        assert [first.result().status_code, second.result().status_code] == [200, 200]


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
