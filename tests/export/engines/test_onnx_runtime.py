from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from resnet_ensemble.export import engines
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import BackendUnavailable


@pytest.fixture(scope="module")
def engine(shipped: Bundle) -> engines.Engine:
    implementation = engines.backend("onnxruntime")
    return implementation.load(implementation.compile(shipped.read(shipped.manifest.members[0])))


def views(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def test_answers_are_probabilities(engine: engines.Engine) -> None:
    probabilities = engine.run(views(3))

    assert probabilities.shape == (3, 10)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_an_answer_does_not_depend_on_its_batch(engine: engines.Engine) -> None:
    batch = views(7)

    alone = np.concatenate([engine.run(batch[i : i + 1]) for i in range(7)])

    np.testing.assert_allclose(engine.run(batch), alone, atol=1e-6)


def test_it_runs_from_several_threads_at_once(engine: engines.Engine) -> None:
    expected = [engine.run(views(4, seed)) for seed in range(16)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: engine.run(views(4, seed)), range(16)))

    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_says_what_it_is(engine: engines.Engine) -> None:
    info = engine.info

    assert (info.backend, info.precision, info.device, info.threads) == ("onnxruntime", "fp32", "cpu", 1)
    assert info.version == engines.backend("onnxruntime").version()


def test_a_missing_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._MODULES, "onnxruntime", "not_there")

    with pytest.raises(BackendUnavailable, match=r"pip install 'resnet-ensemble\[cpu\]'"):
        engines.backend("onnxruntime")
