"""From encoded images to predictions: make views, run, average. Each phase is timed and its times are answered."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export import engine_store, host
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import Engine
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import ensemble, images
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.scheduler import EngineFailure, Job, Overloaded, Scheduler, Tally
from resnet_ensemble.server.schemas import ClassProbability, MemberVote, Options, Prediction, Timings
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training.views import PROTOCOLS, Preprocessing, make_views

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prepared:
    """A decoded image's views, uint8 (n, h, w, 3), for each member in order."""

    views: list[NDArray[np.uint8]]
    decode_seconds: float
    views_seconds: float


def open_engines(bundle: Bundle, settings: Settings) -> list[Engine]:
    """One checked engine a member. Raises BundleError, BackendUnavailable."""
    members = bundle.manifest.members
    if settings.backend == "fake":
        return [FakeEngine(len(bundle.manifest.labels)) for _ in members]
    backend = None if settings.backend == "auto" else settings.backend
    return [engine_store.open_engine(bundle, member, backend) for member in members]


class Classifier:
    """A bundle, its engines and the scheduler, ready to answer."""

    def __init__(self, bundle: Bundle, engines: Sequence[Engine], settings: Settings, metrics: Metrics) -> None:
        self.bundle = bundle
        self.engines = engines
        self._metrics = metrics
        self._max_pixels = settings.max_image_pixels
        self._manifest = bundle.manifest
        self._identity = bundle.identity
        self._decoders = ThreadPoolExecutor(host.cores(), thread_name_prefix="decode")
        names = [member.name for member in self._manifest.members]
        batch_views = [metrics.batch_views.labels(name) for name in names]
        batch_seconds = [metrics.batch_seconds.labels(name) for name in names]

        def on_batch(member: int, views: int, seconds: float) -> None:
            batch_views[member].observe(views)
            batch_seconds[member].observe(seconds)

        self.scheduler = Scheduler(
            engines,
            classes=len(self._manifest.labels),
            streams=settings.streams,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_seconds,
            on_batch=on_batch,
        )
        crops = [member.preprocessing.crop for member in self._manifest.members]
        self.scheduler.warm_up([np.zeros((settings.max_batch, side, side, 3), np.uint8) for side in crops])

    async def classify(self, contents: Sequence[bytes | ApiError], options: Options) -> list[Prediction | ApiError]:
        """Answers for encoded images, in order; each fails alone. What is an ApiError already is passed through.

        Raises ApiError("overloaded") before any work when the predicted wait is above the limit.
        """
        protocol = options.protocol or self._manifest.protocol
        sound = [content for content in contents if not isinstance(content, ApiError)]
        jobs = self._admit(protocol, len(sound))
        following = iter(jobs)
        try:
            return await asyncio.gather(
                *(
                    _passed(content)
                    if isinstance(content, ApiError)
                    else self._answer(next(following), content, protocol, options)
                    for content in contents
                )
            )
        finally:
            for job in jobs:  # the task of a request that is cancelled early may never have reached its own release
                self.scheduler.release(job)

    def check_admission(self) -> None:
        """Raise ApiError("overloaded") if a request that came now would be refused, before its body is read."""
        self._admit(self._manifest.protocol, 0)

    def close(self) -> None:
        """Finish what was submitted and free the engines."""
        self.scheduler.close()
        self._decoders.shutdown()
        for engine in self.engines:
            engine.close()

    def _admit(self, protocol: str, count: int) -> list[Job]:
        try:
            return self.scheduler.admit(len(PROTOCOLS[protocol]), count)
        except Overloaded as error:
            raise ApiError("overloaded", str(error), retry_after=error.retry_after) from None

    async def _answer(self, job: Job, content: bytes, protocol: str, options: Options) -> Prediction | ApiError:
        began = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._decoders, self._prepare, content, protocol)
            tally = await asyncio.wrap_future(self.scheduler.submit(job, prepared.views))
        except ApiError as error:
            return error
        except EngineFailure:
            log.exception("engine failure")
            return ApiError("engine_failure", "a model failed on this image, even when it was run alone")
        finally:
            self.scheduler.release(job)
        return self._prediction(tally, prepared, protocol, options, began)

    def _prepare(self, content: bytes, protocol: str) -> _Prepared:
        began = time.monotonic()
        image = images.decode(content, max_pixels=self._max_pixels)
        decoded = time.monotonic()
        made: dict[Preprocessing, NDArray[np.uint8]] = {}
        for member in self._manifest.members:
            if member.preprocessing not in made:
                made[member.preprocessing] = make_views(image, member.preprocessing, protocol)
        views = [made[member.preprocessing] for member in self._manifest.members]
        return _Prepared(views, decoded - began, time.monotonic() - decoded)

    def _prediction(
        self, tally: Tally, prepared: _Prepared, protocol: str, options: Options, began: float
    ) -> Prediction:
        averaging = time.monotonic()
        mean = ensemble.average(tally.sums, tally.views)
        top = [self._class(mean.ensemble, index) for index in ensemble.top(mean.ensemble, options.top_k)]
        members = [
            MemberVote(member=member.name, **self._class(row, ensemble.top(row, 1)[0]).model_dump())
            for member, row in zip(self._manifest.members, mean.members, strict=True)
        ]
        now = time.monotonic()
        seconds = {
            "decode": prepared.decode_seconds,
            "views": prepared.views_seconds,
            "queue": tally.queue_seconds,
            "inference": tally.inference_seconds,
            "average": now - averaging,
            "total": now - began,
        }
        used = int(tally.views.sum())
        for stage, value in seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(value)
        self._metrics.views.observe(used)
        self._metrics.images.labels(protocol).inc()
        return Prediction(
            **top[0].model_dump(),
            top=top,
            members=members,
            protocol=protocol,
            stop_rule="full",
            views_used=used,
            views_planned=len(PROTOCOLS[protocol]) * len(self._manifest.members),
            bundle=self._identity,
            timings_ms=Timings(**{stage: round(1000 * value, 3) for stage, value in seconds.items()}),
        )

    def _class(self, probabilities: NDArray[np.float64], index: int) -> ClassProbability:
        return ClassProbability(
            label=self._manifest.labels[index], index=index, probability=float(probabilities[index])
        )


async def _passed(error: ApiError) -> ApiError:
    return error


Opener = Callable[[Bundle, Settings], Sequence[Engine]]


def load(settings: Settings, metrics: Metrics, open_with: Opener = open_engines) -> Classifier:
    """Open the bundle, check every engine against its golden images, and warm up. Raises BundleError."""
    bundle = Bundle.open(settings.bundle)
    return Classifier(bundle, open_with(bundle, settings), settings, metrics)
