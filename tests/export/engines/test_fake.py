import numpy as np
import pytest

from resnet_ensemble.export.engines.fake import FakeEngine


@pytest.mark.parametrize(("brightness", "index"), [(0, 0), (255, 9), (142, 5)])
def test_the_answer_can_be_read_off_the_brightness(brightness: int, index: int) -> None:
    probabilities = FakeEngine(10).run(np.full((2, 8, 8, 3), brightness, np.uint8))

    assert probabilities.argmax(axis=1).tolist() == [index, index]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_it_can_be_told_to_fail() -> None:
    engine = FakeEngine(10, fails=lambda view: bool(view.max() == 255))

    engine.run(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(RuntimeError, match="told to fail"):
        engine.run(np.full((1, 4, 4, 3), 255, np.uint8))


def test_it_remembers_its_batches() -> None:
    engine = FakeEngine(10)

    engine.run(np.zeros((3, 4, 4, 3), np.uint8))

    assert engine.batches == [3]


def test_a_killed_one_answers_nothing_any_more() -> None:
    engine = FakeEngine(10)
    engine.kill()

    with pytest.raises(RuntimeError, match="was killed"):
        engine.run(np.zeros((1, 4, 4, 3), np.uint8))
