"""Servers that are away, busy, slow, or wrong: what is asked again, what becomes a row, and what ends a job."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from resnet_ensemble.client import AsyncClient, ConnectionFailedError, Info
from resnet_ensemble.client._errors import error_class
from resnet_ensemble.client.batch import Job, Summary, run
from resnet_ensemble.client.batch import _sender as sender_module
from resnet_ensemble.client.batch._places import Item
from tests.client.batch.conftest import answered, problem, rows_of, server

Do = Callable[..., Summary]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt comes soon."""
    monkeypatch.setattr(sender_module, "delay", lambda retry, asked: 0.001)


@pytest.mark.parametrize(
    "failure",
    [
        problem(503, "overloaded", **{"Retry-After": "1"}),
        problem(429, "quota_exceeded"),
        problem(503, "not_ready"),
        problem(408, "slow_upload"),
        problem(504, "deadline_exceeded"),
        problem(500, "internal_error"),
        httpx2.Response(502, text="<html>"),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("gone"),
    ],
    ids=str,
)
def test_what_passes_is_waited_for(do: Do, quick: None, failure: Any) -> None:
    seen: Counter[bytes] = Counter()

    def predict(content: bytes) -> httpx2.Response:
        seen[content] += 1
        if seen[content] <= 2:
            if isinstance(failure, Exception):
                raise failure
            return httpx2.Response(failure.status_code, content=failure.content, headers=failure.headers)
        return answered(content)

    summary = do(predict)

    assert (summary.rows, summary.errors, summary.exit_code) == (10, 0, 0)
    assert summary.requests == 30


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (problem(500, "engine_failure"), "engine_failure"),
        (problem(504, "deadline_exceeded"), "deadline_exceeded"),
        (httpx2.ReadTimeout("slow"), "timed_out"),
        (httpx2.RemoteProtocolError("gone"), "connection_lost"),
    ],
    ids=str,
)
def test_what_fails_with_one_picture_again_and_again_is_its_row(
    do: Do, quick: None, tmp_path: Path, failure: Any, code: str
) -> None:
    def predict(content: bytes) -> httpx2.Response:
        if content != b"picture 5":
            return answered(content)
        if isinstance(failure, Exception):
            raise failure
        return httpx2.Response(failure.status_code, content=failure.content)

    assert do(predict).errors == 1
    assert [row["error_code"] for row in rows_of(tmp_path / "rows") if row["error_code"]] == [code]


def test_a_server_that_was_away_or_busy_is_not_the_pictures_fault(do: Do, quick: None) -> None:
    away: list[Any] = [httpx2.ConnectError("refused"), problem(503, "overloaded"), problem(502, "unknown")] * 10
    once = [httpx2.RemoteProtocolError("gone"), httpx2.ReadTimeout("slow"), problem(500, "internal_error")]
    seen: dict[bytes, Any] = {}

    def predict(content: bytes) -> httpx2.Response:
        failure = next(seen.setdefault(content, iter([*away, *once, *away, *once])), None)
        if isinstance(failure, Exception):
            raise failure
        return answered(content) if failure is None else problem(failure.status_code, failure.json()["code"])

    assert (do(predict).errors, len(seen)) == (0, 10)


@pytest.mark.parametrize("failure", [problem(503, "overloaded"), httpx2.ConnectError("refused")], ids=str)
def test_a_server_that_stays_away_ends_the_job_and_makes_no_error_rows(do: Do, quick: None, failure: Any) -> None:
    def predict(content: bytes) -> httpx2.Response:
        if isinstance(failure, Exception):
            raise failure
        return httpx2.Response(failure.status_code, content=failure.content)

    summary = do(predict, patience=0.05)

    assert (summary.total_rows, summary.exit_code) == (0, 1)
    assert "nothing was answered for 0.05 s" in str(summary.stopped)


