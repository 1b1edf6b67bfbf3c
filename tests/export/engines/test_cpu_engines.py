"""What every CPU engine must do, in every precision that this host has."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from resnet_ensemble.export import engines, host, quantize
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import BackendUnavailable, EngineRunError, Precision, onnx_runtime
from tests.conftest import until

VARIANTS = engines.available("cpu")


def views(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def threads_of_ours() -> set[int]:
    return {int(folder.name) for folder in Path("/proc/self/task").iterdir()}


@pytest.fixture(scope="module")
def calibration(shipped: Bundle) -> quantize.Calibration:
    return quantize.calibrate(shipped.read(shipped.manifest.members[0]), [views(16, s) for s in range(4)], images=64)


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def engine(request: pytest.FixtureRequest, shipped: Bundle, calibration: quantize.Calibration) -> engines.Engine:
    name, precision = request.param
    member = shipped.manifest.members[0]
    backend, graph = engines.backend(name), shipped.read(member)
    if precision == "int8":
        graph = quantize.quantized(graph, calibration, backend.int8_form())
    return backend.load(backend.compile(graph, precision, member.preprocessing), precision)


def test_this_host_has_fp32_and_int8_of_both_backends() -> None:
    assert {("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")} <= {*VARIANTS}


def test_answers_are_probabilities(engine: engines.Engine) -> None:
    probabilities = engine.run(views(3))

    assert probabilities.shape == (3, 10)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-2 if engine.info.precision == "bf16" else 1e-5)


def test_an_answer_does_not_depend_on_its_batch(engine: engines.Engine) -> None:
    batch = views(7)

    alone = np.concatenate([engine.run(batch[i : i + 1]) for i in range(7)])

    atol = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.02}[engine.info.precision]
    np.testing.assert_allclose(engine.run(batch), alone, atol=atol)


def test_an_answer_is_not_changed_by_the_next_run(engine: engines.Engine) -> None:
    first = engine.run(views(4, 1))
    kept = first.copy()

    engine.run(views(4, 2))

    np.testing.assert_array_equal(first, kept)


def test_what_can_t_be_run_is_an_error_of_the_run(engine: engines.Engine) -> None:
    with pytest.raises(EngineRunError, match=r"(ONNX Runtime|OpenVINO) [0-9.]+ failed: "):
        engine.run(np.zeros((2, 32, 32, 4), np.uint8))


def test_it_runs_from_several_threads_at_once(engine: engines.Engine) -> None:
    expected = [engine.run(views(4, seed)) for seed in range(16)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: engine.run(views(4, seed)), range(16)))

    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(len(host.keepable()) < 2, reason="this host has no two CPUs that threads may be kept to")
def test_the_threads_of_one_run_of_onnx_runtime_are_on_cpus_of_their_own(shipped: Bundle) -> None:
    first, second, *_ = host.keepable()
    member = shipped.manifest.members[0]
    compiled = onnx_runtime.compile(shipped.read(member), "fp32", member.preprocessing)
    one, ours, before = onnx_runtime.load(compiled, "fp32"), os.sched_getaffinity(0), threads_of_ours()

    two = onnx_runtime.load(compiled, "fp32", threads=2)
    started = threads_of_ours() - before

    until(lambda: [os.sched_getaffinity(thread) for thread in started] == [{second}])  # they do it themselves
    np.testing.assert_array_equal(two.run(views(3)), one.run(views(3)))
    with patch.object(two, "_session") as session:
        session.run.side_effect = lambda *_: [os.sched_getaffinity(0)]
        assert two.run(views(1)) == {first}
    assert os.sched_getaffinity(0) == ours


def test_it_says_what_it_is(engine: engines.Engine) -> None:
    info = engine.info

    assert (info.backend, info.precision) in VARIANTS
    assert (info.device, info.threads) == ("cpu", 1)
    assert info.version == engines.backend(info.backend).version()
    assert info.version[0].isdigit()


@pytest.mark.parametrize("name", engines.BACKENDS)
def test_a_missing_backend_says_what_to_install_and_is_not_available(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines._MODULES, name, "not_there")

    with pytest.raises(BackendUnavailable, match=r"pip install 'resnet-ensemble\[\w+\]'"):
        engines.backend(name)
    assert name not in {backend for backend, _ in engines.available()}


@pytest.mark.parametrize("name", engines.ON["cpu"])
def test_what_the_library_refuses_is_an_error_of_ours(name: str, shipped: Bundle) -> None:
    implementation = engines.backend(name)

    with pytest.raises(engines.EngineBuildError, match="can't compile the graph"):
        implementation.compile(b"no graph", "fp32", shipped.manifest.members[0].preprocessing)
    with pytest.raises(engines.EngineLoadError, match="does not take the engine"):
        implementation.load(b"no engine", "fp32")


def test_an_unknown_precision_is_no_variant() -> None:
    precisions: set[Precision] = {precision for _, precision in VARIANTS}

    assert precisions <= {"fp32", "bf16", "int8"}


@pytest.mark.parametrize("backend", engines.ON["cpu"])
def test_an_engine_s_library_sends_nothing_to_its_maker(tmp_path: Path, shipped: Bundle, backend: str) -> None:
    """ONNX Runtime and OpenVINO keep what they will send, and whom it is of, in the home folder."""
    script = f"""
from pathlib import Path
from resnet_ensemble.export import engines
from resnet_ensemble.export.bundle import Bundle
bundle = Bundle.open(Path({str(shipped.path)!r}))
member, backend = bundle.manifest.members[0], engines.backend({backend!r})
backend.load(backend.compile(bundle.read(member), "fp32", member.preprocessing), "fp32").close()
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)

    assert list(tmp_path.rglob("*")) == []
