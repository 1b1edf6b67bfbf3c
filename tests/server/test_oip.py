"""The Open Inference Protocol over HTTP, on fake engines: black is airplane (0), white is truck (9)."""

import base64
import gzip
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import oip
from resnet_ensemble.server.errors import KINDS
from resnet_ensemble.server.tensors import HEADER_LENGTH, pack
from tests.server.test_predictions import Fails
from tests.server.test_refusals import Gate

Png = Callable[..., bytes]
Serve = Callable[..., Any]
ENSEMBLE, MEMBER = "cifar10", "cifar10-resnet20"
URL = f"/v2/models/{ENSEMBLE}/infer"


def pictures(*contents: bytes, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A body with encoded pictures behind the JSON, and its headers."""
    packed = pack(contents)
    image = {"name": "image", "datatype": "BYTES", "shape": [len(contents)]}
    return behind(image | {"parameters": {"binary_data_size": len(packed)}}, packed, **fields)


def pixels(array: Any, name: str = "pixels", **fields: Any) -> tuple[bytes, dict[str, str]]:
    """The same with an array of bytes."""
    content = np.asarray(array, np.uint8)
    tensor = {"name": name, "datatype": "UINT8", "shape": content.shape}
    return behind(tensor | {"parameters": {"binary_data_size": content.size}}, content.tobytes(), **fields)


def behind(tensor: dict[str, Any], content: bytes, **fields: Any) -> tuple[bytes, dict[str, str]]:
    text = json.dumps({"inputs": [tensor], **fields}).encode()
    return text + content, {HEADER_LENGTH: str(len(text))}


def send(client: TestClient, request: tuple[bytes, dict[str, str]], url: str = URL, **headers: str) -> Any:
    content, needed = request
    return client.post(url, content=content, headers=needed | headers)


def outputs(response: Any) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def assert_error(response: Any, code: str) -> str:
    """The protocol's shape, and the status that the table has for the code."""
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].startswith(f"{code}: ")
    assert response.status_code == KINDS[code].status
    assert response.headers["x-request-id"]
    return str(body["error"])


