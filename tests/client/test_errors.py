"""Every failure has its error, and what may pass is tried again."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

import resnet_ensemble.client as sdk
from tests.client.conftest import Either, Png, Scripted, ok, problem

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
    connected: Either, content: bytes, error: type[sdk.StatusError], code: str
) -> None:
    with pytest.raises(error, match=code) as caught:
        connected.classify(content)

    assert caught.value.code == code
    assert caught.value.detail
    assert caught.value.request_id in str(caught.value)


def test_a_wrong_option_is_a_typed_error(connected: Either, png: Png) -> None:
    with pytest.raises(sdk.ImageError, match="invalid_option"):
        connected.classify(png(), protocol="11crop")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(404, "not_found"), sdk.BadRequestError),
        (problem(401, "unauthorized"), sdk.AuthenticationError),
        (problem(403, "forbidden"), sdk.AuthenticationError),
        (problem(413, "too_many_pixels"), sdk.TooLargeError),
        (problem(429, "quota_exceeded"), sdk.QuotaExceededError),
        (problem(500, "engine_failure"), sdk.ServerError),
        (problem(503, "overloaded"), sdk.OverloadedError),
        (problem(503, "not_ready"), sdk.NotReadyError),
        (httpx2.Response(502, text="<html>bad gateway</html>"), sdk.ServerError),
        (httpx2.Response(502, content=b"no hex", headers={"content-type": "text/html; charset=hex"}), sdk.ServerError),
        (httpx2.Response(500, content=b"[" * 100_000), sdk.ServerError),
        (httpx2.Response(301, headers={"location": "https://x/"}), sdk.ResponseError),
        (httpx2.TooManyRedirects("in a circle"), sdk.ResponseError),
        (httpx2.ConnectError("refused"), sdk.ConnectionFailedError),
        (httpx2.ReadTimeout("slow"), sdk.TimedOutError),
    ],
)
def test_every_failure_has_its_error(scripted: Scripted, answer: Any, error: type[sdk.ResnetError], png: Png) -> None:
    client, _ = scripted(answer, max_retries=0)

    with pytest.raises(sdk.ResnetError) as caught:
        client.classify(png())

    assert type(caught.value) is error


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "[]",
        '{"label": "cat"}',
        "null",
        '{"label": "cat", "top": ["cat"]}',
        pytest.param("[" * 100_000, id="["),
    ],
)
def test_another_kind_of_server_is_recognised(scripted: Scripted, body: str, png: Png) -> None:
    client, _ = scripted(httpx2.Response(200, text=body))

    with pytest.raises(sdk.ResponseError, match="something else than a resnet-ensemble server"):
        client.classify(png())


def test_an_answer_in_another_encoding_than_it_says_is_a_typed_error(make: Callable[..., Either], png: Png) -> None:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(b"{}"))

    client = make(httpx2.MockTransport(answer), url="http://x")

    for error in client.classify_many([png(), png()]):
        assert isinstance(error, sdk.ResponseError)
        assert str(error).startswith("http://x/predict gave an answer that can't be read: ")
    assert client.ready() is False


def test_every_error_is_drawn_in_the_tree() -> None:
    from resnet_ensemble.client import _errors

    errors = {name for name, value in vars(_errors).items() if isinstance(value, type)}

    assert all(name in (_errors.__doc__ or "") for name in errors)
    assert errors <= set(sdk.__all__)


def test_answers_and_errors_cross_processes(scripted: Scripted, png: Png) -> None:
    client, _ = scripted(ok(), problem(422, "corrupt_image", **{"Retry-After": "3"}))

    for answer in client.classify_many([png(), png()], concurrency=1):
        copy = pickle.loads(pickle.dumps(answer))
        assert type(copy) is type(answer)
        assert vars(copy) == vars(answer)


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
def test_what_may_pass_is_tried_twice_more(scripted: Scripted, failure: Any, png: Png, waits: list[float]) -> None:
    client, requests = scripted(failure, failure, ok())

    assert client.classify(png()).request_id == "r0"
    assert len(requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_a_file_is_sent_whole_again(scripted: Scripted, png: Png, waits: list[float]) -> None:
    client, requests = scripted(problem(503, "overloaded"), ok())

    client.classify(io.BytesIO(png(9)))

    assert [request.content for request in requests] == [png(9), png(9)]


def test_after_two_retries_the_last_error_is_raised(scripted: Scripted, png: Png, waits: list[float]) -> None:
    client, requests = scripted(*[problem(503, "overloaded")] * 3)

    with pytest.raises(sdk.OverloadedError):
        client.classify(png())
    assert len(requests) == 3


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 501])
def test_what_will_not_pass_is_not_tried_again(scripted: Scripted, status: int, png: Png, waits: list[float]) -> None:
    client, requests = scripted(problem(status, "corrupt_image"))

    with pytest.raises(sdk.StatusError):
        client.classify(png())
    assert (len(requests), waits) == (1, [])


def test_the_servers_retry_after_is_honoured(scripted: Scripted, png: Png, waits: list[float]) -> None:
    client, _ = scripted(problem(503, "overloaded", **{"Retry-After": "7"}), ok())

    client.classify(png())

    assert 7 <= waits[0] <= 7 * 1.25


def test_a_retry_that_would_come_too_late_is_given_up_at_once(scripted: Scripted, png: Png, waits: list[float]) -> None:
    answer = problem(503, "overloaded", **{"Retry-After": "40"})
    default, _ = scripted(answer, ok())
    hasty, requests = scripted(answer, retry_seconds=10)

    default.classify(png())
    with pytest.raises(sdk.OverloadedError) as caught:
        hasty.classify(png())

    assert caught.value.retry_after == 40
    assert (len(requests), len(waits)) == (1, 1)


def test_ready_asks_once_and_never_raises(scripted: Scripted) -> None:
    for answer, expected in [(problem(503, "not_ready"), False), (httpx2.ConnectError("refused"), False), (ok(), True)]:
        client, requests = scripted(answer)

        assert client.ready() is expected
        assert len(requests) == 1
