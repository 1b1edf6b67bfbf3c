"""What the HTTP tests can't see: cancellation at every moment leaves nothing behind."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from resnet_ensemble.export.engines.fake import FakeEngine
from resnet_ensemble.server.classifier import Classifier, load
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.metrics import Metrics
from resnet_ensemble.server.schemas import Options, Prediction
from resnet_ensemble.server.settings import Settings


@pytest.fixture
def classifier() -> Iterator[Classifier]:
    def slow(*_: object) -> FakeEngine:
        return FakeEngine(10, seconds_per_view=0.0002)

    loaded = load(Settings(), Metrics(), slow)
    yield loaded
    loaded.close()


def test_what_is_an_error_already_keeps_its_place(classifier: Classifier, png: Callable[..., bytes]) -> None:
    refused = ApiError("image_too_large", "too large")

    first, second, third = asyncio.run(classifier.classify([png(0), refused, png(255)], Options()))

    assert isinstance(first, Prediction)
    assert isinstance(third, Prediction)
    assert (first.index, second, third.index) == (0, refused, 9)


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
    assert classifier.waiting_view_bytes == 0
