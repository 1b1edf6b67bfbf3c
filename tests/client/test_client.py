"""The SDK against the real application on fake engines, and against scripted answers."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import resnet_ensemble.client as sdk
from resnet_ensemble.client import Client, _client

Png = Callable[..., bytes]


@pytest.fixture
def connected(client: TestClient) -> Iterator[Client]:
    with Client("http://testserver", http_client=client) as connected:
        yield connected


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing sleeps; the waits are kept."""
    kept: list[float] = []
    monkeypatch.setattr(_client.time, "sleep", kept.append)
    return kept


def scripted(*answers: httpx2.Response | Exception, **options: Any) -> tuple[Client, list[httpx2.Request]]:
    """A client whose server gives these answers in turn."""
    requests: list[httpx2.Request] = []
    script = iter(answers)

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        following = next(script)
        if isinstance(following, Exception):
            raise following
        return following

    return Client("http://x", http_client=httpx2.Client(transport=httpx2.MockTransport(answer)), **options), requests


def problem(status: int, code: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"code": code, "detail": "why"}, headers={"X-Request-ID": "r1", **headers})


PREDICTION = {
    "label": "cat",
    "index": 3,
    "probability": 0.9,
    "top": [{"label": "cat", "index": 3, "probability": 0.9}],
    "members": [{"member": "resnet20", "label": "cat", "index": 3, "probability": 0.8}],
    "protocol": "10crop",
    "views_used": 20,
    "views_planned": 20,
    "bundle": "cifar10-1-0",
    "timings_ms": {"total": 1.0},
    "a field of a newer server": None,
}


def ok() -> httpx2.Response:
    return httpx2.Response(200, json=PREDICTION, headers={"X-Request-ID": "r0"})


# Classifying


def test_a_prediction_is_typed_and_frozen(connected: Client, png: Png) -> None:
    prediction = connected.classify(png(255), top_k=3, protocol="flip")

    assert (prediction.label, prediction.index, prediction.protocol) == ("truck", 9, "flip")
    assert len(prediction.top) == 3
    assert prediction.top[0].probability == prediction.probability
    assert {vote.label for vote in prediction.members} == {"truck"}
    assert prediction.views_used == prediction.views_planned == 2 * len(prediction.members)
    assert prediction.timings_ms["total"] > 0
    assert prediction.request_id
    with pytest.raises(AttributeError):
        prediction.label = "cat"  # type: ignore[misc]


def images(tmp_path: Path, content: bytes) -> dict[str, Any]:
    (tmp_path / "cat.png").write_bytes(content)
    return {
        "path": tmp_path / "cat.png",
        "string": str(tmp_path / "cat.png"),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "file": (tmp_path / "cat.png").open("rb"),
        "BytesIO": io.BytesIO(content),
        "PIL": Image.open(io.BytesIO(content)),
        "PIL CMYK": Image.open(io.BytesIO(content)).convert("CMYK"),
    }


@pytest.mark.parametrize(
    "kind", ["path", "string", "bytes", "bytearray", "memoryview", "file", "BytesIO", "PIL", "PIL CMYK"]
)
def test_every_kind_of_image_is_sent(connected: Client, png: Png, tmp_path: Path, kind: str) -> None:
    given = images(tmp_path, png(255))
    try:
        assert connected.classify(given[kind]).label == "truck"
    finally:
        given["file"].close()


@pytest.mark.parametrize("image", [None, 3, io.StringIO("text"), np.zeros((2, 2, 3), np.uint8), ["a"]])
def test_what_is_no_image_is_refused_before_anything_is_sent(image: Any) -> None:
    client, requests = scripted()

    with pytest.raises(TypeError, match="an image must be a path, bytes"):
        client.classify(image)
    assert requests == []


def test_a_path_that_does_not_exist_is_an_os_error(connected: Client) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.jpg"):
        connected.classify("no.jpg")


def test_info_tells_what_is_served(connected: Client) -> None:
    info = connected.info()

    assert info.labels[0] == "airplane"
    assert info.protocols["10crop"] == 10
    assert info.members[:2] == ("resnet20", "resnet32")
    assert connected.ready()


# Errors


@pytest.mark.parametrize(
    ("content", "error", "code"),
    [
        (b"", sdk.BadRequestError, "empty_image"),
        (b"no image", sdk.UnsupportedImageError, "unsupported_image_format"),
        (b"BM\0\0", sdk.ImageError, "corrupt_image"),
    ],
)
def test_a_bad_image_is_a_typed_error(
    connected: Client, content: bytes, error: type[sdk.StatusError], code: str
) -> None:
    with pytest.raises(error, match=code) as caught:
        connected.classify(content)

    assert caught.value.code == code
    assert caught.value.detail
    assert caught.value.request_id in str(caught.value)


