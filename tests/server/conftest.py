"""What the tests of connections share."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import direct
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.direct import DirectHttp
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from tests.server.test_process import wait_until_ready

Listen = Callable[..., Any]


@pytest.fixture
def listen(pair: Bundle, monkeypatch: pytest.MonkeyPatch) -> Listen:
    """A context manager: a server in this process, on fake engines. Gives its URL, and what was answered directly."""

    @contextmanager
    def listening(engine: Callable[[int], FakeEngine] = FakeEngine, **settings: Any) -> Iterator[tuple[str, list[int]]]:
        directly: list[int] = []
        unread: list[int] = []

        class Noted(direct.DirectExchange):
            def _write(self, answer: Any) -> None:
                directly.append(answer.status)
                super()._write(answer)
                unread.append(len(self._body))

        monkeypatch.setattr(direct, "DirectExchange", Noted)
        service = Service(
            Settings(**{"bundle": pair.path, **settings}),
            open_with=lambda bundle, *_: engine(len(bundle.manifest.labels)),
        )
        http: Any = partial(DirectHttp, service)
        server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, http=http, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            wait_until_ready(url)
            yield url, directly
            assert not any(unread)  # a connection keeps nothing of what it has refused
        finally:
            server.should_exit = True
            thread.join()

    return listening
