"""Where pictures are classified: by a server, or by the same application in this process, without a socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from resnet_ensemble.client._client import AsyncClient
from resnet_ensemble.client.batch._extras import MissingExtraError

LONGEST_WAIT = 3600.0  # seconds in the queue: nobody waits for an answer here, so nothing is refused or given up


class BundleUnusableError(Exception):
    """The bundle can't be served; the message says why."""


@asynccontextmanager
async def connect(
    url: str | None, bundle: Path | None, *, api_key: str | None, seconds: float, connections: int
) -> AsyncIterator[AsyncClient]:
    """A client of the server at `url`, or of a bundle in this process. It does not retry: the job does.

    Raises BundleUnusableError and MissingExtraError.
    """
    if bundle is not None:
        async with _in_process(bundle) as http:
            yield AsyncClient("http://in-process", max_retries=0, http_client=http)
        return
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx2.AsyncClient(timeout=httpx2.Timeout(seconds, connect=5.0), limits=limits) as http:
        yield AsyncClient(url, api_key=api_key, max_retries=0, http_client=http)


@asynccontextmanager
async def _in_process(bundle: Path) -> AsyncIterator[httpx2.AsyncClient]:
    try:  # here only: the SDK is installed without the server, and does without it
        from resnet_ensemble.server.app import create_app  # noqa: PLC0415
        from resnet_ensemble.server.service import Service  # noqa: PLC0415
        from resnet_ensemble.server.settings import Settings  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--bundle classifies in this process and needs {error.name}, which is not installed: "
            "pip install 'resnet-ensemble[server,cpu]'"
        ) from None
    failures: list[str] = []
    settings = Settings(bundle=bundle, max_wait_seconds=LONGEST_WAIT, timeout_seconds=LONGEST_WAIT)
    app = create_app(Service(settings, on_fatal=failures.append))
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://in-process", timeout=None
        ) as http:  # no socket, so nothing can be lost
            while (await http.get("/readyz")).status_code != httpx2.codes.OK:
                if failures:
                    raise BundleUnusableError(failures[0])
                await asyncio.sleep(0.02)
            yield http
