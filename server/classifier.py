"""From encoded images to predictions: make views, run, average. Each phase is timed and its times are answered."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export import engine_store, host
from resnet_ensemble.export.bundle import Bundle, BundleError, Member
from resnet_ensemble.export.engines import ON, BackendUnavailable, Engine
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server import costs, ensemble, images, stopping, temperature
from resnet_ensemble.server.admission import Overloaded
from resnet_ensemble.server.calibration import NotCalibrated
from resnet_ensemble.server.costs import Cost
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.jobs import Blocks, Job, Tally
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.revival import close
from resnet_ensemble.server.scheduler import EngineFailure, EngineGone, EngineHung, Scheduler
from resnet_ensemble.server.schemas import Options, Prediction
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.server.strategies import Strategies, Strategy
from resnet_ensemble.training.views import Preprocessing, make_blocks

log = logging.getLogger(__name__)

Opener = Callable[..., Engine]  # as open_engine
Content = bytes | NDArray[np.uint8]  # an encoded image, or the pixels (h, w, 3) of one
_T = TypeVar("_T")
_TOP = 5  # of "top-5 error"
# Engine runs side by side on a GPU: of two members, or of one whose views are copied while others are computed. What
# comes meanwhile fills the next batch. With 16 runs, 933 of a ResNet-50's 1,111 batches had one view, although 8 and 64
# clients asked for one view, ten crops and whole views in turn (NVIDIA H200, 2026-11-27).
_GPU_STREAMS = 2


def open_engine(bundle: Bundle, member: Member, settings: Settings, threads: int = 1) -> Engine:
    """A member's engine, checked. `threads`: of the CPU, for each run. Raises BundleError, BackendUnavailable."""
    if settings.backend == "fake":
        return FakeEngine(len(bundle.manifest.labels))
    return engine_store.open_engine(bundle, member, settings.asked_backend, threads)


@dataclass
class _Prepared:
    """What an image took before the engines, in seconds, its width and height, and whether it was decoded smaller."""

    decode: float = 0.0
    views: float = 0.0
    size: tuple[int, int] = (0, 0)
    drafted: bool = False


@dataclass(frozen=True)
class Evaluated:
    """One image, evaluated: what the engines gave, and its mean.

    - used: views that were run
    - size: width and height of the picture that they are of
    - drafted: whether that is the picture decoded smaller
    - seconds: by stage
    """

    strategy: Strategy
    tally: Tally
    mean: ensemble.Average
    used: int
    size: tuple[int, int]
    drafted: bool
    seconds: dict[str, float]

    def certain(self, top: int = 1) -> bool:
        """Whether the set of the `top` most probable classes is proven to be the one of all planned views.

        Nothing is proven about the views of the whole picture where those of a draft were run.
        """
        if self.drafted:
            return False
        planned = self.strategy.plan.views
        if self.used == planned:
            return True
        return stopping.decided(self.tally.sums.sum(axis=0), stopping.equal_weights(planned), self.used, top)


