"""The server as a process of its own, over real sockets."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx2
import pytest

from resnet_ensemble.export.bundle import Bundle
from tests.conftest import until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(module: str = "resnet_ensemble.server", **variables: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    port = free_port()
    environment = {**os.environ, "RESNET_PORT": str(port), **variables}
    command = [sys.executable, "-m", module]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield running, f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.communicate()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass  # it does not listen yet
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metric(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics", timeout=30).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def wait_for(url: str, name: str, value: float) -> None:
    until(lambda: metric(url, name) == value)


# Enough work that it is still in progress when the test looks, on machines much faster than this one.
MANY = 200


def test_sigterm_answers_every_accepted_request_and_exits_with_0(shipped: Bundle) -> None:
    ship = (shipped.path / "golden" / "ship.png").read_bytes()
    many = 64  # all of them are answered here: on 2 cores, two requests of so many take some 10 s
    with (
        # Limits for a machine that does other things meanwhile: the defaults are 10 and 30 s.
        process(RESNET_MAX_IMAGES_PER_REQUEST=str(many), RESNET_MAX_WAIT_SECONDS="600", RESNET_DRAIN_SECONDS="120") as (
            running,
            url,
        ),
        httpx2.Client(timeout=120) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        wait_until_ready(url)
        parts = [("image", ship)] * many
        requests = [pool.submit(client.post, f"{url}/predict", files=parts) for _ in range(2)]
        wait_for(url, "resnet_images_in_flight", 2 * many)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        running.send_signal(signal.SIGHUP)  # now it is too late for another bundle

        answers = [request.result() for request in requests]

        assert [answer.status_code for answer in answers] == [200] * 2
        assert [r["prediction"]["label"] for answer in answers for r in answer.json()["results"]] == ["ship"] * 2 * many
        assert running.wait(30) == 0
        assert running.stderr
        assert running.stderr.read().count("ready: ") == 1


def test_what_is_not_answered_at_the_drain_limit_is_told_so(shipped: Bundle) -> None:
    ship = (shipped.path / "golden" / "ship.png").read_bytes()
    with (
        process(RESNET_MAX_IMAGES_PER_REQUEST=str(MANY), RESNET_MAX_WAIT_SECONDS="600", RESNET_DRAIN_SECONDS="1") as (
            running,
            url,
        ),
        httpx2.Client(timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        wait_until_ready(url)
        requests = [pool.submit(client.post, f"{url}/predict", files=[("image", ship)] * MANY) for _ in range(2)]
        wait_for(url, "resnet_images_in_flight", 2 * MANY)
        running.send_signal(signal.SIGTERM)

        answers = [request.result() for request in requests]

        assert {answer.status_code for answer in answers} <= {200, 503}
        late = [answer.json() for answer in answers if answer.status_code == 503]
        assert [problem["code"] for problem in late] == ["not_ready"] * len(late)
        assert running.wait(30) == 0


@pytest.mark.parametrize(
    ("path", "told"), [("/predict", b'"code":"not_ready"'), ("/v2/models/cifar10/infer", b'{"error":"not_ready: ')]
)
def test_what_still_arrives_at_the_drain_limit_is_told_so_in_the_path_s_own_shape(path: str, told: bytes) -> None:
    with process(RESNET_BACKEND="fake", RESNET_DRAIN_SECONDS="1") as (running, url):
        wait_until_ready(url)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode())
            time.sleep(0.5)
            running.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))

        assert answer.startswith(b"HTTP/1.1 503 ")
        assert told in answer
        assert running.wait(30) == 0
        assert running.stderr
        assert "Traceback" not in running.stderr.read()


@pytest.mark.parametrize("name", ["Upgrade", "upgrade"])
def test_a_client_that_offers_another_protocol_is_answered_in_this_one(shipped: Bundle, name: str) -> None:
    ship = (shipped.path / "golden" / "ship.png").read_bytes()
    offer = {"Connection": "Upgrade, HTTP2-Settings", name: "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA"}
    with process(RESNET_BACKEND="fake") as (_, url), httpx2.Client() as client:
        wait_until_ready(url)
        for _ in range(2):  # on one connection
            answer = client.post(f"{url}/predict", content=ship, headers=offer)
            assert answer.status_code == 200, answer.text


def test_a_connection_stays_open_for_longer_than_clients_keep_theirs() -> None:
    with process(RESNET_BACKEND="fake") as (_, url), closing(HTTPConnection(url.removeprefix("http://"))) as connection:
        wait_until_ready(url)
        connection.connect()
        only = connection.sock
        for pause in (5.5, 0):  # uvicorn closes after 5 s by itself, as httpx does
            connection.request("GET", "/livez")
            with connection.getresponse() as answer:
                assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
            assert connection.sock is only  # it opens another by itself where one was closed
            time.sleep(pause)


def test_a_client_that_leaves_takes_its_views_out_of_the_queue(shipped: Bundle) -> None:
    ship = (shipped.path / "golden" / "ship.png").read_bytes()
    with process(RESNET_MAX_IMAGES_PER_REQUEST=str(MANY), RESNET_STREAMS="1") as (_, url), httpx2.Client() as client:
        wait_until_ready(url)
        with pytest.raises(httpx2.ReadTimeout):
            client.post(f"{url}/predict", files=[("image", ship)] * MANY, timeout=0.3)
        wait_for(url, "resnet_unfinished_views", 0)

        text = client.get(f"{url}/metrics").text
        assert 'resnet_requests_total{method="POST",route="/predict",status="499"} 1.0' in text
        assert metric(url, 'resnet_batch_views_sum{member="resnet20"}') < 10 * MANY  # the rest was never run
        assert client.post(f"{url}/predict", content=ship, headers={"Content-Type": "image/png"}).status_code == 200


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    """The address of a server that does not wait long for uploads."""
    with process(RESNET_UPLOAD_SECONDS="1", RESNET_BACKEND="fake") as (_, url):
        wait_until_ready(url)
        yield url


@pytest.mark.parametrize("path", ["/predict", "/v2/models/cifar10/infer"])
@pytest.mark.parametrize(
    ("own", "status", "code"), [("", 408, "slow_upload"), ("X-Request-Timeout: 0.2\r\n", 504, "deadline_exceeded")]
)
def test_a_slow_upload_is_given_up_and_others_are_served_meanwhile(
    impatient: str, path: str, own: str, status: int, code: str
) -> None:
    host, port = impatient.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        began = time.monotonic()
        slow.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{own}Content-Length: 1000\r\n\r\nfirst bytes".encode())
        assert httpx2.get(f"{impatient}/livez").status_code == 200
        slow.settimeout(10)
        answer = ""
        while not answer.endswith("}"):
            received = slow.recv(65536).decode()
            assert received, answer
            answer += received
        seconds = time.monotonic() - began

    assert answer.startswith(f"HTTP/1.1 {status}")
    assert code in answer
    assert seconds >= (0.2 if own else 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RESNET_PROT": "1"}, "RESNET_PROT is not a setting"),
        ({"RESNET_MAX_IMAGE_BYTES": "9", "RESNET_MAX_REQUEST_BYTES": "1"}, "more than a whole request"),
    ],
)
def test_a_wrong_setting_stops_the_start(variables: dict[str, str], message: str) -> None:
    with process(**variables) as (running, _):
        _, log = running.communicate(timeout=30)

    assert running.returncode == 2
    assert message in log
    assert "Traceback" not in log


def test_a_bundle_that_is_none_stops_the_server(tmp_path: Path) -> None:
    with process(RESNET_BUNDLE=str(tmp_path)) as (running, _):
        _, log = running.communicate(timeout=30)

    assert running.returncode == 1
    assert "no bundle.json" in log
    assert "Traceback" not in log


def test_the_fake_backend_serves_without_weights(shipped: Bundle) -> None:
    with process(RESNET_BACKEND="fake") as (_, url):
        wait_until_ready(url)
        info = httpx2.get(f"{url}/info").json()

    assert {member["engine"]["backend"] for member in info["members"]} == {"fake"}


def test_a_port_that_is_taken_stops_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with process(RESNET_PORT=str(taken.getsockname()[1])) as (running, _):
            _, log = running.communicate(timeout=30)

    assert running.returncode != 0
    assert "address already in use" in log
