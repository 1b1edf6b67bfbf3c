"""The classifier's life: loaded in the background, ready, closed."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from resnet_ensemble.export.bundle import BundleError
from resnet_ensemble.export.engines import BackendUnavailable
from resnet_ensemble.server.classifier import Classifier, Opener, load, open_engine
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.quota import Memory, Quota
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
        open_with: Opener = open_engine,
        on_fatal: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.quota = Quota(settings.max_images_per_client)
        self.memory = Memory(settings.max_pending_bytes)
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

    def check_ready(self, members: Sequence[int] | None = None) -> None:
        """Raise ApiError("not_ready") unless every engine runs, or those of the given members."""
        down = self._down(members)
        if down:
            raise self._not_ready(down)

    def check_able(self, members: Sequence[int] | None = None) -> None:
        """Raise ApiError("not_ready") if an engine that died could not be opened anew.

        While the first attempt is on its way, requests are accepted and wait for it.
        """
        broken = {member: reason for member, reason in self._down(members).items() if reason}
        if broken:
            raise self._not_ready(broken)

    def _down(self, members: Sequence[int] | None) -> dict[int, str]:
        down = self.classifier.scheduler.down
        return down if members is None else {member: down[member] for member in members if member in down}

    def _not_ready(self, down: dict[int, str]) -> ApiError:
        members = self.classifier.bundle.manifest.members
        named = ", ".join(members[member].name for member in down)
        reasons = "".join(f"; it failed with {reason}" for reason in down.values() if reason)
        return ApiError("not_ready", f"the engine of {named} died and is being opened anew{reasons}", retry_after=1)

    async def start(self) -> None:
        """Begin to load; the server is alive meanwhile, but not ready."""
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        """Finish what was accepted and free the engines."""
        if self._loading:
            await self._loading
        if self._classifier:
            self.metrics.ready.set_function(lambda: 0)
            await asyncio.to_thread(self._classifier.close)
            self._classifier = None

    async def _load(self) -> None:
        try:
            classifier = await asyncio.to_thread(load, self.settings, self.metrics, self._open_with)
        except (BundleError, BackendUnavailable) as error:
            self._failure = str(error)
            log.critical("not serving: %s", error)
            self._on_fatal(str(error))
            return
        self.metrics.bundle.labels(classifier.bundle.identity).set(1)
        for member, engine in zip(classifier.bundle.manifest.members, classifier.engines, strict=True):
            info = engine.info
            self.metrics.engine.labels(member.name, info.backend, info.version, info.precision, info.device).set(1)
        self.metrics.waiting_views.set_function(classifier.scheduler.waiting_views)
        self.metrics.waiting_view_bytes.set_function(lambda: classifier.waiting_view_bytes)
        self.metrics.unfinished_views.set_function(classifier.scheduler.unfinished_views)
        self.metrics.predicted_wait.set_function(classifier.scheduler.predicted_wait)
        self.metrics.ready.set_function(lambda: not classifier.scheduler.down)
        self._classifier = classifier
        log.info("ready: %s", classifier.bundle.identity)