def test_a_wrong_option_is_a_typed_error(connected: Client, png: Png) -> None:
    with pytest.raises(sdk.ImageError, match="invalid_option"):
        connected.classify(png(), protocol="11crop")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(404, "not_found"), sdk.BadRequestError),
        (problem(413, "too_many_pixels"), sdk.TooLargeError),
        (problem(429, "quota_exceeded"), sdk.QuotaExceededError),
        (problem(500, "engine_failure"), sdk.ServerError),
        (problem(503, "overloaded"), sdk.OverloadedError),
        (problem(503, "not_ready"), sdk.NotReadyError),
        (httpx2.Response(502, text="<html>bad gateway</html>"), sdk.ServerError),
        (httpx2.ConnectError("refused"), sdk.ConnectionFailedError),
        (httpx2.ReadTimeout("slow"), sdk.TimedOutError),
    ],
)
def test_every_failure_has_its_error(answer: Any, error: type[sdk.ResnetError], png: Png) -> None:
    client, _ = scripted(answer, max_retries=0)

    with pytest.raises(sdk.ResnetError) as caught:
        client.classify(png())

    assert type(caught.value) is error


@pytest.mark.parametrize("body", ["<html>", "[]", '{"label": "cat"}', "null"])
def test_another_kind_of_server_is_recognised(body: str, png: Png) -> None:
    client, _ = scripted(httpx2.Response(200, text=body))

    with pytest.raises(sdk.ResponseError, match="something else than a resnet-ensemble server"):
        client.classify(png())


def test_every_error_is_drawn_in_the_tree() -> None:
    from resnet_ensemble.client import _errors

    errors = {name for name, value in vars(_errors).items() if isinstance(value, type)}

    assert all(name in (_errors.__doc__ or "") for name in errors)
    assert errors <= set(sdk.__all__)


# Retries


@pytest.mark.parametrize(
    "failure",
    [
        problem(408, "slow_upload"),
        problem(429, "quota_exceeded"),
        problem(500, "internal_error"),
        problem(503, "overloaded"),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_twice_more(failure: Any, png: Png, waits: list[float]) -> None:
    client, requests = scripted(failure, failure, ok())

    assert client.classify(png()).request_id == "r0"
    assert len(requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_a_file_is_sent_whole_again(png: Png) -> None:
    client, requests = scripted(problem(503, "overloaded"), ok())

    client.classify(io.BytesIO(png(9)))

    assert [request.content for request in requests] == [png(9), png(9)]


def test_after_two_retries_the_last_error_is_raised(png: Png) -> None:
    client, requests = scripted(*[problem(503, "overloaded")] * 3)

    with pytest.raises(sdk.OverloadedError):
        client.classify(png())
    assert len(requests) == 3


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422])
def test_what_will_not_pass_is_not_tried_again(status: int, png: Png, waits: list[float]) -> None:
    client, requests = scripted(problem(status, "corrupt_image"))

    with pytest.raises(sdk.StatusError):
        client.classify(png())
    assert (len(requests), waits) == (1, [])


def test_the_servers_retry_after_is_honoured(png: Png, waits: list[float]) -> None:
    client, _ = scripted(problem(503, "overloaded", **{"Retry-After": "7"}), ok())

    client.classify(png())

    assert 7 <= waits[0] <= 7 * 1.25


def test_a_retry_after_that_is_too_long_is_given_up_at_once(png: Png, waits: list[float]) -> None:
    client, requests = scripted(problem(503, "overloaded", **{"Retry-After": "3600"}))

    with pytest.raises(sdk.OverloadedError) as caught:
        client.classify(png())
    assert caught.value.retry_after == 3600
    assert (len(requests), waits) == (1, [])


def test_ready_asks_once_and_never_raises() -> None:
    for answer, expected in [(problem(503, "not_ready"), False), (httpx2.ConnectError("refused"), False), (ok(), True)]:
        client, requests = scripted(answer)

        assert client.ready() is expected
        assert len(requests) == 1


# Transport


def test_timeouts_are_on_by_default() -> None:
    with Client() as client:
        timeout = client._http.timeout

    assert (timeout.connect, timeout.read) == (5.0, 60.0)


def test_a_timeout_of_ones_own_goes_with_every_request(png: Png) -> None:
    client, requests = scripted(ok(), timeout=1.5)

    client.classify(png())

    assert requests[0].extensions["timeout"]["read"] == 1.5


def test_a_client_of_ones_own_is_not_closed() -> None:
    own = httpx2.Client(transport=httpx2.MockTransport(lambda _: ok()))

    with Client("http://x", http_client=own):
        pass
    assert not own.is_closed

    with Client() as client:
        pass
    assert client._http.is_closed


def test_requests_say_who_sends_them(png: Png) -> None:
    client, requests = scripted(ok())

    client.classify(png())

    assert requests[0].headers["user-agent"].startswith("resnet-ensemble-python/")
    assert str(requests[0].url) == "http://x/predict?top_k=5"


def test_a_url_may_have_a_path_and_a_slash(png: Png) -> None:
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return ok()

    Client("http://x/models/", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))).classify(png())

    assert requests[0].url.path == "/models/predict"


def test_the_public_names_are_those_listed() -> None:
    public = {name for name in vars(sdk) if not name.startswith("_")}

    assert public == set(sdk.__all__)
    assert sdk.__all__ == sorted(sdk.__all__)
    assert "resnet_ensemble.client" in sys.modules
