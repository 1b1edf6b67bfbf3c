"""Jobs against a server that is a function."""

import asyncio
import base64
import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
import pytest

from resnet_ensemble.client import ResnetError
from resnet_ensemble.client.batch import COLUMNS, Columns, InputError, Job, OutputError, Progress, Summary, _ray, run
from resnet_ensemble.client.batch import _job as job_module
from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._rows import Row
from tests.client.batch.conftest import MOST_BYTES, answered, problem, rows_of, server

Do = Callable[..., Summary]


def test_every_picture_has_one_row(do: Do, tmp_path: Path) -> None:
    summary = do()

    rows = {row["id"]: row for row in rows_of(tmp_path / "rows")}
    assert len(rows) == summary.rows == summary.total_rows == 10
    assert all(rows[f"{tmp_path}/pictures/{n}.jpg"]["label"] == f"picture {n}" for n in range(10))
    assert all(tuple(row) == COLUMNS for row in rows.values())
    assert (summary.exit_code, summary.errors, summary.stopped) == (0, 0, None)
    assert (summary.views_used, summary.views_planned) == (50, 200)
    assert [len(rows_of(file)) for file in summary.files] == [3, 3, 3, 1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_go_into_one_file(do: Do, tmp_path: Path, name: str) -> None:
    summary = do(output=tmp_path / name, order="input")

    assert [row["label"] for row in rows_of(tmp_path / name)] == [f"picture {number}" for number in range(10)]
    assert summary.files == (tmp_path / name,)


def test_the_same_job_again_does_nothing(do: Do, tmp_path: Path) -> None:
    do()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}

    summary = do(lambda _: pytest.fail("nothing is to be sent"))

    assert (summary.rows, summary.skipped, summary.total_rows, summary.exit_code) == (0, 10, 10, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == before


def test_new_pictures_are_added(do: Do, pictures: Path, tmp_path: Path) -> None:
    do(output=tmp_path / "rows.jsonl")
    (pictures / "new.jpg").write_text("new")

    summary = do(output=tmp_path / "rows.jsonl")

    assert (summary.rows, summary.total_rows) == (1, 11)
    assert len({row["id"] for row in rows_of(tmp_path / "rows.jsonl")}) == 11


@pytest.mark.parametrize(
    "change",
    [{"top_k": 1}, {"protocol": "flip"}, {"stop": "calibrated"}, {"format": "parquet"}, {"bundle": "other-1-1"}],
)
def test_another_configuration_or_bundle_is_refused_until_it_is_forced(
    do: Do, tmp_path: Path, change: dict[str, Any]
) -> None:
    do()

    def predict(content: bytes) -> httpx2.Response:
        return answered(content, bundle=change.get("bundle", "cifar10-2-0"))

    with pytest.raises(OutputError, match=next(iter(change))):
        do(predict, **change)
    assert do(predict, force=True, **change).rows == 10
    assert len(rows_of(tmp_path / "rows")) == 10


def test_what_the_server_does_by_default_is_asked_for_so_that_it_stays(do: Do) -> None:
    do(limit=3, order="input")
    with pytest.raises(OutputError, match="protocol: 10crop → flip"):
        do(protocol="flip", order="input")

    assert do(protocol="10crop", order="input").rows == 7


def test_bad_pictures_are_rows_with_the_servers_code(do: Do, pictures: Path, tmp_path: Path) -> None:
    (pictures / "3.jpg").unlink()
    (pictures / "3.jpg").symlink_to(pictures / "gone.jpg")

    def predict(content: bytes) -> httpx2.Response:
        return problem(422, "corrupt_image") if content == b"picture 5" else answered(content)

    summary = do(predict, order="input")

    rows = rows_of(tmp_path / "rows")
    assert [row["error_code"] for row in rows] == [None] * 3 + ["unreadable", None, "corrupt_image"] + [None] * 4
    assert "No such file" in rows[3]["error_message"]
    assert rows[5]["error_message"] == "it is corrupt_image"
    assert rows[5]["sha256"]
    assert (summary.errors, summary.exit_code) == (2, 3)
    assert do(predict, order="input").exit_code == 3  # the rows are still there


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_what_utf_8_can_not_hold_is_written_as_text(do: Do, tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_bytes(b"memory://gone\xff.jpg\n" + f"{tmp_path}/pictures/5.jpg\n".encode())
    failure = httpx2.Response(422, content=b'{"code": "bad\\ud801", "detail": "a \\ud800 name"}')

    assert do(lambda _: failure, inputs=(str(tmp_path / "list.txt"),), output=tmp_path / name, order="input").rows == 2

    missing, bad = rows_of(tmp_path / name)
    assert "gone\\xff.jpg" in missing["error_message"]
    assert (bad["error_code"], bad["error_message"]) == ("bad\\xed\\xa0\\x81", "a \\xed\\xa0\\x80 name")


def test_a_file_that_the_server_would_refuse_is_not_read_whole(do: Do, pictures: Path, tmp_path: Path) -> None:
    with (pictures / "0.jpg").open("wb") as file:
        file.truncate(2**40)  # sparse: no disk holds it, and no memory
    (pictures / "1.jpg").write_bytes(bytes(MOST_BYTES))

    assert do().errors == 1
    (row,) = [row for row in rows_of(tmp_path / "rows") if row["error_code"]]
    assert (Path(row["id"]).name, row["error_code"], row["sha256"]) == ("0.jpg", "image_too_large", None)
    assert "more than the 1,000,000 bytes" in row["error_message"]


def test_pictures_in_archives_and_columns_that_the_server_would_refuse_are_not_sent(do: Do, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, size in (("large.jpg", MOST_BYTES + 1), ("small.jpg", 3)):
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(b"a" * size))
    (tmp_path / "list.csv").write_text(f"data\n{base64.b64encode(bytes(MOST_BYTES + 1)).decode()}\n")
    inputs = (str(tmp_path / "s.tar"), str(tmp_path / "list.csv"))

    summary = do(inputs=inputs, columns=Columns(content="data"), order="input")

    assert (summary.rows, summary.requests) == (3, 1)
    assert [row["error_code"] for row in rows_of(tmp_path / "rows")] == ["image_too_large", None, "image_too_large"]


def test_error_rows_are_done_again_when_asked_for(do: Do, tmp_path: Path) -> None:
    bad = {b"picture 5", b"picture 6"}

    def predict(content: bytes) -> httpx2.Response:
        return problem(422, "corrupt_image") if content in bad else answered(content)

    do(predict)
    bad.clear()
    summary = do(predict, retry_errors=True)

    assert (summary.rows, summary.total_rows, summary.total_errors, summary.exit_code) == (2, 10, 0, 0)
    assert len({row["id"] for row in rows_of(tmp_path / "rows")}) == len(rows_of(tmp_path / "rows")) == 10


def test_too_many_errors_stop_the_job(do: Do, tmp_path: Path) -> None:
    summary = do(lambda _: problem(422, "corrupt_image"), max_errors=2, max_concurrency=1)

    assert summary.exit_code == 1
    assert "more than 2 error rows" in str(summary.stopped)
    assert 3 <= summary.total_errors == len(rows_of(tmp_path / "rows")) < 10


def test_the_order_of_the_inputs_is_kept_although_answers_come_otherwise(do: Do, tmp_path: Path) -> None:
    async def predict(content: bytes) -> httpx2.Response:
        await asyncio.sleep(0.05 if content == b"picture 0" else 0.0)
        return answered(content)

    do(predict, order="input")

    assert [row["label"] for row in rows_of(tmp_path / "rows")] == [f"picture {number}" for number in range(10)]


def test_limit_and_sample_take_a_part_and_later_more(do: Do, tmp_path: Path) -> None:
    assert do(limit=4, order="input").total_rows == 4
    assert do(limit=6, order="input").rows == 2
    assert do(order="input").total_rows == 10

    half = do(sample=0.5, output=tmp_path / "half").total_rows
    assert 0 < half < 10
    assert do(sample=0.5, output=tmp_path / "half").rows == 0


def test_an_input_that_is_named_twice_has_one_row(do: Do, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{pictures}/1.jpg\n{pictures}/2.jpg\n{pictures}/1.jpg\n")

    summary = do(inputs=(str(tmp_path / "list.txt"),))

    assert (summary.rows, summary.skipped) == (2, 1)


def test_a_list_that_breaks_off_ends_the_job_and_keeps_its_rows(do: Do, tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 100)

    summary = do(inputs=(str(tmp_path / "pictures"), str(tmp_path / "broken.tar")))

    assert summary.exit_code == 1
    assert "broken.tar can't be read further" in str(summary.stopped)
    assert summary.total_rows == 10


def test_names_of_files_may_be_any_bytes(do: Do, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff\n.jpg")).write_text("a picture")

    for _ in range(2):
        assert do(inputs=(str(folder),)).total_rows == 1

    assert [row["id"] for row in rows_of(tmp_path / "rows")] == [f"{tmp_path}/caf\\xe9/\\xff\n.jpg"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_list_that_is_damaged_is_told_once(do: Do, tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"nonsense")

    assert "list.parquet can't be read further" in str(do(inputs=(str(tmp_path / "list.parquet"),)).stopped)


def test_an_input_that_is_nothing_is_told_before_anything_happens(do: Do, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no/such/folder is no file or folder here"):
        do(inputs=("no/such/folder",))
    assert not (tmp_path / "rows").exists()


def test_a_full_disk_ends_the_job(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_ensemble.client.batch._disk import Disk

    really_append = Disk.append
    monkeypatch.setattr(Disk, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    summary = do()
    monkeypatch.setattr(Disk, "append", really_append)

    assert summary.exit_code == 1
    assert "the rows can't be written: [Errno 28]" in str(summary.stopped)
    assert do().total_rows == 10


def test_a_disk_that_is_full_at_the_end_keeps_the_rows(do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_ensemble.client.batch._formats import JsonLines

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "join", full)
        summary = do(output=tmp_path / "rows.jsonl")
    assert (summary.exit_code, summary.total_rows) == (1, 10)
    assert "the rows can't be written: [Errno 28]" in str(summary.stopped)

    assert do(lambda _: pytest.fail("nothing is to be sent"), output=tmp_path / "rows.jsonl").exit_code == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 10


def test_a_disk_that_is_full_for_a_while_does_not_change_the_order(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_ensemble.client.batch._formats import JsonLines

    really_write = JsonLines.write
    shards = itertools.count()

    def write(form: JsonLines, rows: Iterable[Row], file: BinaryIO) -> None:
        if next(shards) == 1:
            raise OSError(28, "No space left on device")
        really_write(form, rows, file)

    monkeypatch.setattr(JsonLines, "write", write)

    assert "the rows can't be written: [Errno 28]" in str(do(order="input").stopped)
    assert do(order="input").total_rows == 10
    assert [row["label"] for row in rows_of(tmp_path / "rows")] == [f"picture {number}" for number in range(10)]


def test_a_package_that_an_input_needs_ends_the_job(do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    (tmp_path / "list.txt").write_text("s3://x/a.jpg\n")

    summary = do(inputs=(str(tmp_path / "list.txt"),))

    assert (summary.exit_code, summary.total_rows) == (1, 0)
    assert "s3://x/a.jpg needs fsspec" in str(summary.stopped)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_what_is_in_flight_and_a_rerun_the_rest(
    do: Do, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    started = []

    async def predict(content: bytes) -> httpx2.Response:
        started.append(content)
        if len(started) == 4:
            os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        return answered(content)

    summary = do(predict, max_concurrency=2)

    assert summary.exit_code == code
    assert summary.total_rows == len(rows_of(tmp_path / "rows")) == len(started) < 10
    assert do(answered).total_rows == 10


def test_a_signal_does_not_wait_for_what_waits(do: Do) -> None:
    def predict(content: bytes) -> httpx2.Response:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start() if content == b"picture 3" else None
        return problem(503, "overloaded", **{"Retry-After": "30"})

    began = time.monotonic()
    assert do(predict, order="input").exit_code == 130
    assert time.monotonic() - began < 5


WAITING = """
import os, sys, threading
from pathlib import Path
from resnet_ensemble.client.batch import Job, _places, run
from tests.client.batch.conftest import answered, server

def read(*_):
    os.write(1, b"reading\\n")
    threading.Event().wait()

_places.Item.read = read
tell = lambda message: os.write(1, message.encode() + b"\\n")
run(Job((__file__,), Path(sys.argv[1])), connect=server(answered), tell=tell)
"""


def test_a_second_ctrl_c_does_not_wait_for_a_thread(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WAITING)
    command = [sys.executable, "script.py", "rows"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        for told in ("reading\n", "finishing what is in flight; once more to leave at once\n"):
            assert job.stdout.readline() == told
            job.send_signal(signal.SIGINT)
        try:
            assert job.wait(20) == -signal.SIGINT
        finally:
            job.kill()


def test_the_usual_handlers_of_signals_are_back_after_a_job(do: Do) -> None:
    usual = signal.signal(signal.SIGTERM, lambda *_: None), signal.getsignal(signal.SIGINT)
    mine = signal.getsignal(signal.SIGTERM)
    try:
        do(lambda content: os.kill(os.getpid(), signal.SIGINT) or answered(content))
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (mine, usual[1])
    finally:
        signal.signal(signal.SIGTERM, usual[0])


def in_a_running_loop(act: Callable[[], Summary]) -> Summary:
    async def inside() -> Summary:
        return act()

    with contextlib.closing(asyncio.new_event_loop()) as loop:  # Ctrl-C in asyncio.run would only be kept for later
        return loop.run_until_complete(inside())


def test_a_job_runs_where_an_event_loop_runs_already(do: Do) -> None:
    assert in_a_running_loop(do).rows == 10


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """Ctrl-C is not ignored there, as it is by what a shell has begun in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
def test_ctrl_c_where_an_event_loop_runs_already_finishes_what_is_in_flight(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bytes] = []
    interrupted, interrupt = threading.Event(), job_module._Run.interrupt

    def interrupt_and_tell(run: job_module._Run) -> None:
        interrupt(run)
        interrupted.set()

    waiting, wait = threading.Event(), futures.wait  # the thread that Ctrl-C interrupts

    def wait_and_tell(*given: Any) -> Any:
        waiting.set()
        return wait(*given)

    monkeypatch.setattr(futures, "wait", wait_and_tell)
    monkeypatch.setattr(job_module._Run, "interrupt", interrupt_and_tell)

    async def predict(content: bytes) -> httpx2.Response:
        started.append(content)
        if len(started) == 4:
            assert await asyncio.to_thread(waiting.wait, 20)
            os.kill(os.getpid(), signal.SIGINT)
        if len(started) >= 4:
            assert await asyncio.to_thread(interrupted.wait, 20)
        return answered(content)

    summary = in_a_running_loop(lambda: do(predict, max_concurrency=2))

    assert summary.exit_code == 130
    assert summary.total_rows == len(rows_of(tmp_path / "rows")) == len(started) < 10


def test_actors_of_ray_ask_the_server_of_the_jobs_environment_with_its_key(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def classify(items: Iterable[Item], work: _ray.Work, **how: Any) -> Iterator[_ray.Done]:
        given.append((work.url, work.api_key))
        return iter(())

    given: list[tuple[str | None, str | None]] = []
    monkeypatch.setattr(_ray, "classify", classify)
    monkeypatch.setenv("RESNET_CLIENT_URL", "http://there:8000")
    monkeypatch.setenv("RESNET_CLIENT_API_KEY", "secret")

    do(ray=2)
    do(ray=2, url="http://given", api_key="other")
    run(Job((), tmp_path / "other", bundle=tmp_path, ray=2), connect=server(answered))

    assert given == [("http://there:8000", "secret"), ("http://given", "other"), (None, None)]


def test_progress_is_told(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(job_module, "_TICK", 0.01)

    async def predict(content: bytes) -> httpx2.Response:
        await asyncio.sleep(0.03)
        return answered(content)

    def keep(progress: Progress) -> None:
        lines.append(progress.line())

    run(Job((str(pictures),), tmp_path / "rows", max_concurrency=2), on_progress=keep, connect=server(predict))

    assert lines[-1].startswith("10/10 (100.0%)")
    assert all(word in lines[-1] for word in ("/s", "errors 0", "p50 ", "p95 ", "views saved 75%", "in flight 0"))
    assert len(lines) > 3


def test_a_mistake_of_ours_is_not_hidden(do: Do) -> None:
    def predict(content: bytes) -> httpx2.Response:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        do(predict)
    assert caught.group_contains(ZeroDivisionError)
    assert not issubclass(ZeroDivisionError, ResnetError)
