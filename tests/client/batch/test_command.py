"""The command resnet-batch, against the real server in its own process and against the bundle in this one."""

import asyncio
import errno
import io
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from resnet_ensemble.client import AsyncClient, Client
from resnet_ensemble.client.batch import Job, Progress, run
from resnet_ensemble.client.batch.__main__ import _Lines, main
from resnet_ensemble.client.batch._rows import Row
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.client.batch.conftest import rows_of
from tests.server.test_process import free_port, process, wait_until_ready

Png = Callable[..., bytes]
COMMAND = [sys.executable, "-m", "resnet_ensemble.client.batch"]


@pytest.fixture
def photos(tmp_path: Path, png: Png) -> Path:
    """Sixty pictures, each brighter than the one before."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03}.png").write_bytes(png(4 * number))
    return folder


def without_latency(rows: list[Row]) -> list[Row]:
    return [{**row, "latency_ms": None} for row in sorted(rows, key=lambda row: str(row["id"]))]


def test_a_job_says_how_it_went(
    photos: Path, tmp_path: Path, fake_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "notes.txt").touch()
    (photos / "bad.png").write_bytes(b"no picture")
    command = [str(photos), "--output", str(tmp_path / "rows.jsonl"), "--url", fake_server, "--protocol", "center"]

    assert main(command) == 3
    told = capsys.readouterr().err
    assert "61 rows in 0:0" in told
    assert "1 other files left out" in told
    assert "rows.jsonl, 1 of them errors (--retry-errors does them again)" in told
    (photos / "bad.png").unlink()

    assert main([*command, "--retry-errors"]) == 0
    assert "doing 1 inputs again that have error rows" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "rows.jsonl")) == 60


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    photos: Path, tmp_path: Path, fake_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(photos), "-o", str(tmp_path / "rows"), "--url", fake_server, "--order", "input"]

    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "60 inputs, 0 of them with a row already or named twice; 60 to do" in told
    assert "000.png" in told
    assert "rows: nothing yet" in told
    assert not (tmp_path / "rows").exists()

    main([*command, "--limit", "20"])
    capsys.readouterr()
    main([*command, "--dry-run"])
    assert "60 inputs, 20 of them with a row already or named twice; 40 to do" in capsys.readouterr().out
    main([*command, "--dry-run", "--top-k", "1"])
    assert "changed: top_k: 5 → 1; a run is refused without --force" in capsys.readouterr().out
    main([*command, "--dry-run", "--top-k", "1", "--force"])
    told = capsys.readouterr().out
    assert "a run takes these 20 rows away and begins again" in told
    assert "60 inputs, 0 of them with a row already or named twice; 60 to do" in told


def test_a_folder_that_fails_while_it_is_listed_is_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> str:
        raise OSError(errno.EIO, "Input/output error", str(photos))

    monkeypatch.setattr("resnet_ensemble.client.batch._places._named", fail)

    assert main([str(photos), "-o", str(tmp_path / "rows"), "--dry-run"]) == 2
    assert "Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/folder"], "no/folder is no file or folder here"),
        ([".", "--bundle", "no/bundle"], "no bundle.json in no/bundle"),
        (["-", "--url", "http://localhost:9", "--patience", "0"], "no connection to http://localhost:9"),
    ],
)
def test_what_can_not_begin_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "rows")]) == 2
    assert f"resnet-batch: {message}" in capsys.readouterr().err


def test_an_output_that_can_not_be_written_is_told_in_a_line(
    photos: Path, tmp_path: Path, fake_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    assert main([str(photos), "--output", str(tmp_path / "file" / "rows"), "--url", fake_server]) == 2
    assert re.search(r"resnet-batch: .*/file/rows can't be written: .*Not a directory", capsys.readouterr().err)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--sample", "2"],
        ["--limit", "0"],
        ["--timeout", "nan"],
        ["--patience", "-1"],
        ["--url", "x", "--bundle", "y"],
        ["--output", "s3://bucket/rows"],
    ],
)
def test_wrong_options_are_told(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([".", "--output", "rows", *wrong])
    assert left.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"exit codes: 0; 3 finished, with error rows; 130 interrupted", capsys.readouterr().out)


def test_a_dry_run_tells_of_errors_that_are_done_again(
    photos: Path, tmp_path: Path, fake_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    command = [str(photos), "-o", str(tmp_path / "rows"), "--url", fake_server]

    main(command)
    main([*command, "--dry-run", "--retry-errors"])

    assert "the 1 error rows are taken away first, and their inputs done again" in capsys.readouterr().out


def test_a_line_is_not_longer_than_the_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")

    _Lines().progress(Progress(total=1_000_000, views_used=1, views_planned=2))

    assert terminal.getvalue().startswith("\r0/1,000,000 (0.0%), 0.0/s, ")
    assert len(terminal.getvalue()) == 40


def test_a_job_goes_on_where_nobody_can_read_how_it_goes(photos: Path, tmp_path: Path, fake_server: str) -> None:
    """On a full disk, or into a pipe that was closed."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, photos, "--output", "rows.jsonl", "--url", fake_server],
            cwd=tmp_path, stderr=full, check=False, env=_environment(),
        )  # fmt: skip

    assert done.returncode == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 60