class Classifier:
    """A bundle, its engines and the scheduler, ready to answer."""

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics, open_with: Opener = open_engine) -> None:
        self.bundle = bundle
        self._metrics = metrics
        self._max_pixels = settings.max_image_pixels
        self._manifest = bundle.manifest
        self.identity = bundle.identity
        self.protocol = settings.protocol or self._manifest.protocol
        self.stop = settings.stop
        members = self._manifest.members
        with ExitStack() as opened:  # on a GPU, what is not closed keeps its memory for as long as the process lives

            def open_one(member: Member, *threads: int) -> Engine:
                engine = open_with(bundle, member, settings, *threads)
                opened.callback(close, engine)
                return engine

            engines = [open_one(member) for member in members]
            self.costs = [
                _cost(bundle, member, engine, settings) for member, engine in zip(members, engines, strict=True)
            ]
            self.strategies = Strategies(bundle, [engine.info for engine in engines], self.costs)
            try:
                self.strategies.of(self.protocol, self.stop)
            except NotCalibrated as error:
                raise BundleError(f"the stop rule can't be {self.stop}: {error}") from None
            sides = [member.preprocessing.crop for member in members]
            on_gpu = [engine.info.backend in ON["cuda"] for engine in engines]
            self.streams = settings.streams or (_GPU_STREAMS if all(on_gpu) else host.cores())
            self.scheduler = Scheduler(
                engines,
                lone=[_lone_engine(member, engine, open_one) for member, engine in zip(members, engines, strict=True)],
                classes=len(self._manifest.labels),
                streams=self.streams,
                batch_pixels=[cost.batch * side**2 for cost, side in zip(self.costs, sides, strict=True)],
                max_wait=settings.max_wait_seconds,
                max_bytes=settings.max_view_bytes,
                decoders=host.cores(),
                shared=not any(on_gpu),
                probes=[np.zeros((1, side, side, 3), np.uint8) for side in sides],
                reopen=lambda member: self._reopened(member, open_with(bundle, members[member], settings)),
                run_limit=settings.engine_timeout_seconds,
                observer=metrics.observer([member.name for member in members]),
            )
            opened.pop_all()

    @property
    def engines(self) -> list[Engine]:
        """Of each member, the one that is used now."""
        return self.scheduler.engines

    async def classify(
        self, contents: Sequence[Content | ApiError], options: Options, deadline: float | None = None
    ) -> list[Prediction | ApiError]:
        """Predictions for images, in order; each fails alone. What is an ApiError already is passed through.

        - deadline: of time.monotonic(); what is not answered then is ApiError("deadline_exceeded")

        Raises ApiError("overloaded") before any work when the predicted wait is above the limit, and
        ApiError("not_calibrated").
        """
        return await self.evaluate(contents, options, deadline, lambda result: self._prediction(result, options))

    async def evaluate(
        self,
        contents: Sequence[Content | ApiError],
        options: Options,
        deadline: float | None,
        finish: Callable[["Evaluated"], _T],
    ) -> list[_T | ApiError]:
        """As `classify`, with what `finish` makes of each image's result."""
        try:
            strategy = self.strategies.of(options.protocol or self.protocol, options.stop or self.stop)
        except NotCalibrated as error:
            raise ApiError("not_calibrated", str(error)) from None
        sound = [content for content in contents if not isinstance(content, ApiError)]
        if deadline is None:
            deadline = time.monotonic() + _NEVER
        try:
            jobs = self.scheduler.admit(strategy.plan, strategy.rule, len(sound), deadline=deadline)
        except Overloaded as error:
            raise refused(error) from None
        following = iter(jobs)
        try:
            answers = [
                _passed(content)
                if isinstance(content, ApiError)
                else self._answer(next(following), strategy, content, deadline, finish)
                for content in contents
            ]
            return await asyncio.gather(*answers) if len(answers) != 1 else [await answers[0]]  # needs no task
        finally:
            for job in jobs:  # the task of a request that is cancelled early may never have reached its own release
                self.scheduler.release(job)

    def check_admission(self, deadline: float) -> None:
        """Raise ApiError("overloaded") if a request that came now would be refused, before its body is read."""
        try:
            self.scheduler.check(deadline)
        except Overloaded as error:
            raise refused(error) from None

    def close(self) -> None:
        """Finish what was submitted and free the engines."""
        self.scheduler.close()
        down = self.scheduler.down
        for member, (engine, lone) in enumerate(zip(self.engines, self.scheduler.lone, strict=True)):
            if member not in down:  # a dead engine is closed already
                close(engine)
                if lone:
                    close(lone)

    def _reopened(self, member: int, engine: Engine) -> Engine:
        """A member has a new engine. It may be of another kind, if engines were built meanwhile.

        Raises BackendUnavailable if it is on a CPU instead of a GPU, or the other way round: then nothing else fits it.
        """
        infos = [known.info for known in self.engines]
        before, now = infos[member].backend, engine.info.backend
        if (before in ON["cuda"]) != (now in ON["cuda"]):
            close(engine)
            raise BackendUnavailable(f"it would run on {now} instead of {before}; restart the server for that")
        infos[member] = engine.info
        self.strategies = Strategies(self.bundle, infos, self.costs)
        return engine

    async def _answer(
        self,
        job: Job,
        strategy: Strategy,
        content: Content,
        deadline: float,
        finish: Callable[["Evaluated"], _T],
    ) -> _T | ApiError:
        began = time.monotonic()
        prepared = _Prepared()
        self.scheduler.decode(job, lambda: self._blocks(content, strategy, prepared))
        try:
            tally = await _end_of(job, deadline)
        except ApiError as error:
            return error.as_value()
        except TimeoutError:
            return ApiError("deadline_exceeded", "the image was not answered in the time that the request has")
        except (EngineHung, EngineGone) as error:
            return unavailable(error)
        except EngineFailure:
            log.exception("engine failure")
            return ApiError("engine_failure", "a model failed on this image, even when it was run alone")
        finally:
            self.scheduler.release(job)
        return finish(self._evaluated(strategy, tally, prepared, began))

    def _blocks(self, content: Content, strategy: Strategy, prepared: _Prepared) -> Blocks:
        """Decode an image and make its views for each member. Raises ApiError."""
        began = time.monotonic()
        if isinstance(content, bytes):
            image = images.decode(content, max_pixels=self._max_pixels, draft=strategy.draft)
            prepared.drafted = strategy.draft is not None and images.is_drafted(content, strategy.draft)
        else:
            image = images.from_pixels(content, max_pixels=self._max_pixels)
        decoded = time.monotonic()
        made: dict[Preprocessing, list[NDArray[np.uint8]]] = {}
        for member in self._manifest.members:
            if member.preprocessing not in made:
                made[member.preprocessing] = make_blocks(image, member.preprocessing, strategy.plan.protocol)
        prepared.decode, prepared.views, prepared.size = decoded - began, time.monotonic() - decoded, image.size
        return [made[member.preprocessing] for member in self._manifest.members]

    def _evaluated(self, strategy: Strategy, tally: Tally, prepared: _Prepared, began: float) -> "Evaluated":
        averaging = time.monotonic()
        mean = ensemble.average(tally.sums, tally.views)
        now = time.monotonic()
        seconds = {
            "decode": prepared.decode,
            "views": prepared.views,
            "queue": tally.queue_seconds,
            "inference": tally.inference_seconds,
            "average": now - averaging,
            "total": now - began,
        }
        used = sum(tally.views.tolist())
        result = Evaluated(strategy, tally, mean, used, prepared.size, prepared.drafted, seconds)
        plan = strategy.plan
        counted = (plan.protocol, strategy.rule.name, used, plan.views, seconds)
        asyncio.get_running_loop().call_soon(self._metrics.answered, *counted)  # when the answer is on its way
        return result

    def _prediction(self, result: "Evaluated", options: Options) -> Prediction:
        # Plain values, validated once: 0.08 ms of the event loop's time; with a model for each part it was 0.31.
        mean, strategy, views = result.mean, result.strategy, result.tally.views.tolist()
        top = ensemble.top(mean.ensemble, options.top_k)
        confidences: list[float | None] = [None] * len(top)
        if strategy.temperature is not None:
            confidences = temperature.apply(mean.ensemble, strategy.temperature)[top].tolist()
        ranked = [
            {**self._class(index, probability), "confidence": confidence}
            for index, probability, confidence in zip(top, mean.ensemble[top].tolist(), confidences, strict=True)
        ]
        votes = mean.members.argmax(axis=1).tolist()  # of equals the lower, as in `top`
        of_votes = mean.members.max(axis=1).tolist()
        members = [
            {**self._class(vote, probability), "member": member.name, "views": seen}
            for member, vote, probability, seen in zip(self._manifest.members, votes, of_votes, views, strict=True)
            if seen
        ]
        entropy, mutual_information = ensemble.uncertainty(mean)
        return Prediction.model_validate(
            {
                **ranked[0],
                "top": ranked,
                "members": members,
                "protocol": strategy.plan.protocol,
                "stop_rule": strategy.rule.name,
                "views_used": result.used,
                "views_planned": strategy.plan.views,
                "certain": result.certain(),
                "certain_top5": result.certain(_TOP),
                "entropy": entropy,
                "mutual_information": mutual_information,
                "abstained": ranked[0]["probability"] < options.abstain_below,
                "bundle": self.identity,
                "timings_ms": {stage: round(1000 * value, 3) for stage, value in result.seconds.items()},
            }
        )

    def _class(self, index: int, probability: float) -> dict[str, Any]:
        return {"label": self._manifest.labels[index], "index": index, "probability": probability}