def test_the_server_and_its_models_describe_themselves(client: TestClient) -> None:
    server = client.get("/v2").json()
    ensemble, member = (client.get(f"/v2/models/{name}").json() for name in (ENSEMBLE, MEMBER))
    version = ensemble["versions"][0]

    assert server["name"] == "resnet-ensemble"
    assert "binary_tensor_data" in server["extensions"]
    assert (client.get("/v2/health/live").json(), client.get("/v2/health/ready").json()) == (
        {"live": True},
        {"ready": True},
    )
    assert [tensor["name"] for tensor in ensemble["inputs"]] == ["image", "pixels"]
    assert member["inputs"] == [{"name": "views", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert member["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]
    assert member["platform"] == "fake"
    for name in (ENSEMBLE, MEMBER):
        assert client.get(f"/v2/models/{name}/versions/{version}").json()["name"] == name
        assert client.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
        assert client.get(f"/v2/models/{name}/versions/{version}/ready").status_code == 200
        config = client.get(f"/v2/models/{name}/config").json()
        assert config["max_batch_size"] == 64
        assert config == client.get(f"/v2/models/{name}/versions/{version}/config").json()
    index = client.post("/v2/repository/index").json()
    assert [(model["name"], model["state"]) for model in index] == [
        ("cifar10", "READY"),
        ("cifar10-resnet20", "READY"),
        ("cifar10-resnet32", "READY"),
    ]


@pytest.mark.parametrize("path", ["models/none", f"models/{ENSEMBLE}/versions/none", "none", f"models/{MEMBER}/stats"])
def test_what_is_not_there_is_not_found(client: TestClient, path: str) -> None:
    assert_error(client.get(f"/v2/{path}"), "not_found")
    assert_error(client.post(f"/v2/{path}/infer", content=b"{}"), "not_found")


def test_another_method_is_told_which_are_allowed(client: TestClient) -> None:
    response = client.get(URL)

    assert_error(response, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_pictures_are_answered_as_predict_does(client: TestClient, png: Png) -> None:
    contents = [png(0), png(90, (50, 40), "JPEG"), png(255)]
    found = outputs(send(client, pictures(*contents)))

    expected = [client.post("/predict", params={"top_k": 10}, content=content).json() for content in contents]
    assert found["label"] == [answer["label"] for answer in expected]
    assert found["index"] == [answer["index"] for answer in expected]
    assert found["views_used"] == [answer["views_used"] for answer in expected]
    assert found["certain"] == [answer["certain"] for answer in expected]
    for name in ("entropy", "mutual_information"):
        np.testing.assert_allclose(found[name], [answer[name] for answer in expected], atol=1e-6)
    for row, answer in zip(np.reshape(found["probabilities"], (3, 10)), expected, strict=True):
        np.testing.assert_allclose(
            [row[entry["index"]] for entry in answer["top"]],
            [entry["probability"] for entry in answer["top"]],
            rtol=1e-6,
        )


def test_pixels_and_base64_are_answered_as_pictures_are(client: TestClient, png: Png) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [base64.b64encode(png(90)).decode()]}

    encoded = outputs(send(client, pictures(png(90))))
    assert outputs(send(client, pixels(np.full((1, 32, 32, 3), 90)))) == encoded
    assert outputs(client.post(URL, json={"inputs": [image]})) == encoded


def test_protocol_and_stop_rule_are_parameters(client: TestClient, png: Png) -> None:
    one = outputs(send(client, pictures(png(), parameters={"protocol": "center"})))
    early = outputs(send(client, pictures(png(), parameters={"stop": "exact"})))

    assert one["views_used"] == [2]
    assert early["views_used"][0] < 20
    assert early["certain"] == [True]


def test_a_member_answers_ready_made_views(client: TestClient, pair: Bundle) -> None:
    views = np.stack([np.full((32, 32, 3), brightness) for brightness in (0, 90, 255)])

    for url in (f"/v2/models/{MEMBER}/infer", f"/v2/models/{MEMBER}/versions/{pair.manifest.version}/infer"):
        found = outputs(send(client, pixels(views, "views"), url))["probabilities"]
        np.testing.assert_allclose(np.reshape(found, (3, 10)), FakeEngine(10).run(views.astype(np.uint8)), rtol=1e-6)


def test_views_of_one_request_share_batches(serve: Serve) -> None:
    engines: list[FakeEngine] = []

    def engine(classes: int) -> FakeEngine:
        engines.append(FakeEngine(classes))
        return engines[-1]

    with serve(engine, streams=1, max_batch=8) as client:
        before = len(engines[0].batches)
        send(client, pixels(np.zeros((16, 32, 32, 3)), "views"), f"/v2/models/{MEMBER}/infer")

    assert len(engines[0].batches) - before < 16
    assert sum(engines[0].batches[before:]) == 16


def test_binary_answers_say_where_their_json_ends(client: TestClient, png: Png) -> None:
    response = send(client, pictures(png(255), parameters={"binary_data_output": True}, outputs=[{"name": "index"}]))

    length = int(response.headers[HEADER_LENGTH])
    assert response.headers["content-type"] == "application/octet-stream"
    assert json.loads(response.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(response.content[length:], "<i8").tolist() == [9]


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(
    client: TestClient, png: Png, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    content, headers = pictures(*[png()] * 8)
    plain = send(client, (content, headers), **{"Accept-Encoding": "identity"})

    packed = send(client, (compress(content), headers), **{"Content-Encoding": encoding, "Accept-Encoding": encoding})

    unwanted = send(client, (content, headers), **{"Accept-Encoding": f"{encoding}; Q=0.00"})

    assert "content-encoding" not in plain.headers.keys() | unwanted.headers.keys()
    assert packed.headers["content-encoding"] == encoding
    assert outputs(packed) == outputs(plain)


@pytest.mark.parametrize(
    ("encoding", "content", "code"),
    [
        ("br", b"", "unsupported_media_type"),
        ("gzip", b"", "malformed_request"),
        ("gzip", b"{}", "malformed_request"),
        ("gzip", gzip.compress(b"{}" * 500)[:-1], "malformed_request"),
        ("gzip", gzip.compress(b"{}") + b"x", "malformed_request"),
        ("deflate", gzip.compress(b"{}"), "malformed_request"),
        ("gzip", gzip.compress(bytes(5 * 2**20)), "request_too_large"),
    ],
    # A compressed file has the time in it, and a test needs the same name in every process.
    ids=["unknown", "empty", "plain", "cut", "more", "another", "bomb"],
)
def test_what_can_t_be_decompressed_is_refused(serve: Serve, encoding: str, content: bytes, code: str) -> None:
    with serve(max_request_bytes=4 * 2**20, max_image_bytes=2**20) as client:
        assert_error(client.post(URL, content=content, headers={"Content-Encoding": encoding}), code)


def test_bodies_are_decompressed_in_steps(client: TestClient, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zlib does not take it copies: 95 MiB in one piece took 25 times as long, with the interpreter lock held."""
    given: list[int] = []

    class Counts:
        """A decompressor that tells how much it is given at a time."""

        def __init__(self, bits: int) -> None:
            self._decompressor = real(bits)

        def decompress(self, content: bytes, most: int) -> bytes:
            given.append(len(content))
            return self._decompressor.decompress(content, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._decompressor, name)

    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Counts)
    monkeypatch.setattr(oip, "_STEP", 64)
    content, headers = pictures(*[png(grey) for grey in range(8)])
    packed = gzip.compress(content)

    headers |= {"Accept-Encoding": "identity"}  # the client would count, too

    answer = send(client, (packed, headers), **{"Content-Encoding": "gzip"})

    assert outputs(answer) == outputs(send(client, (content, headers)))
    assert max(given) == 64
    assert len(given) > len(packed) / 64
    more = send(client, (packed + b"x" * 1000, headers), **{"Content-Encoding": "gzip"})
    assert "1000 bytes follow the body's gzip data" in assert_error(more, "malformed_request")


def test_a_decompressed_body_needs_room_among_the_others(serve: Serve, png: Png) -> None:
    limits = {"max_image_bytes": 1000, "max_request_bytes": 2**20, "max_pending_bytes": 2**20}
    with serve(**limits) as client:
        response = client.post(URL, content=gzip.compress(bytes(2**20)), headers={"Content-Encoding": "gzip"})

        assert_error(response, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert send(client, pictures(png())).status_code == 200


@pytest.mark.parametrize(
    ("shape", "url"),
    [((1, 33, 32, 3), MEMBER), ((1, 30, 30, 3), MEMBER), ((1, 32, 70, 3), MEMBER), ((1, 1, 500, 3), ENSEMBLE)],
    ids=str,
)
def test_sizes_that_no_protocol_makes_are_refused(client: TestClient, shape: tuple[int, ...], url: str) -> None:
    code, name = ("invalid_tensor", "views") if url == MEMBER else ("extreme_aspect_ratio", "pixels")

    assert_error(send(client, pixels(np.zeros(shape), name), f"/v2/models/{url}/infer"), code)


def test_the_limits_of_predict_hold(serve: Serve, png: Png) -> None:
    with serve(max_images_per_request=2, max_image_bytes=500, max_image_pixels=5000) as client:
        member = f"/v2/models/{MEMBER}/infer"
        assert_error(send(client, pictures(*[png()] * 3)), "too_many_images")
        assert_error(send(client, pixels(np.zeros((3, 32, 32, 3)), "views"), member), "too_many_images")
        assert "image 1" in assert_error(send(client, pictures(png(), png(0, (50, 50), "BMP"))), "image_too_large")
        assert_error(send(client, pixels(np.zeros((1, 80, 80, 3)))), "too_many_pixels")
        assert "image 1" in assert_error(send(client, pictures(png(), b"junk")), "unsupported_image_format")


def test_a_client_above_its_quota_is_refused(serve: Serve) -> None:
    gate = Gate()
    url = f"/v2/models/{MEMBER}/infer"
    with serve(gate, max_images_per_client=2, max_images_per_request=2) as client, ThreadPoolExecutor() as pool:
        request = pixels(np.zeros((2, 32, 32, 3)), "views")
        first = gate.hold(lambda: pool.submit(send, client, request, url))
        refused = send(client, request, url)
        gate.open.set()

        assert_error(refused, "quota_exceeded")
        assert first.result().status_code == 200


@pytest.mark.parametrize("url", [URL, f"/v2/models/{MEMBER}/infer"])
def test_an_overloaded_server_says_when_to_come_back(serve: Serve, png: Png, url: str) -> None:
    gate = Gate(seconds_per_view=0.005)
    request = pictures(png()) if url == URL else pixels(np.zeros((1, 32, 32, 3)), "views")
    with serve(gate, streams=1, max_wait_seconds=0.02) as client, ThreadPoolExecutor() as pool:
        first = gate.hold(lambda: pool.submit(client.post, "/predict", files=[("image", png())] * 5))
        response = send(client, request, url)
        gate.open.set()

        assert_error(response, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert first.result().status_code == 200
        assert send(client, request, url).status_code == 200


@pytest.mark.parametrize("url", [URL, f"/v2/models/{MEMBER}/infer"])
@pytest.mark.parametrize("by", ["header", "parameter"])
def test_what_is_not_done_in_its_time_is_told_and_dropped(serve: Serve, png: Png, url: str, by: str) -> None:
    gate = Gate()
    fields = {"parameters": {"timeout": 100_000}} if by == "parameter" else {}
    headers = {"X-Request-Timeout": "0.1"} if by == "header" else {}
    request = pictures(png(), **fields) if url == URL else pixels(np.zeros((3, 32, 32, 3)), "views", **fields)
    with serve(gate, streams=1) as client, ThreadPoolExecutor() as pool:
        first = gate.hold(lambda: pool.submit(client.post, "/predict", params={"protocol": "center"}, content=png()))
        response = send(client, request, url, **headers)
        unfinished = client.get("/metrics").text.split("\nresnet_unfinished_views ")[1].split("\n")[0]
        gate.open.set()

        assert_error(response, "deadline_exceeded")
        assert float(unfinished) == 2  # of the first request
        assert first.result().status_code == 200


def test_a_view_on_which_the_engine_fails_is_an_error_of_its_request_only(serve: Serve) -> None:
    url = f"/v2/models/{MEMBER}/infer"
    with serve(Fails) as client:
        assert_error(send(client, pixels(np.full((2, 32, 32, 3), 255), "views"), url), "engine_failure")
        assert send(client, pixels(np.zeros((2, 32, 32, 3)), "views"), url).status_code == 200
        assert "\nresnet_unfinished_views 0.0\n" in client.get("/metrics").text


def test_a_failure_of_ours_is_told_without_internals_and_counted(
    serve: Serve, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with serve() as client:
        monkeypatch.setattr("resnet_ensemble.server.tensors.encode", fail)
        assert "secret" not in assert_error(send(client, pictures(png())), "internal_error")
        route = "/v2/models/{name}/infer"
        assert f'resnet_requests_total{{method="POST",route="{route}",status="500"}} 1.0' in client.get("/metrics").text


def test_a_member_has_no_protocol(client: TestClient) -> None:
    request = pixels(np.zeros((1, 32, 32, 3)), "views", parameters={"stop": "exact"})

    assert_error(send(client, request, f"/v2/models/{MEMBER}/infer"), "invalid_option")


def test_image_and_pixels_are_alternatives(client: TestClient) -> None:
    black = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0]}
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [""]}

    assert_error(client.post(URL, json={"inputs": [black, image]}), "invalid_tensor")
    assert_error(client.post(URL, json={"inputs": [image]}), "empty_image")


def test_a_model_is_ready_while_its_own_engine_is(serve: Serve) -> None:
    engines: list[FakeEngine] = []

    def engine(classes: int) -> FakeEngine:
        if len(engines) == 2:
            raise RuntimeError("the device is gone")
        engines.append(FakeEngine(classes))
        return engines[-1]

    views = pixels(np.zeros((1, 32, 32, 3)), "views")
    with serve(engine) as client:
        engines[0].kill()
        assert_error(send(client, views, f"/v2/models/{MEMBER}/infer"), "not_ready")

        for path in (f"models/{MEMBER}/ready", f"models/{ENSEMBLE}/ready", "health/ready"):
            assert "the device is gone" in assert_error(client.get(f"/v2/{path}"), "not_ready")
        assert_error(send(client, views, f"/v2/models/{MEMBER}/infer"), "not_ready")
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/models/cifar10-resnet32/ready").status_code == 200
        assert send(client, views, "/v2/models/cifar10-resnet32/infer").status_code == 200
        states = [model["state"] for model in client.post("/v2/repository/index").json()]
        assert states == ["UNAVAILABLE", "UNAVAILABLE", "READY"]
