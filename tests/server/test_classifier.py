"""What the HTTP tests can't see: cancellation at every moment leaves nothing behind."""

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from resnet_ensemble.export import host
from resnet_ensemble.export.bundle import Bundle, BundleError
from resnet_ensemble.export.engines import BackendUnavailable, EngineInfo
from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.jobs import Job
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options, Prediction
from resnet_ensemble.server.settings import Settings
from tests.conftest import until


@pytest.fixture
def classifier() -> Iterator[Classifier]:
    def slow(*_: object) -> FakeEngine:
        return FakeEngine(10, seconds_per_view=0.0002)

    loaded = load(Settings(), Metrics(), slow)
    yield loaded
    loaded.close()


@pytest.mark.parametrize(("cores", "opened"), [(4, 4), (1, 0)])
def test_a_lone_view_runs_on_every_core_of_several(
    monkeypatch: pytest.MonkeyPatch, png: Callable[..., bytes], cores: int, opened: int
) -> None:
    monkeypatch.setattr(host, "cores", lambda: cores)
    made: list[FakeEngine] = []
    closed: list[FakeEngine] = []

    def opener(bundle: object, member: object, settings: object, threads: int = 1) -> FakeEngine:
        engine = FakeEngine(10)
        engine.info = EngineInfo("onnxruntime", "1", "fp32", "cpu", threads)
        monkeypatch.setattr(engine, "close", partial(closed.append, engine))
        made.append(engine)
        return engine

    classifier = load(Settings(max_batch=10, streams=1), Metrics(), opener)
    lone = made[4:]
    assert [(engine.info.threads, engine.batches) for engine in lone] == [(4, [1])] * opened  # they are warm
    asyncio.run(classifier.classify([png(0)], Options(protocol="center")))
    classifier.close()

    # The last of the four members' views has nothing beside it.
    assert any(len(engine.batches) > 1 for engine in lone) == (opened > 0)
    assert {*map(id, closed)} == {*map(id, made)}


@pytest.mark.parametrize(
    ("backend", "asked", "streams", "in_one_batch"),
    [("onnxruntime-cuda", None, 2, True), ("tensorrt", 5, 5, True), ("onnxruntime", None, 3, False)],
)
def test_a_gpu_has_two_streams_and_runs_an_image_s_views_in_one_batch(
    monkeypatch: pytest.MonkeyPatch,
    png: Callable[..., bytes],
    pair: Bundle,
    backend: str,
    asked: int | None,
    streams: int,
    in_one_batch: bool,
) -> None:
    monkeypatch.setattr(host, "cores", lambda: 3)
    made: list[FakeEngine] = []

    def opener(bundle: object, member: object, settings: object, threads: int = 1) -> FakeEngine:
        engine = FakeEngine(10)
        engine.info = EngineInfo(backend, "1", "fp32", "a device", threads)
        made.append(engine)
        return engine

    classifier = load(Settings(bundle=pair.path, max_batch=10, streams=asked), Metrics(), opener)
    assert classifier.streams == streams
    one = made[0]
    one.batches.clear()
    asyncio.run(classifier.classify([png(0)], Options(protocol="10crop")))
    classifier.close()

    assert (one.batches == [10]) == in_one_batch


@pytest.mark.parametrize(
    ("first", "others", "streams"), [("tensorrt", "onnxruntime-cuda", 2), ("tensorrt", "openvino", 3)]
)
def test_where_some_members_run_on_the_cpu_each_core_has_a_stream(
    monkeypatch: pytest.MonkeyPatch, pair: Bundle, first: str, others: str, streams: int
) -> None:
    monkeypatch.setattr(host, "cores", lambda: 3)
    backends = iter([first, *[others] * 20])

    def opener(bundle: object, member: object, settings: object, threads: int = 1) -> FakeEngine:
        engine = FakeEngine(10)
        engine.info = EngineInfo(next(backends), "1", "fp32", "a device", threads)
        return engine

    classifier = load(Settings(bundle=pair.path, max_batch=10), Metrics(), opener)
    classifier.close()
    assert classifier.streams == streams


def test_an_engine_of_a_gpu_is_not_replaced_by_one_of_the_cpu(pair: Bundle, png: Callable[..., bytes]) -> None:
    backends = ["onnxruntime-cuda", "onnxruntime-cuda"]
    made: list[FakeEngine] = []

    def opener(bundle: object, member: object, settings: object, threads: int = 1) -> FakeEngine:
        engine = FakeEngine(10)
        engine.info = EngineInfo((backends or ["onnxruntime"]).pop(), "1", "fp32", "a device", threads)
        made.append(engine)
        return engine

    classifier = load(Settings(bundle=pair.path, max_batch=10), Metrics(), opener)

    with pytest.raises(BackendUnavailable, match="would run on onnxruntime instead of onnxruntime-cuda; restart"):
        classifier._reopened(0, opener(None, None, None))
    backends.append("onnxruntime-cuda")
    assert classifier._reopened(0, opener(None, None, None)) is made[-1]
    classifier.close()


