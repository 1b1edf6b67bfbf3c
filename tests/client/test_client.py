"""Both clients against the real application on fake engines, in process and over sockets, and scripted answers."""

import asyncio
import dataclasses
import inspect
import io
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

import resnet_ensemble.client as sdk
from resnet_ensemble.client import AsyncClient, Client, Prediction
from tests.client.conftest import Either, Png, Scripted, ok, problem

# Classifying


def test_a_prediction_is_typed_and_frozen(connected: Either, png: Png) -> None:
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


@pytest.mark.parametrize("concurrency", [0, -1])
def test_no_concurrency_is_refused(scripted: Scripted, png: Png, concurrency: int) -> None:
    client, _ = scripted()

    with pytest.raises(ValueError, match=f"the concurrency is {concurrency}; it must be at least 1"):
        list(client.classify_many([png(0)], concurrency=concurrency))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://\ud800.org"])
def test_what_is_no_url_is_told_at_once(scripted: Scripted, png: Png, url: str) -> None:
    client, requests = scripted(url=url)

    with pytest.raises(sdk.ResnetError, match="is no URL of a server") as failure:
        client.classify(png(0))
    assert (type(failure.value), requests) == (sdk.ResnetError, [])


@pytest.mark.parametrize("key", ["secret\n", "secr\xe9t"])
def test_a_key_that_can_not_be_sent_is_told_but_not_shown(scripted: Scripted, png: Png, key: str) -> None:
    client, _ = scripted(api_key=key)

    with pytest.raises(sdk.ResnetError, match="characters that no header can have") as failure:
        client.classify(png(0))
    assert "secr" not in str(failure.value)


