"""The classifier's life: loaded in the background, ready, followed by another one, drained, closed."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resnet_ensemble.export import host
from resnet_ensemble.export.bundle import BundleError
from resnet_ensemble.export.engines import ON, BackendUnavailable
from resnet_ensemble.server.awake import Awake
from resnet_ensemble.server.classifier import Classifier, Opener, load, open_engine
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.quota import Memory, Quota
from resnet_ensemble.server.settings import Settings

log = logging.getLogger(__name__)

_EXPECTED = (BundleError, BackendUnavailable, OSError)  # their messages say what to do


class Service:
    """Everything that the routes need.

    - open_with: how engines are opened; tests give their own
    - on_fatal: called once with a message if the bundle can't be served
    - on_loaded: called whenever a bundle was loaded, on the thread that loads, before it is served
    """

    def __init__(
        self,
        settings: Settings,
        *,
        open_with: Opener = open_engine,
        on_fatal: Callable[[str], None] = lambda message: None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.quota = Quota(settings.max_images_per_client)
        self.memory = Memory(settings.max_pending_bytes)
        # One JSON body at a time: parsed ones take up to twenty times the memory of their bytes, and while one is
        # parsed no other can be.
        self.parsing = asyncio.Lock()
        self.awake = Awake()
        self.metrics.in_flight.set_function(lambda: self.quota.images)
        self._open_with = open_with
        self._on_fatal = on_fatal
        self._on_loaded = on_loaded
        self._path = settings.bundle
        self._serving: _Serving | None = None
        self._failure: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loading: asyncio.Task[None] | None = None
        self._switching: asyncio.Task[Classifier] | None = None
        self._signalled: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    @property
    def classifier(self) -> Classifier:
        """The classifier that is served now. Raises ApiError("not_ready")."""
        return self._current().classifier

    @contextmanager
    def lease(self) -> Iterator[Classifier]:
        """The classifier that is served now; it is not closed before the block ends. Raises ApiError("not_ready")."""
        serving = self._current()
        serving.leases += 1
        serving.idle.clear()
        try:
            yield serving.classifier
        finally:
            serving.leases -= 1
            if not serving.leases:
                serving.idle.set()

    def _current(self) -> "_Serving":
        if self._serving is None:
            raise ApiError("not_ready", self._failure or "the models are being loaded and checked", retry_after=1)
        return self._serving

    def check_ready(self, members: Sequence[int] | None = None) -> None:
        """Raise ApiError("not_ready") unless every engine runs, or those of the given members."""
        down = self._down(members)
        if down:
            raise self._not_ready(down)

    def check_alive(self) -> None:
        """Raise ApiError("not_ready") if only another process can help: see `_is_lost`."""
        if self._serving and (lost := {m: why for m, why in self._down(None).items() if self._is_lost(m, why)}):
            raise self._not_ready(lost)

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

    def _is_lost(self, member: int, reason: str) -> bool:
        """Whether an engine that is down hangs, or was on a GPU and can't be opened anew.

        Most of CUDA's errors stay until the process ends: those of the group "this leaves the process in an
        inconsistent state" among cudaError's descriptions.
        """
        classifier = self.classifier
        on_gpu = classifier.engines[member].info.backend in ON["cuda"]
        return member in classifier.scheduler.hung or (on_gpu and bool(reason))

    def _not_ready(self, down: dict[int, str]) -> ApiError:
        members = self.classifier.bundle.manifest.members
        hung = self.classifier.scheduler.hung
        told = []
        for member, reason in down.items():
            if member in hung:
                happens = "hangs: this process must be restarted"
            elif self._is_lost(member, reason):
                happens = f"died; a GPU may be lost until this process is restarted, opening it failed with {reason}"
            else:
                happens = "died and is being opened anew" + (f"; it failed with {reason}" if reason else "")
            told.append(f"the engine of {members[member].name} {happens}")
        return ApiError("not_ready", "; ".join(told), retry_after=1)

    async def start(self) -> None:
        """Begin to load; the server is alive meanwhile, but not ready."""
        self._loop = asyncio.get_running_loop()
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        """Finish what was accepted and free the engines."""
        if self._loading:
            await self._loading
        if self._signalled:
            await self._signalled
        if self._switching:
            await asyncio.wait([self._switching])  # who asked for it was told what came of it, or is gone
        if self._draining:
            await self._draining
        if self._serving:
            self.metrics.ready.set_function(lambda: 0)
            await asyncio.to_thread(self._serving.classifier.close)
            self._serving = None
        self.awake.close()

    async def reload(self, named: str | None = None) -> tuple[str, str]:
        """Load a bundle beside the one that is served, warm up, check it, and switch to it; the old one is drained.

        - named: a bundle in the folder of the setting `reload_from`; None: the path that is served

        Returns the identities of the new bundle and of the old one. Raises ApiError: "not_ready",
        "reload_in_progress", "bundle_not_allowed", or "bundle_refused", after which the old one goes on.
        """
        old = self._current()
        for task, doing in (
            (self._switching, "another bundle is being loaded"),
            (self._draining, "the bundle before still answers requests"),
        ):
            if task and not task.done():
                raise ApiError("reload_in_progress", f"{doing}; at most two are held at a time", retry_after=1)
        path = self._path if named is None else self._allowed(named)
        self._switching = asyncio.create_task(self._switch(old, path))
        # At the drain limit a request is cancelled, and what it had begun must not be left alone with its engines.
        classifier = await asyncio.shield(self._switching)
        return classifier.bundle.identity, old.classifier.bundle.identity

    async def _switch(self, old: "_Serving", path: Path) -> Classifier:
        try:
            settings = self.settings.model_copy(update={"bundle": path})
            classifier = await asyncio.to_thread(self._loaded, settings)
        except Exception as error:  # whatever a new bundle does must not harm the old one
            reason = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
            log.exception("still serving %s, not %s", old.classifier.bundle.identity, path)
            self.metrics.reloads.labels("refused").inc()
            raise ApiError("bundle_refused", reason) from None
        self._path = path
        self._serve(classifier)
        self._draining = asyncio.create_task(_drain(old))
        self.metrics.reloads.labels("switched").inc()
        return classifier

    def reload_soon(self) -> None:
        """`reload`, asked for by a signal: from any thread, and what comes of it is only logged."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._begin_reload)

    def _begin_reload(self) -> None:
        self._signalled = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        try:
            await self.reload()
        except ApiError as error:
            log.warning("not reloaded: %s", error)

    def _allowed(self, named: str) -> Path:
        root = self.settings.reload_from
        if root is None:
            raise ApiError("bundle_not_allowed", "bundles are named only where RESNET_RELOAD_FROM is set")
        path = root / named
        # Not Path.resolve(): before Python 3.13 it raises RuntimeError of a link that leads to itself.
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise ApiError("bundle_not_allowed", f"{named!r} is not in the folder of RESNET_RELOAD_FROM")
        return path

    def _fail(self, message: str) -> None:
        self._failure = message
        log.critical("not serving: %s", message)
        self._on_fatal(message)

    async def _load(self) -> None:
        try:
            classifier = await asyncio.to_thread(self._loaded, self.settings)
        except _EXPECTED as error:
            self._fail(str(error))
            return
        except Exception as error:  # a server that can never be ready must not wait for ever
            log.exception("not serving")
            self._fail(f"the models can't be loaded ({error!r}); the log has more")
            return
        self._serve(classifier)

    def _loaded(self, settings: Settings) -> Classifier:
        """On a thread that gives way to the event loop, as all threads do that engines start."""
        host.give_way()
        classifier = load(settings, self.metrics, self._open_with)
        self._on_loaded()
        return classifier

    def measurements(self) -> bytes:
        """What Prometheus is told."""
        if self._serving:
            self.metrics.engine.clear()  # one that died may have been followed by one of another kind
            classifier = self.classifier
            for member, engine in zip(classifier.bundle.manifest.members, classifier.engines, strict=True):
                info = engine.info
                self.metrics.engine.labels(member.name, info.backend, info.version, info.precision, info.device).set(1)
        return self.metrics.render()

    def _serve(self, classifier: Classifier) -> None:
        """From now on this one answers, and the metrics tell of it."""
        measured = self.metrics
        measured.bundle.clear()
        measured.bundle.labels(classifier.bundle.identity).set(1)
        measured.waiting_views.set_function(classifier.scheduler.waiting_views)
        measured.waiting_view_bytes.set_function(classifier.scheduler.view_bytes)
        measured.unfinished_views.set_function(classifier.scheduler.unfinished_views)
        measured.predicted_wait.set_function(classifier.scheduler.predicted_wait)
        measured.ready.set_function(lambda: not classifier.scheduler.down)
        self._serving = _Serving(classifier)
        log.info("ready: %s", classifier.bundle.identity)


class _Serving:
    """A classifier, and how many requests use it."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.leases = 0
        self.idle = asyncio.Event()
        self.idle.set()


async def _drain(serving: _Serving) -> None:
    """Close a classifier once its last request is answered."""
    await serving.idle.wait()
    await asyncio.to_thread(serving.classifier.close)
    log.info("drained: %s", serving.classifier.bundle.identity)
