"""Find out on a host with an NVIDIA GPU what of this project holds there, and write it down.

    python export/gpu_check.py                          # the bundle in the repository
    python export/gpu_check.py bundles/mine --report runs/gpu
    make gpu-check

TensorRT has not been run on a GPU yet; this is what tells. Each check stands alone, and each engine has a process of
its own, so that one that fails hides no other: most of CUDA's errors stay until a process ends, and libraries crash.
For each member, of TensorRT and of ONNX Runtime, in each precision: is an engine built, does it give the answers of
ONNX Runtime's FP32 on the CPU, in batches of every size and to whole views, do runs side by side give what they give
one by one, do whole views of extreme sizes run, are batches of changing sizes as quick as those of one, how many
views/s does it do for each batch, can it be closed? What does TensorRT tell of its layers, are all batches captured as
CUDA graphs, and at last, are damaged plans refused? Writes gpu-check.md and gpu-check.json after every engine.

Exit code 0: all held, or there is no GPU to check. 1: something did not hold, or there is a driver and yet no GPU, no
TensorRT or no ONNX Runtime that can use it. 2: a member that was asked for is not there.
"""

import argparse
import importlib.util
import json
import platform
import runpy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.export import engines, gate, golden, quantize
from resnet_ensemble.export.bundle import Bundle, BundleError, Member
from resnet_ensemble.export.engine_store import tolerance
from resnet_ensemble.export.engines import BUCKETS, BackendUnavailable, Engine, EngineLoadError, NotInstalled, Precision
from resnet_ensemble.export.engines.gpu import has_driver
from resnet_ensemble.export.gate import Pictures
from resnet_ensemble.export.gpu_report import DoesNotHold, Report, apart
from resnet_ensemble.export.precisions import float8
from resnet_ensemble.training.views import SCALES, Preprocessing, shorter_side

SHIPPED = Path(__file__).resolve().parents[1] / "bundles" / "cifar10"
SECONDS_PER_TIMING = 1.0
ROUNDS = 20  # of runs side by side
# How much longer runs may take whose sizes change: so much that no noise explains it. A session of ONNX Runtime, which
# plans its convolutions anew, took 110 to 170 ms, and 3 to 16 where they did not (ResNet-50, FP32, NVIDIA H200,
# 2026-11-27).
SLOWEST_IN_TURN = 5


def check_all(
    bundle: Bundle,
    members: list[str],
    precisions: list[Precision],
    folder: Path,
    *,
    apart: Callable[..., Any] = apart,
) -> Report:
    """Every check of TensorRT, and of ONNX Runtime's engine for GPUs, written to a folder.

    Raises BackendUnavailable where neither runs.
    """
    found, missing = _backends()
    if not found:
        raise missing["tensorrt"]
    backend = engines.backend(next(iter(found)))
    device = backend.identity(bundle.manifest.members[0].preprocessing).split(";")[0]
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "bundle": bundle.identity,
        "device": device,
        **{name: engines.backend(name).version() for name in found},
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    report = Report(about)
    for name, why in missing.items():
        report.skip(f"{name}: all", str(why))
    plan = None
    for member in bundle.manifest.members:
        if members and member.name not in members:
            continue
        pictures = gate.from_golden(bundle, member)
        expected = report.run(f"{member.name}: reference", partial(_reference, bundle, member, pictures))
        for name, precision in _variants(found, precisions):
            title = f"{member.name}/{name}/{precision}"
            if precision not in found[name]:
                report.skip(f"{title}: all", f"{device} does not compute in {precision}")
            elif expected is None:
                report.skip(f"{title}: all", "there is no reference")
            else:
                given = title, bundle, member, name, precision, pictures, expected
                built = apart(report, title, _check_engine, *given)
                plan = plan or (built if name == "tensorrt" else None)
            report.write(folder)
    if plan is not None:
        apart(report, "damaged plans", _check_damaged, plan)
    elif "tensorrt" in found:
        report.skip("damaged plans", "nothing was built")
    report.write(folder)
    return report


def _backends() -> tuple[dict[str, tuple[Precision, ...]], dict[str, BackendUnavailable]]:
    """What runs on this host's GPU, and in which precisions; and why what doesn't does not."""
    found, missing = {}, {}
    for name in ("tensorrt", "onnxruntime-cuda"):
        try:
            found[name] = engines.backend(name).precisions()
        except BackendUnavailable as why:
            missing[name] = why
    return found, missing


def _variants(found: dict[str, tuple[Precision, ...]], asked: list[Precision]) -> Iterator[tuple[str, Precision]]:
    """TensorRT in every precision that was asked for, and ONNX Runtime in those of them that it has at all."""
    if "tensorrt" in found:
        yield from (("tensorrt", precision) for precision in asked or found["tensorrt"])
    for precision in found.get("onnxruntime-cuda", ()):
        if not asked or precision in asked:
            yield "onnxruntime-cuda", precision