def test_only_the_options_that_are_given_are_sent(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(ok(), ok())

    client.classify(png())
    client.classify(png(), top_k=1, protocol="center", stop="exact")

    assert [str(request.url) for request in requests] == [
        "http://x/predict?top_k=5",
        "http://x/predict?top_k=1&protocol=center&stop=exact",
    ]


def test_the_server_is_told_how_long_somebody_waits(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(*[ok()] * 6)

    client.classify(png())
    for timeout in (0.25, 7200, httpx2.Timeout(3, read=9), httpx2.Timeout(None)):
        client.with_options(timeout=timeout).classify(png())
    list(client.with_options(timeout=2).classify_many([png()]))

    told = [request.headers.get("x-request-timeout") for request in requests]
    assert told == ["5", "0.25", "3600", "9", None, "2"]  # 5 is httpx2's own


def test_an_answer_abstains_when_asked_to(connected: Either, png: Png) -> None:
    assert connected.classify(png()).abstained is False
    assert connected.classify(png(), abstain_below=1.0).abstained is True
    assert [answer.abstained for answer in connected.classify_many([png()], abstain_below=1.0)] == [True]  # type: ignore[union-attr]


def test_everything_that_the_server_answers_has_its_field() -> None:
    from resnet_ensemble.server import schemas

    assert set(schemas.Prediction.model_fields) <= {field.name for field in dataclasses.fields(Prediction)}
    assert set(schemas.MemberVote.model_fields) == {field.name for field in dataclasses.fields(sdk.MemberVote)}
    elsewhere = {"measured", "streams"}  # of the host and of the bundle's making: not for clients
    assert set(schemas.Info.model_fields) - elsewhere <= {field.name for field in dataclasses.fields(sdk.Info)}
    assert set(schemas.CalibrationDescription.model_fields) == {f.name for f in dataclasses.fields(sdk.Guarantee)}
    options = set(inspect.signature(Client.classify).parameters) - {"self", "image"}
    assert set(schemas.Options.model_fields) == options
    assert set(inspect.signature(AsyncClient.classify).parameters) - {"self", "image"} == options


def test_what_a_newer_server_tells_is_typed_and_what_an_older_one_lacks_is_none(scripted: Scripted, png: Png) -> None:
    told = {
        "entropy": 0.5,
        "mutual_information": 0.1,
        "certain": True,
        "certain_top5": False,
        "stop_rule": "calibrated",
    }
    told |= {"abstained": False, "confidence": 0.8}
    client, _ = scripted(ok(), ok(**told))

    old, new = client.classify(png()), client.classify(png(), stop="calibrated")

    assert {name: getattr(old, name) for name in told} == dict.fromkeys(told)
    assert {name: getattr(new, name) for name in told} == told


def test_a_guarantee_of_a_server_that_knows_no_drafts_has_none() -> None:
    told = {"disagreement": 0.01, "confidence": 0.95, "images": 300, "disagreements": 0, "views": 2.0, "cost": 0.4}

    assert sdk.Guarantee.parse(told).draft is None
    assert sdk.Guarantee.parse(told | {"draft": 64}).draft == 64


def test_info_tells_what_is_served(connected: Either) -> None:
    info = connected.info()

    assert info.labels[0] == "airplane"
    assert info.protocols["10crop"] == 10
    assert info.members[:2] == ("resnet20", "resnet32")
    assert info.stop in info.stop_rules
    assert info.costs.keys() == set(info.members)
    assert all(seconds > 0 for seconds in info.costs.values())
    assert info.limits["max_image_bytes"] == 20 * 2**20
    assert connected.ready()


# Many


def test_many_answers_come_in_order_with_errors_as_values(connected: Either, png: Png) -> None:
    pictures = [png(255), b"no image", png(0), "no.jpg"] * 5

    answers = list(connected.classify_many(pictures, top_k=1, protocol="center", concurrency=3))

    assert [type(answer) for answer in answers[:4]] == [
        Prediction,
        sdk.UnsupportedImageError,
        Prediction,
        FileNotFoundError,
    ]
    labels = [answer.label for answer in answers if isinstance(answer, Prediction)]
    assert labels == ["truck", "airplane"] * 5


def test_whatever_is_wrong_with_an_image_is_the_value_of_that_image_alone(
    connected: Either, png: Png, tmp_path: Path
) -> None:
    closed = (tmp_path / "a.png").open("wb+")
    closed.close()
    damaged = io.BytesIO(b"BM" + bytes(8) + b"\x1a\0\0\0" + b"\x0c\0\0\0\x10\0\x10\0\1\0\x18\0")
    pictures = [png(255), "a\0b.png", closed, Image.open(damaged), png(0)]

    answers = list(connected.classify_many(pictures, protocol="center"))

    assert [isinstance(answer, OSError) for answer in answers] == [False, True, True, True, False]
    assert isinstance(answers[-1], Prediction)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": None},
        {"label": 3},
        {"index": "3"},
        {"index": 2**40},
        {"probability": "0.9"},
        {"views_used": "many"},
        {"timings_ms": {"total": None}},
        {"top": [{"label": "cat", "index": 3, "probability": None}]},
    ],
    ids=str,
)
def test_an_answer_of_other_types_is_none_of_our_server(scripted: Scripted, png: Png, wrong: dict[str, Any]) -> None:
    client, _ = scripted(ok(**wrong))

    with pytest.raises(sdk.ResponseError, match="something else than a resnet-ensemble server"):
        client.classify(png())


def test_an_answer_that_does_not_end_is_waited_for_twice_as_long_as_a_part_of_it(
    make: Callable[..., Either], png: Png
) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        with suppress(OSError):  # the client has left
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(200):
                    connection.sendall(b" ")
                    time.sleep(0.05)

    thread = threading.Thread(target=trickle)
    thread.start()
    client = make(None, url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3, max_retries=0)
    began = time.monotonic()
    with pytest.raises(sdk.TimedOutError):
        client.classify(png())
    assert time.monotonic() - began < 5
    listening.close()
    thread.join()


@pytest.mark.parametrize("wrong", [{"max_retries": -1}, {"retry_seconds": -1.0}])
def test_fewer_retries_than_none_are_refused(wrong: dict[str, Any]) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="must be 0 or more"):
            kind(**wrong)


