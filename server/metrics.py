"""What Prometheus is told at /metrics. One registry an application, so that tests can make many."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from resnet_ensemble.server.scheduler import Observer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHORT_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025)
_COUNTS = (1, 2, 4, 8, 10, 16, 20, 32, 40, 60, 64, 128, 256)
STAGES = ("decode", "views", "queue", "inference", "average", "total")

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The server's measurements, under names that begin with resnet_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "resnet_requests", "Answered requests", ["method", "route", "status"], registry=registry
        )
        self.errors = Counter("resnet_errors", "Problems answered, by code", ["code"], registry=registry)
        self.images = Counter(
            "resnet_images",
            "Images with a prediction, answered unless their client has left",
            ["protocol"],
            registry=registry,
        )
        self.rejected = Counter(
            "resnet_rejected",
            "Requests not taken: `wait` and `deadline` for a predicted wait above the server's limit or the request's "
            "own time, `memory` for bodies in progress, `quota` for one client's",
            ["reason"],
            registry=registry,
        )
        for reason in ("wait", "deadline", "memory", "quota"):  # 0 is an answer, too
            self.rejected.labels(reason)
        self.in_flight = Gauge("resnet_images_in_flight", "Images accepted and not answered yet", registry=registry)
        self.stage_seconds = Histogram(
            "resnet_stage_seconds",
            f"Seconds of an image by stage: {', '.join(STAGES)}",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self.views = Histogram(
            "resnet_image_views", "Views evaluated for an image, over all members", buckets=_COUNTS, registry=registry
        )
        self.views_planned = Counter("resnet_views_planned", "Views in the plans of answered images", registry=registry)
        self.views_used = Counter("resnet_views_used", "Views run for images with a prediction", registry=registry)
        self.views_saved = Counter("resnet_views_saved", "Views that no answered image needed", registry=registry)
        self.stops = Counter(
            "resnet_stops",
            "Images with a prediction by stop rule, and whether it stopped `early` or at the `end` of the plan",
            ["rule", "at"],
            registry=registry,
        )
        self.batch_views = Histogram(
            "resnet_batch_views", "Views in one engine run", ["member"], buckets=_COUNTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "resnet_batch_seconds", "Seconds of one engine run", ["member"], buckets=_SECONDS, registry=registry
        )
        self.batch_forming_seconds = Histogram(
            "resnet_batch_forming_seconds", "Seconds to pack a batch", buckets=_SHORT_SECONDS, registry=registry
        )
        self.retried = Counter("resnet_retried_images", "Images of batches that were run again", registry=registry)
        self.restarts = Counter(
            "resnet_engine_restarts", "Engines that died and were opened anew", ["member"], registry=registry
        )
        self.hangs = Counter(
            "resnet_engine_hangs", "Engine runs that did not end in their time", ["member"], registry=registry
        )
        self.reloads = Counter(
            "resnet_reloads", "Bundles loaded while serving: `switched` to, or `refused`", ["result"], registry=registry
        )
        for result in ("switched", "refused"):
            self.reloads.labels(result)
        self.unfinished_views = Gauge("resnet_unfinished_views", "Admitted views without a result", registry=registry)
        self.waiting_views = Gauge("resnet_waiting_views", "Views that wait for a free engine", registry=registry)
        self.waiting_view_bytes = Gauge(
            "resnet_waiting_view_bytes", "Bytes of views of images in progress", registry=registry
        )
        self.predicted_wait = Gauge(
            "resnet_predicted_wait_seconds", "Seconds until all admitted views are done", registry=registry
        )
        self.bundle = Gauge("resnet_bundle_info", "The bundle that is served: 1", ["bundle"], registry=registry)
        self.engine = Gauge(
            "resnet_engine_info",
            "The engine of a member: 1",
            ["member", "backend", "version", "precision", "device"],
            registry=registry,
        )
        self.ready = Gauge("resnet_ready", "1 when /readyz says so", registry=registry)
        # A look-up costs as much as counting.
        self._of_requests = lru_cache(maxsize=256)(self.requests.labels)
        self._of_errors = lru_cache(maxsize=256)(self.errors.labels)
        self._of_rejected = lru_cache(maxsize=256)(self.rejected.labels)

    def count(self, method: str, route: str, status: int) -> None:
        """A request was answered."""
        self._of_requests(method, route, status).inc()

    def count_problem(self, code: str, reason: str | None) -> None:
        """A request, or one of its images, was answered with a problem. `reason`: the limit that refused it."""
        self._of_errors(code).inc()
        if reason:
            self._of_rejected(reason).inc()

    def answered(self, protocol: str, rule: str, used: int, planned: int, seconds: Mapping[str, float]) -> None:
        """An image was answered with a prediction; `seconds` by stage."""
        for stage, value in seconds.items():
            self._stages[stage].observe(value)
        self.images.labels(protocol).inc()
        self.stops.labels(rule, "early" if used < planned else "end").inc()
        self.views.observe(used)
        self.views_planned.inc(planned)
        self.views_used.inc(used)
        self.views_saved.inc(planned - used)

    def observer(self, members: Sequence[str]) -> Observer:
        """What a scheduler of these members tells its measurements to."""
        return _Observer(self, members)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class _Observer(Observer):
    """Looks its labels up once: a label look-up costs as much as an observation."""

    def __init__(self, metrics: Metrics, members: Sequence[str]) -> None:
        self._views = [metrics.batch_views.labels(name) for name in members]
        self._seconds = [metrics.batch_seconds.labels(name) for name in members]
        self._restarts = [metrics.restarts.labels(name) for name in members]
        self._hangs = [metrics.hangs.labels(name) for name in members]
        self._forming = metrics.batch_forming_seconds
        self._retried = metrics.retried

    def batch(self, member: int, views: int, forming: float, seconds: float) -> None:
        self._views[member].observe(views)
        self._seconds[member].observe(seconds)
        self._forming.observe(forming)

    def retried(self, images: int) -> None:
        self._retried.inc(images)

    def restarted(self, member: int) -> None:
        self._restarts[member].inc()

    def hung(self, member: int) -> None:
        self._hangs[member].inc()