def test_a_name_that_the_locale_can_t_show_is_no_reason_to_stop(tmp_path: Path, png: Png) -> None:
    (tmp_path / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png").write_bytes(png())

    done = subprocess.run(
        [*COMMAND, tmp_path, "--output", "rows", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=_environment() | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "caf\\xe9.png" in done.stdout


def test_paths_come_from_the_standard_input(photos: Path, tmp_path: Path, fake_server: str) -> None:
    names = "\n".join(sorted(str(path) for path in photos.iterdir()))

    done = subprocess.run(
        [*COMMAND, "-", "--output", "rows.parquet", "--url", fake_server],
        cwd=tmp_path, input=names, capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "rows.parquet")) == 60
    assert "\r" not in done.stderr  # no terminal, so no line that changes


def test_ctrl_c_keeps_what_was_done_even_when_the_standard_input_stays_open(
    photos: Path, tmp_path: Path, fake_server: str
) -> None:
    job = subprocess.Popen(
        [*COMMAND, "-", "--output", "rows", "--url", fake_server, "--shard-rows", "5"],
        cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(),
    )  # fmt: skip
    assert job.stdin
    job.stdin.write("".join(f"{photos}/{number:03}.png\n" for number in range(8)))
    job.stdin.flush()
    _wait_for(lambda: len(_ledger(tmp_path / "rows")) > 1, job)

    job.send_signal(signal.SIGINT)
    assert job.wait(20) == 130
    job.communicate()
    assert len(rows_of(tmp_path / "rows")) == 8


def test_bad_inputs_are_rows_with_the_servers_code(tmp_path: Path, png: Png, fake_server: str) -> None:
    whole = png(100, (64, 64), "JPEG")
    members = {"good.jpg": whole, "cut.jpg": whole[: len(whole) // 2], "text.jpg": b"hello", "empty.jpg": b""}
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            (tmp_path / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path / name}\n" for name in [*members, "missing.jpg"]))
    inputs = (str(tmp_path / "shard.tar"), str(tmp_path / "list.txt"))

    summary = run(Job(inputs, tmp_path / "rows", url=fake_server, order="input"))

    rows = rows_of(tmp_path / "rows")
    codes = [None, "corrupt_image", "unsupported_image_format", "empty_image"]
    assert [row["error_code"] for row in rows] == [*codes, *codes, "unreadable"]
    with Client(fake_server) as client:
        assert rows[0]["label"] == rows[4]["label"] == client.classify(whole).label
    assert all(row["error_message"] for row in rows if row["error_code"])
    assert (summary.rows, summary.errors, summary.exit_code) == (9, 7, 3)


def test_without_a_server_the_rows_are_the_same(shipped: Bundle, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    golden.mkdir()
    for file in (shipped.path / "golden").iterdir():
        (golden / file.name).write_bytes(file.read_bytes())
    (golden / "cut.png").write_bytes((golden / "ship.png").read_bytes()[:300])
    with process() as (_, url):
        wait_until_ready(url)
        main([str(golden), "--output", str(tmp_path / "server.parquet"), "--url", url, "--max-concurrency", "1"])
    main(
        [str(golden), "--output", str(tmp_path / "here.parquet"), "--bundle", str(shipped.path)]
        + ["--max-concurrency", "1"]
    )

    served, here = (without_latency(rows_of(tmp_path / f"{name}.parquet")) for name in ("server", "here"))
    assert served == here
    assert {Path(row["path"]).stem: row["label"] for row in here}["ship"] == "ship"


def test_killed_three_times_with_a_restart_of_the_server_every_input_has_one_row(tmp_path: Path, png: Png) -> None:
    chance = random.Random(os.urandom(8).hex())
    (tmp_path / "photos").mkdir()
    for number in range(600):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number % 256) if number % 50 else b"no picture")
    port = str(free_port())
    command = [*COMMAND, "photos", "--output", "rows", "--url", f"http://127.0.0.1:{port}"]
    command += ["--shard-rows", "10", "--protocol", "center", "--patience", "30"]

    def begin() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, env=_environment())

    def kill_in_its_midst() -> None:
        before, job = len(_ledger(tmp_path / "rows")), begin()
        _wait_for(lambda: len(_ledger(tmp_path / "rows")) > before + chance.randrange(1, 8), job)
        job.kill()
        assert job.wait() == -signal.SIGKILL

    with process(RESNET_PORT=port, RESNET_BACKEND="fake"):
        wait_until_ready(f"http://127.0.0.1:{port}")
        kill_in_its_midst()
        kill_in_its_midst()
        before, job = len(_ledger(tmp_path / "rows")), begin()
        _wait_for(lambda: len(_ledger(tmp_path / "rows")) > before, job)
    time.sleep(0.3)
    with process(RESNET_PORT=port, RESNET_BACKEND="fake"):
        before = len(_ledger(tmp_path / "rows"))
        _wait_for(lambda: len(_ledger(tmp_path / "rows")) > before, job)  # it has found the server again
        job.kill()
        job.wait()

        last = begin()
        assert last.wait(60) == 3

    rows = rows_of(tmp_path / "rows")
    assert sorted(row["id"] for row in rows) == sorted(f"photos/{number}.png" for number in range(600))
    assert sorted(int(Path(row["id"]).stem) for row in rows if row["error_code"]) == list(range(0, 600, 50))
    assert {row["label"] for row in rows if int(Path(row["id"]).stem) % 256 == 255} == {"truck"}


def test_a_server_with_a_short_queue_does_not_fail_the_job(tmp_path: Path, png: Png, pair: Bundle) -> None:
    settings = Settings(bundle=pair.path, max_wait_seconds=0.03, streams=2)

    @asynccontextmanager
    async def connect() -> AsyncIterator[AsyncClient]:
        app = create_app(Service(settings, open_with=lambda *_: FakeEngine(10, seconds_per_view=0.001)))
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http,
        ):
            client = AsyncClient("http://x", max_retries=0, http_client=http)
            while not await client.ready():  # noqa: ASYNC110  # a server tells it by no event
                await asyncio.sleep(0.01)
            yield client

    (tmp_path / "photos").mkdir()
    for number in range(200):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))

    summary = run(Job((str(tmp_path / "photos"),), tmp_path / "rows"), connect=connect)

    assert (summary.rows, summary.errors, summary.exit_code) == (200, 0, 0)
    assert 0 < summary.refusals < 0.2 * summary.requests


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _ledger(folder: Path) -> list[str]:
    ledger = folder / "_ledger"
    return ledger.read_text().splitlines() if ledger.exists() else []


def _wait_for(happened: Callable[[], bool], job: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert job.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)