def test_many_reads_its_images_little_by_little(make: Callable[..., Either], png: Png) -> None:
    taken: list[int] = []
    in_flight, most = 0, 0
    lock = threading.Lock()

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield png()

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        response = ok()
        with lock:
            in_flight -= 1
        return response

    answers = make(httpx2.MockTransport(answer)).classify_many(endless(), concurrency=2)
    assert taken == []

    for _ in range(10):
        next(answers)

    assert len(taken) <= 10 + 2 * 2
    assert most <= 2


def test_what_is_no_image_among_many_is_the_callers_mistake(scripted: Scripted, png: Png) -> None:
    client, _ = scripted(ok(), ok())

    with pytest.raises(TypeError, match="an image must be"):
        list(client.classify_many([png(), 3]))  # type: ignore[list-item]


def test_asynchronous_images_are_taken_too(png: Png) -> None:
    async def pictures() -> Any:
        for brightness in range(3):
            yield png(brightness)

    async def answers() -> list[Any]:
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: ok()))
        return [answer async for answer in AsyncClient("http://x", http_client=http).classify_many(pictures())]

    assert [answer.label for answer in asyncio.run(answers())] == ["cat"] * 3


def test_leaving_many_early_cancels_what_is_under_way(png: Png) -> None:
    cancelled = []

    async def never(_: httpx2.Request) -> httpx2.Response:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise
        return ok()

    async def leave() -> None:
        client = AsyncClient("http://x", http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(never)))
        answers = client.classify_many([png()] * 10, concurrency=2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(answers)
        await answers.aclose()  # type: ignore[attr-defined]
        assert len(cancelled) >= 2
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())


def test_leaving_many_early_does_not_wait_for_another_attempt(png: Png) -> None:
    answers, refused = itertools.count(), threading.Event()

    def answer(_: httpx2.Request) -> httpx2.Response:
        if next(answers) == 0:
            return ok()
        refused.set()
        return problem(503, "overloaded", **{"Retry-After": "30"})

    with Client("http://x", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))) as client:
        many = client.classify_many([png()] * 10, concurrency=2)
        assert isinstance(next(many), Prediction)
        assert refused.wait(20)
        began = time.monotonic()
        many.close()  # type: ignore[attr-defined]

    assert time.monotonic() - began < 15
    assert next(answers) <= 10  # none a second time


# Options and transport


def test_timeouts_are_on_by_default() -> None:
    async def asynchronous() -> httpx2.Timeout:
        async with AsyncClient() as client:
            return client._connections.here().timeout

    with Client() as client:
        timeout = client._connections.here().timeout

    assert (timeout.connect, timeout.read) == (5.0, 60.0)
    assert asyncio.run(asynchronous()) == timeout


