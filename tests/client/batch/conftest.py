"""A batch job's server as a function (no socket, no engine), and a folder of pictures."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from resnet_ensemble.client import AsyncClient
from resnet_ensemble.client.batch import Job, Summary, run
from resnet_ensemble.client.batch._formats import FORMATS
from resnet_ensemble.client.batch._rows import Row

BUNDLE = "cifar10-2-0"
MOST_BYTES = 1_000_000


def answered(content: bytes, **fields: Any) -> httpx2.Response:
    """A prediction whose label is the picture."""
    label = {"label": content.decode(), "index": len(content), "probability": 1.0}
    prediction = {
        **label,
        "top": [label],
        "members": [{"member": "resnet20", **label}],
        "protocol": "10crop",
        "views_used": 5,
        "views_planned": 20,
        "bundle": BUNDLE,
        "timings_ms": {},
    }
    return httpx2.Response(200, json=prediction | fields)


def problem(status: int, code: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"code": code, "detail": f"it is {code}"}, headers=headers)


Predict = Callable[[bytes], Any]


def server(predict: Predict, bundle: str = BUNDLE) -> Callable[[], Any]:
    """What `run` connects to; `predict` gives a response for a picture, or awaits one, or raises."""
    information = {"bundle": bundle, "version": "0", "labels": [], "protocol": "10crop", "protocols": {}, "members": []}
    information |= {"limits": {"max_image_bytes": MOST_BYTES}}

    async def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/info":
            return httpx2.Response(200, json=information)
        response = predict(request.content)
        if not isinstance(response, httpx2.Response):
            response = await response
        assert isinstance(response, httpx2.Response)
        return response

    @asynccontextmanager
    async def connect() -> AsyncIterator[AsyncClient]:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(handle)) as http:
            yield AsyncClient("http://x", max_retries=0, http_client=http)

    return connect


def rows_of(target: Path) -> list[Row]:
    """What somebody reads who knows nothing of ledgers."""
    files = sorted(target.glob("part-*")) if target.is_dir() else [target]
    return [row for file in files for row in FORMATS[file.suffix[1:]]().read(file)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten files in a folder; the fake server tells their contents."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_text(f"picture {number}")
    return folder


@pytest.fixture
def do(tmp_path: Path, pictures: Path) -> Callable[..., Summary]:
    """Run a job over the ten files into `rows`, with a server and with what else is given."""

    def do(predict: Predict = answered, *, bundle: str = BUNDLE, **given: Any) -> Summary:
        job = Job((str(pictures),), tmp_path / "rows", shard_rows=3)
        return run(replace(job, **given), connect=server(predict, bundle))

    return do


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.jpg, b/c.PNG, b/d/e.jpeg, a text file and a hidden one; it is the current folder."""
    for name in ("a.jpg", "b/c.PNG", "b/d/e.jpeg", "b/notes.txt", "b/.hidden.jpg", ".hidden/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