def _check_engine(
    report: Report,
    title: str,
    bundle: Bundle,
    member: Member,
    name: str,
    precision: Precision,
    pictures: Pictures,
    expected: NDArray[np.float32],
) -> bytes | None:
    """Everything about one engine. What was built, or None."""
    backend = engines.backend(name)
    seen = member.preprocessing
    compiled = report.run(f"{title}: build", lambda: _build(bundle, member, name, precision, pictures))
    if compiled is None:
        report.skip(f"{title}: all else", "nothing was built")
        return None
    engine = report.run(f"{title}: load", lambda: (backend.load(compiled, precision), f"{len(compiled) / 1e6:.1f} MB"))
    if engine is None:
        report.skip(f"{title}: all else", "nothing was loaded")
    else:
        allowed = tolerance(bundle, precision)
        report.run(f"{title}: parity", lambda: _parity(engine, bundle, member, precision, pictures, expected, allowed))
        if name == "tensorrt":
            report.run(f"{title}: layers", lambda: _layers(engine))
            report.run(f"{title}: CUDA graphs", lambda: _captured(engine))
        report.run(f"{title}: side by side", lambda: _side_by_side(engine, seen))
        report.run(f"{title}: whole views", lambda: _whole_views(engine, seen))
        report.run(f"{title}: sizes in turn", lambda: _in_turn(engine, seen))
        rates = report.run(f"{title}: rates", lambda: _rates(engine, seen))
        if rates:
            report.rates[title] = rates
        report.run(f"{title}: close", lambda: _close(engine))
    return compiled


def _reference(bundle: Bundle, member: Member, pictures: Pictures) -> tuple[NDArray[np.float32], str]:
    """ONNX Runtime's FP32 on the CPU, as the bundle describes it."""
    backend = engines.backend(engines.DEFAULT)
    engine = backend.load(backend.compile(bundle.read(member), "fp32", member.preprocessing), "fp32")
    difference = golden.check(engine, bundle, member, allowed=tolerance(bundle, "fp32"))
    return gate.answers(engine, pictures), f"golden probabilities within {difference:.1e}"


def _build(bundle: Bundle, member: Member, name: str, precision: Precision, pictures: Pictures) -> tuple[bytes, str]:
    backend, graph = engines.backend(name), bundle.read(member)
    note = ""
    if precision in engines.CALIBRATED:
        if member.calibration:
            found = quantize.from_bytes(bundle.read(member.calibration))
        else:
            found = quantize.calibrate(graph, gate.calibration_batches(pictures.views), images=pictures.count)
            note = ", calibrated on nothing but the golden pictures"
        graph = quantize.quantized(graph, found, backend.int8_form()) if precision == "int8" else float8(graph, found)
    began = time.monotonic()
    compiled = backend.compile(graph, precision, member.preprocessing)
    return compiled, f"{time.monotonic() - began:.1f} s, every layer typed as was asked for before it is compiled{note}"


def _parity(
    engine: Engine,
    bundle: Bundle,
    member: Member,
    precision: Precision,
    pictures: Pictures,
    expected: NDArray[np.float32],
    allowed: float,
) -> tuple[None, str]:
    finding = gate.examine(engine, pictures, expected)
    difference = golden.check(engine, bundle, member, allowed=float("inf"))
    found = (
        f"{finding.views} views, in batches of {', '.join(map(str, gate.BATCHES))} and whole: top-1 agreement "
        f"{finding.agreement:.1%}, largest difference {finding.difference:.1e}, lowest correlation of a class "
        f"{finding.correlation:.3f}, largest dependence on the batch {finding.unsteadiness:.1e}; golden probabilities "
        f"within {difference:.1e}"
    )
    verdict = finding.verdict(gate.LIMITS[precision])
    if verdict != "passed" or not difference <= allowed:
        raise DoesNotHold(f"{found}; {verdict}; allowed for golden probabilities: {allowed:g}")
    return None, found


def _layers(engine: Engine) -> tuple[None, str]:
    """What TensorRT's inspector says that each layer gives. What fusion made of a graph is TensorRT's business."""
    layers = json.loads(engine.layers())["Layers"]  # type: ignore[attr-defined]
    if not layers or isinstance(layers[0], str):
        raise DoesNotHold("the inspector gives names only, though the plan was built with DETAILED verbosity")
    kinds = Counter(
        str(output.get("Format/Datatype", output.get("Format", "?")))
        for layer in layers
        for output in layer.get("Outputs", [])
    )
    return None, f"{len(layers)} layers; outputs by type: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}"


def _captured(engine: Engine) -> tuple[None, str]:
    captured = engine.captured  # type: ignore[attr-defined]
    if captured != BUCKETS:
        raise DoesNotHold(f"batches of {captured} are captured, of {BUCKETS}")
    return None, f"batches of {', '.join(map(str, captured))}"


def _side_by_side(engine: Engine, seen: Preprocessing) -> tuple[None, str]:
    batches = [_noise(1 + i % 23, seen.crop, seen.crop, seed=i) for i in range(ROUNDS)]
    alone = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine.run, batches))
    difference = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))
    if difference != 0:
        raise DoesNotHold(f"probabilities differ by up to {difference:.1e} between runs side by side and one by one")
    return None, f"{ROUNDS} batches from 4 threads are bit for bit what they are one by one"