@pytest.mark.parametrize("fault", ["the last engine", "no calibration"])
def test_a_bundle_that_can_t_be_served_keeps_none_of_its_engines(pair: Bundle, fault: str) -> None:
    """On a GPU they would keep their memory, of which each attempt to load it needs as much again."""
    opened: list[FakeEngine] = []
    closed: list[FakeEngine] = []

    def opener(*_: object) -> FakeEngine:
        if fault == "the last engine" and opened:
            raise BackendUnavailable("no room on the device")
        engine = FakeEngine(10)
        engine.close = lambda: closed.append(engine)  # type: ignore[method-assign]
        opened.append(engine)
        return engine

    settings = Settings(bundle=pair.path, stop="calibrated" if fault == "no calibration" else "full")
    with pytest.raises((BackendUnavailable, BundleError)):
        load(settings, Metrics(), opener)

    assert len(opened) == (1 if fault == "the last engine" else 2)
    assert {*map(id, closed)} == {*map(id, opened)}


def test_what_is_an_error_already_keeps_its_place(classifier: Classifier, png: Callable[..., bytes]) -> None:
    refused = ApiError("image_too_large", "too large")

    first, second, third = asyncio.run(classifier.classify([png(0), refused, png(255)], Options()))

    assert isinstance(first, Prediction)
    assert isinstance(third, Prediction)
    assert (first.index, second, third.index) == (0, refused, 9)


@pytest.mark.parametrize("sound", [True, False], ids=["an image", "an image that can't be decoded"])
def test_an_answer_leaves_nothing_to_the_garbage_collector(
    classifier: Classifier, png: Callable[..., bytes], sound: bool
) -> None:
    content, expected = png(0) if sound else b"no image", Prediction if sound else ApiError

    def jobs() -> list[Job]:
        return [job for job in gc.get_objects() if type(job) is Job]  # isinstance would wake what is lazy

    async def ask() -> None:
        (answer,) = await classifier.classify([content], Options())
        assert isinstance(answer, expected)

    gc.disable()  # it would find what is left in a cycle
    try:
        before = jobs()  # of other tests
        asyncio.run(ask())
        until(lambda: len(jobs()) <= len(before))  # the worker that answered has put it away, too
    finally:
        gc.enable()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 10, 50, 500])
def test_a_request_that_is_cancelled_at_any_moment_frees_its_room(
    classifier: Classifier, png: Callable[..., bytes], turns: int
) -> None:
    async def cancel_after_turns() -> None:
        task = asyncio.ensure_future(classifier.classify([png(0)] * 5, Options()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel_after_turns())

    assert classifier.scheduler.unfinished_views() == 0
    assert classifier.scheduler.view_bytes() == 0


def test_hundreds_of_clients_that_leave_at_any_moment_leave_nothing_behind(
    classifier: Classifier, png: Callable[..., bytes]
) -> None:
    chance = random.Random(0)

    async def leave(options: Options) -> None:
        task = asyncio.ensure_future(classifier.classify([png(0)] * chance.randint(1, 3), options))
        await asyncio.sleep(chance.uniform(0, 0.5))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def many() -> Prediction | ApiError:
        stops = ("full", "exact")
        await asyncio.gather(*(leave(Options(stop=stops[i % 2])) for i in range(256)))
        (answer,) = await classifier.classify([png(255)], Options())
        return answer

    answer = asyncio.run(many())

    assert isinstance(answer, Prediction)
    assert answer.label == "truck"
    assert answer.timings_ms.queue < 1000  # nothing of the others was ahead of it
    assert classifier.scheduler.unfinished_views() == classifier.scheduler.waiting_views() == 0
    assert classifier.scheduler.predicted_wait() == 0
    assert classifier.scheduler.view_bytes() == 0


def test_a_single_image_is_answered_before_a_large_request_that_came_first(
    classifier: Classifier, png: Callable[..., bytes]
) -> None:
    async def race() -> list[float]:
        deadline = time.monotonic() + 60
        large = asyncio.ensure_future(classifier.classify([png(0)] * 150, Options(), deadline))
        await asyncio.sleep(0.02)
        answers = [*await classifier.classify([png(0)], Options(), deadline), *await large]
        return [answer.timings_ms.queue for answer in answers if isinstance(answer, Prediction)]

    single, *large = asyncio.run(race())

    assert len(large) == 150
    assert single < 0.5 * max(large)  # behind all of it, it would wait as long as the last
