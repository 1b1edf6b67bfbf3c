"""What Prometheus is told at /metrics. One registry an application, so that tests can make many."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 10, 16, 20, 32, 40, 60, 64, 128, 256)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The server's measurements, under names that begin with resnet_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "resnet_requests", "Answered requests", ["method", "route", "status"], registry=registry
        )
        self.errors = Counter("resnet_errors", "Problems answered, by code", ["code"], registry=registry)
        self.images = Counter("resnet_images", "Images answered with a prediction", ["protocol"], registry=registry)
        self.in_flight = Gauge("resnet_images_in_flight", "Images accepted and not answered yet", registry=registry)
        self.stage_seconds = Histogram(
            "resnet_stage_seconds",
            "Seconds of an image by stage: decode, views, queue, inference, average, total",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.views = Histogram(
            "resnet_image_views", "Views evaluated for an image, over all members", buckets=_COUNTS, registry=registry
        )
        self.batch_views = Histogram(
            "resnet_batch_views", "Views in one engine run", ["member"], buckets=_COUNTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "resnet_batch_seconds", "Seconds of one engine run", ["member"], buckets=_SECONDS, registry=registry
        )
        self.unfinished_views = Gauge("resnet_unfinished_views", "Admitted views without a result", registry=registry)
        self.predicted_wait = Gauge(
            "resnet_predicted_wait_seconds", "Seconds until all admitted views are done", registry=registry
        )
        self.ready = Gauge("resnet_ready", "1 when /readyz says so", registry=registry)

    @contextmanager
    def hold_in_flight(self, images: int) -> Iterator[None]:
        """Count images as in flight while the block runs."""
        self.in_flight.inc(images)
        try:
            yield
        finally:
            self.in_flight.dec(images)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