def _whole_views(engine: Engine, seen: Preprocessing) -> tuple[None, str]:
    """Sizes of whole views: answers are probabilities, and a mirrored batch of two gives what each gives alone."""
    dense, least, most = (shorter_side(scale, seen) for scale in (None, SCALES[0], SCALES[-1]))
    sizes = [(dense, dense + seen.quantum), (least, 2 * least), (2 * most, most)]
    worst = 0.0
    for height, width in sizes:
        pair = _noise(2, height, width, seed=height)
        together = engine.run(pair)
        alone = np.concatenate([engine.run(pair[:1]), engine.run(pair[1:])])
        if not np.isfinite(together).all() or not np.allclose(together.sum(axis=1), 1, atol=1e-2):
            raise DoesNotHold(f"the answers for {height} x {width} are no probabilities")
        worst = max(worst, float(np.abs(together - alone).max()))
    if worst > 0.05:  # kernels, and with them rounding, may depend on the batch
        raise DoesNotHold(f"a view's probabilities depend on its batch by {worst:.1e}")
    return None, f"{', '.join(f'{h} x {w}' for h, w in sizes)}; in a batch of 2 within {worst:.1e} of alone"


def _in_turn(engine: Engine, seen: Preprocessing) -> tuple[None, str]:
    """Batches come in any size, one after the other: that must not cost more than those of one size."""

    def seconds(views: NDArray[np.uint8]) -> float:
        began = time.perf_counter()
        engine.run(views)
        return time.perf_counter() - began

    batches = [_noise(n, seen.crop, seen.crop) for n in BUCKETS]
    alike = sum(
        min([seconds(views) for _ in range(7)][1:]) for views in batches
    )  # the first has another size before it
    in_turn = sum(map(min, zip(*[list(map(seconds, batches)) for _ in range(7)], strict=True)))
    found = f"{in_turn / alike:.2f} times as long as those of one size"
    if in_turn > SLOWEST_IN_TURN * alike:
        raise DoesNotHold(f"batches of {', '.join(map(str, BUCKETS))} in turn take {found}")
    return None, found


def _rates(engine: Engine, seen: Preprocessing) -> tuple[dict[str, list[float]], str]:
    found = {}
    for n in BUCKETS:
        views = _noise(n, seen.crop, seen.crop)
        found[str(n)] = [_rate(engine, views, threads=threads) for threads in (1, 2)]
    best = max(found, key=lambda n: max(found[n]))
    return found, f"at most {max(found[best]):,.0f} views/s, in batches of {best}"


def _rate(engine: Engine, views: NDArray[np.uint8], *, threads: int) -> float:
    """Views per second of so many runs side by side, by the median duration of a run."""

    def work(_: int) -> list[float]:
        seconds: list[float] = []
        end = time.perf_counter() + SECONDS_PER_TIMING
        while len(seconds) < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            engine.run(views)
            seconds.append(time.perf_counter() - began)
        return seconds

    engine.run(views)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [one for some in pool.map(work, range(threads)) for one in some]
    return round(threads * len(views) / statistics.median(seconds), 1)


def _close(engine: Engine) -> tuple[None, str]:
    engine.close()
    return None, "freed without an error"


def _check_damaged(report: Report, plan: bytes) -> None:
    report.run("damaged plans", lambda: _damaged(engines.backend("tensorrt"), plan))


def _damaged(backend: engines.Backend, plan: bytes) -> tuple[None, str]:
    """Plans that TensorRT must refuse by itself. The store refuses them before, by hash and fingerprint."""
    damaged = {"cut in half": plan[: len(plan) // 2], "of no known kind": bytes(64) + plan[64:], "empty": b""}
    for what, content in damaged.items():
        try:
            engine = backend.load(content, "fp32")
        except EngineLoadError:
            continue
        engine.close()
        raise DoesNotHold(f"a plan that is {what} was taken")
    return None, f"refused: {', '.join(damaged)}"


def _noise(n: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def main() -> None:
    """Parse the command line and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=SHIPPED, help="a bundle's folder (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="MEMBER", help="this member (may be repeated)")
    parser.add_argument("--precision", action="append", default=[], choices=list(gate.LIMITS), help="(may be repeated)")
    parser.add_argument("--report", type=Path, default=Path("build"), metavar="DIR", help="where to (%(default)s)")
    arguments = parser.parse_args()
    try:
        bundle = Bundle.open(arguments.bundle)
        names = [member.name for member in bundle.manifest.members]
        if unknown := set(arguments.only) - set(names):
            parser.error(f"no member is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        report = check_all(bundle, arguments.only, arguments.precision, arguments.report)
    except BackendUnavailable as why:
        if has_driver():
            does_that = "; `make gpu-check` does that" * isinstance(why, NotInstalled)
            sys.exit(f"gpu_check: NVIDIA's driver is here, but {why}{does_that}")
        print(f"no GPU to check: {why}")
        return
    except BundleError as problem:
        sys.exit(f"gpu_check: {problem}")
    print(report.markdown())
    print(f"written to {arguments.report / 'gpu-check.md'} and {arguments.report / 'gpu-check.json'}")
    sys.exit(0 if report.held else 1)


if __name__ == "__main__":
    main()