def test_a_timeout_of_ones_own_goes_with_every_request(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(ok(), timeout=1.5)

    client.classify(png())

    assert requests[0].extensions["timeout"]["read"] == 1.5


def test_with_options_shares_connections_and_changes_only_what_is_given(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(problem(500, "internal_error"), ok(), ok(), api_key="k1")

    with pytest.raises(sdk.ServerError):
        client.with_options(max_retries=0, timeout=2).classify(png())
    client.with_options(api_key="k2").classify(png())
    client.classify(png())

    assert [request.extensions["timeout"]["read"] for request in requests] == [2, 5, 5]  # 5 is httpx2's own
    assert [request.headers["authorization"] for request in requests] == ["Bearer k1", "Bearer k2", "Bearer k1"]


def test_the_environment_gives_url_and_key(scripted: Scripted, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_CLIENT_URL", "http://elsewhere:9/")
    monkeypatch.setenv("RESNET_CLIENT_API_KEY", "secret")
    client, requests = scripted(ok(), url=None)

    client.classify(png())

    assert str(requests[0].url).startswith("http://elsewhere:9/predict")
    assert requests[0].headers["authorization"] == "Bearer secret"


def test_what_is_given_counts_more_than_the_environment(
    scripted: Scripted, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_CLIENT_URL", "http://elsewhere:9")
    client, requests = scripted(ok())

    client.classify(png())

    assert requests[0].url.host == "x"
    assert "authorization" not in requests[0].headers


def test_a_key_is_not_shown() -> None:
    with Client(api_key="secret") as client:
        assert "secret" not in repr(vars(client))


def test_a_client_of_ones_own_is_not_closed() -> None:
    own = httpx2.Client(transport=httpx2.MockTransport(lambda _: ok()))

    with Client("http://x", http_client=own) as client, client.with_options(timeout=1):
        pass
    assert not own.is_closed

    with Client() as client:
        client.with_options(timeout=1).close()
        assert not client._connections.here().is_closed
    assert client._connections.here().is_closed


def test_an_asynchronous_client_closes_its_own_connections() -> None:
    async def use() -> bool:
        async with AsyncClient() as client:
            assert not client._connections.here().is_closed
        return client._connections.here().is_closed

    assert asyncio.run(use())


def test_requests_say_who_sends_them(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(ok())

    client.classify(png())

    assert requests[0].headers["user-agent"].startswith("resnet-ensemble-python/")


def test_a_url_may_have_a_path_and_a_slash(scripted: Scripted, png: Png) -> None:
    client, requests = scripted(ok(), url="http://x/models/")

    client.classify(png())

    assert requests[0].url.path == "/models/predict"


# What others see of the SDK


def test_the_public_names_are_those_listed() -> None:
    public = {name for name in vars(sdk) if not name.startswith("_")} - {"batch"}  # a module of its own

    assert public == set(sdk.__all__)
    assert sdk.__all__ == sorted(sdk.__all__)


SCRIPT = """
import asyncio
from resnet_ensemble.client import AsyncClient, Client, ImageError, OverloadedError, Prediction, ResnetError

def classify(path: str) -> tuple[str, float, list[str]]:
    with Client("http://localhost:8000", timeout=5) as client:
        prediction = client.with_options(max_retries=4).classify(path, top_k=3, stop="exact")
        for answer in client.classify_many([path, b"bytes", open(path, "rb")], concurrency=4):
            if isinstance(answer, Prediction):
                reveal_type(answer.entropy)
            else:
                reveal_type(answer)
        return prediction.label, prediction.top[0].probability, [vote.member for vote in prediction.members]

async def main() -> None:
    async with AsyncClient() as client:
        async for answer in client.classify_many(["cat.jpg"]):
            print(answer.label if isinstance(answer, Prediction) else answer)
        try:
            print((await client.classify("cat.jpg")).views_used, (await client.info()).labels, await client.ready())
        except OverloadedError as error:
            print(error.retry_after, error.code, error.request_id)

client = Client()
client.classify(3)
"""


def test_a_users_script_is_checked_strictly(root: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "links" / "resnet_ensemble").mkdir(parents=True)
    (tmp_path / "links" / "resnet_ensemble" / "client").symlink_to(root / "clients" / "python")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nnamespace_packages = true\nexplicit_package_bases = true\n"
        f"mypy_path = {tmp_path / 'links'}\nfollow_imports = silent\n"
        # neither is needed, and neither is there
        "[mypy-numpy.*,PIL.*]\nfollow_imports = error\n"
    )

    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    told = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("script.py")]
    assert told[:2] == [
        'note: Revealed type is "float | None"',
        'note: Revealed type is "resnet_ensemble.client._errors.ResnetError | OSError"',
    ]
    assert told[2].startswith('error: Argument 1 to "classify" of "Client" has incompatible type "int"')
    assert len(told) == 3
    assert "numpy" not in done.stdout
    assert "PIL" not in done.stdout.replace("PilImage", "")


def test_arrays_and_pil_images_are_images_for_the_type_checker() -> None:
    with pytest.raises(sdk.ConnectionFailedError):  # mypy checks these calls; here nobody answers
        Client("http://localhost:9", max_retries=0).classify(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(sdk.ConnectionFailedError):
        Client("http://localhost:9", max_retries=0).classify(Image.new("RGB", (2, 2)))