_NEVER = 7 * 24 * 3600.0  # seconds


async def _end_of(job: Job, deadline: float) -> Tally:
    """As asyncio.wrap_future with asyncio.timeout, for less: what ends this one early goes through `release`.

    `deadline`: of time.monotonic(). Raises TimeoutError.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell(future: Future[Tally]) -> None:
        if future.cancelled():
            ended.cancel()
        elif not ended.done():  # it may have been cancelled meanwhile
            ended.set_result(None)

    def expire() -> None:
        if not ended.done():
            ended.set_exception(TimeoutError())

    # A future keeps its callbacks. One that knew the job, or the future itself, would leave 23 objects an image to the
    # garbage collector, which holds the interpreter lock: while a queue grew at 86 % of the capacity, for 20 to 107 of
    # 500 ms (CIFAR-10 center, one member; two Zen 4 cores, 2026-11-27).
    job.future.add_done_callback(lambda future: loop.call_soon_threadsafe(tell, future))
    timer = loop.call_later(max(0.0, deadline - time.monotonic()), expire)
    try:
        await ended
    finally:
        timer.cancel()
    return job.future.result()


async def _passed(error: ApiError) -> ApiError:
    return error


def refused(error: Overloaded) -> ApiError:
    """What a client is told of a request that is not taken."""
    return ApiError("overloaded", str(error), retry_after=error.retry_after, reason=error.reason)


def unavailable(error: EngineHung | EngineGone) -> ApiError:
    """What a client is told whose image waits for an engine that hangs, or is gone. Another process may answer."""
    if isinstance(error, EngineHung):
        return ApiError("not_ready", "a model does not end what it runs; this process must be restarted", retry_after=1)
    return ApiError("not_ready", "a model's engine died, and could not be opened anew yet", retry_after=1)


def _cost(bundle: Bundle, member: Member, engine: Engine, settings: Settings) -> Cost:
    """What a view costs. The engine is warm afterwards: first runs are slow."""
    side = member.preprocessing.crop
    timings = None if settings.backend == "fake" else costs.recorded(bundle, member, engine.info)
    if timings is None:
        return costs.choose(costs.measure(engine, side, settings.max_batch))
    chosen = costs.choose(costs.up_to(settings.max_batch, timings))
    engine.run(np.zeros((chosen.batch, side, side, 3), np.uint8))
    return chosen


def _lone_engine(member: Member, engine: Engine, open_one: Opener) -> Engine | None:
    """The same on every core, for views that nothing runs beside, warm. None where there is one core, or a GPU."""
    cores, side = host.cores(), member.preprocessing.crop
    if cores == 1 or engine.info.backend not in ON["cpu"]:
        return None
    lone = open_one(member, cores)
    lone.run(np.zeros((1, side, side, 3), np.uint8))
    return lone


def load(settings: Settings, metrics: Metrics, open_with: Opener = open_engine) -> Classifier:
    """Open the bundle, check every engine against its golden images, and warm up. Raises BundleError."""
    return Classifier(Bundle.open(settings.bundle), settings, metrics, open_with)
