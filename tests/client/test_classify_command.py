"""The command resnet-classify."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_ensemble.client.__main__ import main, table
from resnet_ensemble.client.batch import COLUMNS

Png = Callable[..., bytes]


@pytest.fixture
def pictures(tmp_path: Path, png: Png, fake_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """white.png, black.png and text.jpg in the current folder, and the server in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNET_CLIENT_URL", fake_server)
    Path("white.png").write_bytes(png(255))
    Path("black.png").write_bytes(png(0))
    Path("text.jpg").write_text("hello")


def test_where_there_is_no_terminal_it_prints_the_rows_of_a_job(
    pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["white.png", "text.jpg", "no.jpg", "black.png", "--top-k", "2", "--protocol", "flip"]) == 3

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["truck", None, None, "airplane"]
    assert [row["error_code"] for row in rows] == [None, "unsupported_image_format", "unreadable", None]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert (rows[0]["protocol"], len(rows[0]["top"])) == ("flip", 2)


def test_in_a_terminal_it_prints_a_table(
    pictures: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    assert main(["white.png", "--protocol", "center"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "white.png"
    assert lines[1].split()[0] == "truck"
    assert "█" in lines[1]
    assert "members: resnet20 truck" in lines[6]
    assert "center, 4 of 4 views" in lines[7]

    assert main(["white.png", "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_a_failure_is_a_line_of_the_table() -> None:
    row = dict.fromkeys(COLUMNS) | {"path": "x.jpg", "error_code": "corrupt_image", "error_message": "cut off"}

    assert table(row) == "x.jpg\n  corrupt_image: cut off\n"


def test_a_picture_comes_from_the_standard_input(
    pictures: None, png: Png, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(png(255))))

    assert main(["-"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "truck"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://localhost:9"], "no connection to"),
        (["--url", "localhost:9"], "is no URL of a server"),
        (["--protocol", "11crop"], "invalid_option"),
        (["--stop", "calibrated", "--protocol", "center"], "not_calibrated"),
    ],
)
def test_what_is_the_same_for_every_picture_is_told_once(
    pictures: None, waits: list[float], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["white.png", "black.png", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("resnet-classify: ")
    assert message in captured.err
    assert captured.out == ""


def test_who_reads_only_the_first_lines_gets_no_traceback(pictures: None) -> None:
    read, write = os.pipe()
    os.close(read)

    done = subprocess.run(
        [sys.executable, "-m", "resnet_ensemble.client", "white.png", "black.png"],
        stdout=write, stderr=subprocess.PIPE, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(write)

    assert (done.returncode, done.stderr) == (1, b"")
