"""What many tests need: the shipped bundle, and a served application on fake engines."""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from resnet_ensemble.export.bundle import Bundle, write
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no failure; and what CI finds must not depend on luck.
hypothesis.settings.register_profile("repository", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy: beside the bundle itself there may be engines, which answer a bit differently."""
    return Bundle.open(
        Path(shutil.copytree(ROOT / "bundles" / "cifar10", tmp_path_factory.mktemp("shipped") / "cifar10"))
    )


@pytest.fixture(scope="session")
def pair(shipped: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ResNet-20 and ResNet-32 of the shipped bundle, for tests that build all engines or count members and views."""
    manifest = shipped.manifest
    members = manifest.members[:2]
    names = [member.name for member in members]
    golden = tuple(
        picture.model_copy(update={"probabilities": {name: picture.probabilities[name] for name in names}})
        for picture in manifest.golden
    )
    parts = [*members, *(member.calibration for member in members if member.calibration), *golden]
    files = {part.file: shipped.read(part) for part in parts}
    changed = manifest.model_copy(update={"members": members, "golden": golden, "measured": ()})
    return write(tmp_path_factory.mktemp("pair") / "cifar10", changed, files)


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Encode a plain grey image: the fake engine answers by brightness, so the right label is known."""

    def encode(brightness: int = 0, size: tuple[int, int] = (32, 32), format: str = "PNG") -> bytes:
        content = io.BytesIO()
        Image.new("RGB", size, (brightness,) * 3).save(content, format)
        return content.getvalue()

    return encode


def until(condition: Callable[[], Any], instead: Callable[[], str] = str) -> None:
    """Wait for it, for 20 s at most; `instead` then tells what there is in its place."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, instead()
        time.sleep(0.002)


def wait_until_ready(client: TestClient) -> None:
    until(lambda: client.get("/readyz").status_code == 200, lambda: client.get("/readyz").text)


@pytest.fixture
def serve(pair: Bundle) -> Callable[..., Any]:
    """A context manager that serves two members on fake engines, ready, over an in-process client."""

    @contextmanager
    def served(engine: Callable[[int], FakeEngine] = FakeEngine, **settings: Any) -> Iterator[TestClient]:
        service = Service(
            Settings(**{"bundle": pair.path, **settings}),
            open_with=lambda bundle, *_: engine(len(bundle.manifest.labels)),
        )
        with TestClient(create_app(service), raise_server_exceptions=False) as client:
            wait_until_ready(client)
            yield client

    return served


@pytest.fixture
def client(serve: Callable[..., Any]) -> Iterator[TestClient]:
    with serve() as ready:
        yield ready
