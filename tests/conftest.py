"""What many tests need: the shipped bundle, and a served application on fake engines."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from resnet_ensemble.export.bundle import Bundle
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
def shipped() -> Bundle:
    return Bundle.open(ROOT / "bundles" / "cifar10")


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Encode a plain grey image: the fake engine answers by brightness, so the right label is known."""

    def encode(brightness: int = 0, size: tuple[int, int] = (32, 32), format: str = "PNG") -> bytes:
        content = io.BytesIO()
        Image.new("RGB", size, (brightness,) * 3).save(content, format)
        return content.getvalue()

    return encode


def wait_until_ready(client: TestClient) -> None:
    deadline = time.monotonic() + 20
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline, client.get("/readyz").text
        time.sleep(0.01)


@pytest.fixture
def serve() -> Callable[..., Any]:
    """A context manager that serves the shipped bundle's labels on fake engines, ready, over an in-process client."""

    @contextmanager
    def served(engine: Callable[[int], FakeEngine] = FakeEngine, **settings: Any) -> Iterator[TestClient]:
        service = Service(
            Settings(**settings),
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