def test_a_server_that_hangs_is_not_the_fault_of_thousands_of_pictures(
    do: Do, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = itertools.count()

    async def predict(content: bytes) -> httpx2.Response:
        if next(answers) < 4:
            return answered(content)
        await asyncio.sleep(0.05)
        raise httpx2.ReadTimeout("late")

    summary = do(predict, patience=0.5, max_concurrency=2)

    assert (summary.rows - summary.errors, summary.exit_code) == (4, 1)
    assert "nothing was answered for 0.5 s" in str(summary.stopped)
    assert summary.requests < 4 + 2 * 12


def test_a_server_that_asks_to_come_back_much_later_ends_the_job_when_its_patience_does(do: Do) -> None:
    began = time.monotonic()

    summary = do(lambda _: problem(503, "maintenance", **{"Retry-After": "30"}), patience=0.5)

    assert 0.5 < time.monotonic() - began < 15
    assert "nothing was answered for 0.5 s; the last error: 503 maintenance" in str(summary.stopped)
    assert (summary.exit_code, summary.requests <= 2 * 10) == (1, True)


def test_a_picture_that_may_come_back_much_later_does_not_end_a_job_that_gets_answers(do: Do, tmp_path: Path) -> None:
    seen: set[bytes] = set()

    async def predict(content: bytes) -> httpx2.Response:
        if content == b"picture 5" and content not in seen:
            seen.add(content)
            return problem(429, "quota_exceeded", **{"Retry-After": "30"})
        await asyncio.sleep(0.05)
        return answered(content)

    assert do(predict, patience=0.5, max_concurrency=2).exit_code == 0


def test_a_busy_server_that_says_at_once_is_not_asked_at_once(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float | None] = []
    monkeypatch.setattr(sender_module, "delay", lambda retry, seconds: asked.append(seconds) or 0.001)
    answers = itertools.count()

    def predict(content: bytes) -> httpx2.Response:
        return problem(503, "overloaded", **{"Retry-After": "0"}) if next(answers) < 3 else answered(content)

    assert do(predict).rows == 10
    assert asked == [None] * 3


@pytest.mark.parametrize(("status", "code"), [(429, "quota_exceeded"), (503, "not_ready"), (408, "slow_upload")])
def test_a_server_that_is_busy_at_first_is_waited_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    answers = itertools.count()

    async def info(client: AsyncClient) -> Info:
        if next(answers) < 1:
            raise error_class(status, code)(status, code, "later", "", None)
        return await really_ask(client)

    really_ask = AsyncClient.info
    monkeypatch.setattr(AsyncClient, "info", info)

    assert run(Job((str(pictures),), tmp_path / "rows"), connect=server(answered)).rows == 10


def test_patience_does_not_run_out_while_there_is_nothing_to_ask(
    do: Do, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_read = Item.read
    seen: set[bytes] = set()

    def read(item: Item, most: int = -1) -> bytes:
        time.sleep(0.5)
        return really_read(item, most)

    def predict(content: bytes) -> httpx2.Response:
        first = content not in seen
        seen.add(content)
        return problem(503, "overloaded") if first else answered(content)

    monkeypatch.setattr(Item, "read", read)

    assert do(predict, patience=0.4, limit=1).rows == 1


@pytest.mark.parametrize(
    "failure",
    [problem(422, "invalid_option"), problem(401, "unauthorized"), httpx2.Response(200, text="<html>hello")],
    ids=["a wrong option", "a wrong key", "another server"],
)
def test_what_would_fail_with_every_picture_ends_the_job(do: Do, failure: httpx2.Response) -> None:
    summary = do(lambda _: httpx2.Response(failure.status_code, content=failure.content))

    assert (summary.total_rows, summary.exit_code) == (0, 1)
    assert summary.requests < 10 + 1


def test_a_bundle_that_changes_meanwhile_ends_the_job_before_rows_are_mixed(do: Do, tmp_path: Path) -> None:
    seen = []

    def predict(content: bytes) -> httpx2.Response:
        seen.append(content)
        return answered(content) if len(seen) <= 4 else answered(content, bundle="cifar10-3-1")

    summary = do(predict, max_concurrency=1)

    assert "changed from cifar10-2-0 to cifar10-3-1" in str(summary.stopped)
    assert {row["bundle"] for row in rows_of(tmp_path / "rows")} == {"cifar10-2-0"}
    assert summary.total_rows == 4


def test_nobody_at_the_url_is_an_error_after_the_patience(tmp_path: Path, pictures: Path) -> None:
    told: list[str] = []

    with pytest.raises(ConnectionFailedError):
        run(Job((str(pictures),), tmp_path / "rows", url="http://localhost:9", patience=0), tell=told.append)
    assert not (tmp_path / "rows").exists()


def test_the_limit_of_a_server_is_found_and_its_refusals_cost_nothing(do: Do, quick: None, tmp_path: Path) -> None:
    names = tmp_path / "names.jsonl"
    names.write_text("".join(f'{{"path": "{n}", "bytes": "cGljdHVyZQ=="}}\n' for n in range(600)))
    in_flight = 0

    async def predict(content: bytes) -> httpx2.Response:
        nonlocal in_flight
        if in_flight >= 6:
            return problem(503, "overloaded", **{"Retry-After": "1"})
        in_flight += 1
        await asyncio.sleep(0.003)
        in_flight -= 1
        return answered(content)

    summary = do(predict, inputs=(str(names),), columns=replace(Job.columns, content="bytes"), shard_rows=1000)

    assert (summary.total_rows, summary.errors) == (600, 0)
    assert 0 < summary.refusals < 0.06 * summary.requests
