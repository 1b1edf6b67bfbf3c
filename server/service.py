"""The classifier's life: loaded in the background, ready, closed."""

import asyncio
import logging
from collections.abc import Callable

from resnet_ensemble.export.bundle import BundleError
from resnet_ensemble.export.engines import BackendUnavailable
from resnet_ensemble.server.classifier import Classifier, Opener, load, open_engines
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.quota import Quota
from resnet_ensemble.server.settings import Settings

log = logging.getLogger(__name__)


class Service:
    """Everything that the routes need.

    - open_with: how engines are opened; tests give their own
    - on_fatal: called once with a message if the bundle can't be served
    """

    def __init__(
        self,
        settings: Settings,
        *,
        open_with: Opener = open_engines,
        on_fatal: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.quota = Quota(settings.max_images_per_client)
        self._open_with = open_with
        self._on_fatal = on_fatal
        self._classifier: Classifier | None = None
        self._failure: str | None = None
        self._loading: asyncio.Task[None] | None = None

    @property
    def classifier(self) -> Classifier:
        """The loaded classifier. Raises ApiError("not_ready")."""
        if self._classifier is None:
            raise ApiError("not_ready", self._failure or "the models are being loaded and checked", retry_after=1)
        return self._classifier

    async def start(self) -> None:
        """Begin to load; the server is alive meanwhile, but not ready."""
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        """Finish what was accepted and free the engines."""
        if self._loading:
            await self._loading
        if self._classifier:
            self.metrics.ready.set(0)
            await asyncio.to_thread(self._classifier.close)
            self._classifier = None

    def _fail(self, message: str) -> None:
        self._failure = message
        log.critical("not serving: %s", message)
        self._on_fatal(message)

    async def _load(self) -> None:
        try:
            classifier = await asyncio.to_thread(load, self.settings, self.metrics, self._open_with)
        except (BundleError, BackendUnavailable, OSError) as error:
            self._fail(str(error))
            return
        except Exception as error:  # a server that can never be ready must not wait for ever
            log.exception("not serving")
            self._fail(f"the models can't be loaded ({error!r}); the log has more")
            return
        self.metrics.unfinished_views.set_function(classifier.scheduler.unfinished_views)
        self.metrics.predicted_wait.set_function(classifier.scheduler.predicted_wait)
        self.metrics.ready.set(1)
        self._classifier = classifier
        log.info("ready: %s", classifier.bundle.identity)
