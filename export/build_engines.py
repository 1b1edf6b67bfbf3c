"""Build, verify and time every engine that this host can run for a bundle, and choose the fastest that passes.

    python export/build_engines.py                                   # the bundle in the repository
    python export/build_engines.py PATH/TO/BUNDLE --calibration PHOTOS
    python export/build_engines.py bundles/pair --weights resnet18.pth resnet50.pth --calibration PHOTOS
    python export/build_engines.py bundles/v2 --ensemble torchvision-v2 --calibration PHOTOS
    python export/build_engines.py --triton models
    python export/build_engines.py --dry-run

Hashes are verified first. ONNX Runtime's FP32 on the CPU must give the bundle's golden probabilities; the others are
compared with it. FP32 must give the golden probabilities everywhere, and every precision must pass the gate: agreement
with that FP32 on the pictures of --calibration or, without it, on the bundle's golden ones; with one folder of pictures
a label, the error too. INT8 and FP8 are calibrated on the same pictures, or were at export. Of several members, the
fastest engines are chosen that together have FP32's label on 98 % of the pictures, over ten crops (150 at most).

What was found is written to BUNDLE.engines/ beside the bundle, where the server looks for it. A second run reuses what
is still valid. Where there is an NVIDIA GPU, its engines are built, too (--device): ONNX Runtime's, as was done on an
H200, and TensorRT's, which have not been built on a GPU yet.

Exit code 0: every member that was asked for has an engine that passed. 1: one has none, or something stopped it; the
message says what. 2: the options contradict each other.

With --weights or --ensemble the bundle is made first, as by export/to_onnx.py, unless it is there already. With
--triton a model repository for Triton is written last: every member, and the ensemble that averages them. A member is
the TensorRT plan that was chosen for it, for a Triton with the same TensorRT on the same kind of GPU, or else its ONNX.
"""

import argparse
import hashlib
import importlib.util
import runpy
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

if importlib.util.find_spec("resnet_ensemble") is None:
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "environment.py"))

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from resnet_ensemble.export import build_report, declared, engines, gate, golden, quantize, triton_repository
from resnet_ensemble.export.build_report import Row
from resnet_ensemble.export.bundle import Bundle, BundleError, Member
from resnet_ensemble.export.choice import choose
from resnet_ensemble.export.declared import WeightsError
from resnet_ensemble.export.engine_store import TIMED_BATCHES, EngineStore, Record, Stored, fingerprint, tolerance
from resnet_ensemble.export.engines import (
    CALIBRATED,
    Device,
    EngineBuildError,
    EngineLoadError,
    EngineRunError,
    Precision,
)
from resnet_ensemble.export.engines.gpu import has_driver
from resnet_ensemble.export.gate import CalibrationError, Pictures
from resnet_ensemble.export.precisions import float8
from resnet_ensemble.export.quantize import Calibration
from resnet_ensemble.export.triton_repository import Plan

SHIPPED = Path(__file__).resolve().parents[1] / "bundles" / "cifar10"
SECONDS_PER_TIMING = 0.4


@dataclass
class Workshop:
    """One member, and what its engines have in common. The expensive parts are made when they are first needed."""

    bundle: Bundle
    member: Member
    pictures: Pictures
    own_calibration: bool
    _reference: NDArray[np.float32] | None = None
    _calibration: Calibration | None = None

    @property
    def calibration_identity(self) -> str | None:
        """What INT8 would be calibrated on: the given pictures, or the bundle's own file; None without either."""
        if self.own_calibration:
            return self.member.calibration.sha256 if self.member.calibration else None
        return self.pictures.identity

    def calibration(self) -> Calibration:
        """Ranges and integer weights."""
        if self._calibration is None:
            if self.own_calibration:
                assert self.member.calibration is not None
                self._calibration = quantize.from_bytes(self.bundle.read(self.member.calibration))
            else:
                self._calibration = quantize.calibrate(
                    self.bundle.read(self.member),
                    gate.calibration_batches(self.pictures.calibration),
                    images=self.pictures.count,
                )
        return self._calibration

    def reference(self) -> NDArray[np.float32]:
        """FP32's answers for the gate's views. Raises GoldenMismatch if it is not what the bundle describes."""
        if self._reference is None:
            backend = engines.backend(engines.DEFAULT)
            graph = self.bundle.read(self.member)
            engine = backend.load(backend.compile(graph, "fp32", self.member.preprocessing), "fp32")
            golden.check(engine, self.bundle, self.member, allowed=tolerance(self.bundle, "fp32"))
            self._reference = gate.answers(engine, self.pictures)
            engine.close()
        return self._reference

    def build(self, backend: str, precision: Precision) -> tuple[Record, bytes]:
        """Compile, check and time one engine. Raises GoldenMismatch as `reference` does."""
        implementation = engines.backend(backend)
        graph = self.bundle.read(self.member)
        if precision == "int8":
            graph = quantize.quantized(graph, self.calibration(), implementation.int8_form())
        elif precision == "fp8":
            graph = float8(graph, self.calibration())
        began = time.monotonic()
        compiled = implementation.compile(graph, precision, self.member.preprocessing)
        engine = implementation.load(compiled, precision)
        seconds = time.monotonic() - began
        calibration = (self.calibration_identity or "") if precision in CALIBRATED else ""
        try:
            finding = gate.examine(engine, self.pictures, self.reference())
            difference, _ = golden.difference(engine, self.bundle, self.member)
            verdict = finding.verdict(gate.LIMITS[precision])
            if verdict == "passed" and difference > tolerance(self.bundle, precision):
                verdict = f"a golden probability differs by {difference:.2g}"
            record = Record(
                member=self.member.name,
                backend=backend,
                version=engine.info.version,
                precision=precision,
                calibration=calibration,
                fingerprint=fingerprint(self.bundle, self.member, backend, precision, calibration),
                file=f"{self.member.name}-{backend}-{precision}.engine",
                sha256=hashlib.sha256(compiled).hexdigest(),
                size=len(compiled),
                build_seconds=round(seconds, 3),
                golden_difference=difference,
                gate_pictures=self.pictures.identity,
                gate_views=finding.views,
                agreement=finding.agreement,
                difference=finding.difference,
                correlation=finding.correlation,
                unsteadiness=finding.unsteadiness,
                error=finding.error,
                reference_error=finding.reference_error,
                views_per_second={str(n): rate(engine, self.member.preprocessing.crop, n) for n in TIMED_BATCHES},
                verdict=verdict,
            )
        finally:
            engine.close()
        return record, compiled


def rate(engine: engines.Engine, side: int, batch: int) -> float:
    """Views per second of one run at a time: the median over runs, after a warm-up."""
    views = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    engine.run(views)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS_PER_TIMING
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        engine.run(views)
        seconds.append(time.perf_counter() - began)
    return round(batch / statistics.median(seconds), 1)


def build_all(
    bundle: Bundle,
    *,
    calibration: Path | None = None,
    members: list[str] | None = None,
    precisions: list[Precision] | None = None,
    device: Device = "auto",
    dry_run: bool = False,
) -> list[Row]:
    """Every engine of this host, built or reused. Raises BundleError, CalibrationError, BackendUnavailable."""
    bundle.verify()
    store = EngineStore(bundle)
    variants = _variants(device, precisions)
    rows: list[Row] = []
    pictures = _pictures(bundle, calibration)
    with nullcontext() if dry_run else store.building():
        for member in bundle.manifest.members:
            if members is not None and member.name not in members:
                continue
            workshop = Workshop(bundle, member, pictures[member.name], own_calibration=calibration is None)
            for backend, precision in tqdm(variants, member.name, unit="engine", leave=False, disable=None):
                rows.append(_row(store, workshop, backend, precision, dry_run=dry_run))
        if len(bundle.manifest.members) > 1 and not dry_run:
            choose(store, pictures, given=calibration is not None)
    return rows


def _variants(device: Device, precisions: list[Precision] | None) -> list[tuple[str, Precision]]:
    found = engines.available(device)
    if device == "auto" and has_driver():
        for reason in engines.unavailable("cuda"):
            print(f"build_engines: not built for the GPU: {reason}", file=sys.stderr)
    wanted = [(backend, precision) for backend, precision in found if precisions is None or precision in precisions]
    if not wanted:
        known = ", ".join(f"{backend} {precision}" for backend, precision in found)
        raise engines.BackendUnavailable(f"nothing here computes in {', '.join(precisions or ())}; there are {known}")
    return wanted


def _pictures(bundle: Bundle, calibration: Path | None) -> dict[str, Pictures]:
    """What each member's engines are compared on, by its name."""
    members = bundle.manifest.members
    if calibration is None:
        return {member.name: gate.from_golden(bundle, member) for member in members}
    # Members often see pictures in the same way, and reading them takes long.
    seen = {
        preprocessing: gate.from_folder(calibration, preprocessing, bundle.manifest.labels)
        for preprocessing in dict.fromkeys(member.preprocessing for member in members)
    }
    return {member.name: seen[member.preprocessing] for member in members}


def _row(store: EngineStore, workshop: Workshop, backend: str, precision: Precision, *, dry_run: bool) -> Row:
    member = workshop.member
    wanted = workshop.calibration_identity if precision in CALIBRATED else ""
    stored = store.find(member, backend, precision, wanted)
    if stored and (workshop.own_calibration or stored.record.gate_pictures == workshop.pictures.identity):
        return Row(member.name, backend, precision, stored.record, "reused")
    if wanted is None:
        return Row(member.name, backend, precision, None, "needs pictures: --calibration DIR")
    if dry_run:
        return Row(member.name, backend, precision, None, "would be built")
    try:
        record, compiled = workshop.build(backend, precision)
    except (EngineBuildError, EngineLoadError, EngineRunError) as error:  # the other engines may still be good
        engines.check_not_lost(engines.backend(backend), f"{member.name}/{backend}/{precision}", error)
        return Row(member.name, backend, precision, None, f"failed: {error}")
    store.add(record, compiled)
    return Row(member.name, backend, precision, record, "built")


def plans(bundle: Bundle, best: list[Stored | None]) -> dict[str, Plan]:
    """TensorRT's plans of the members whose fastest engine one is: Triton runs those as they are."""
    return {
        member.name: Plan(stored.content, max_batch=engines.BUCKETS[-1])
        for member, stored in zip(bundle.manifest.members, best, strict=True)
        if stored and stored.record.backend == "tensorrt"
    }


def _bundle(arguments: argparse.Namespace) -> Bundle:
    if not arguments.weights and not arguments.ensemble:
        return Bundle.open(arguments.bundle)
    if arguments.bundle.resolve() == SHIPPED:
        sys.exit("build_engines: name the bundle's folder, so that the one in the repository stays as it is")
    try:
        chosen = declared.choose(arguments.weights, arguments.ensemble, arguments.labels)
        if made := declared.made_before(arguments.bundle, chosen):
            return made
        declared.check_replaceable(arguments.bundle, chosen)
    except (WeightsError, OSError) as problem:
        sys.exit(f"build_engines: {problem}")
    if arguments.dry_run:
        note = f"{arguments.bundle} would be made first, and then its engines"
        print(build_report.unmade(note) if arguments.json else note)
        sys.exit(0)
    from resnet_ensemble.export import to_onnx  # noqa: PLC0415  # torch: seconds, which a second run has no use for

    try:
        return to_onnx.export_declared(chosen, arguments.bundle)
    except to_onnx.PROBLEMS as problem:
        sys.exit(f"build_engines: {problem}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=SHIPPED, help="a bundle's folder (default: %(default)s)"
    )
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="pictures, for INT8, FP8 and the gate")
    parser.add_argument("--only", action="append", metavar="MEMBER", help="this member (may be repeated)")
    parser.add_argument("--precision", action="append", choices=get_args(Precision), help="(may be repeated)")
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="auto",
        help="build what runs on it; auto: all that this host has (default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be built or reused")
    parser.add_argument("--json", action="store_true", help="print what the table says, and what is chosen, as JSON")
    parser.add_argument("--weights", nargs="+", default=[], metavar="WEIGHTS", help="make the bundle of these first")
    parser.add_argument(
        "--ensemble", metavar="NAME", help="make the bundle of a declared ensemble, or a TOML file, first"
    )
    parser.add_argument("--triton", type=Path, metavar="DIR", help="write a Triton model repository, too")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line, if the weights have none")
    arguments = parser.parse_args()
    if arguments.weights and arguments.ensemble:
        parser.error("give --weights or --ensemble, not both")
    if arguments.labels and not arguments.weights:
        parser.error("--labels goes with --weights; an ensemble's file names its own")
    if arguments.triton and arguments.dry_run:
        parser.error("--dry-run writes nothing, so it can't be combined with --triton")
    return arguments


def main() -> None:
    """Parse the command line and build."""
    arguments = _arguments()
    try:
        if arguments.triton:
            triton_repository.check_replaceable(arguments.triton)  # now, since building may take long
        bundle = _bundle(arguments)
        asked = _asked(bundle, arguments.only)
        rows = build_all(
            bundle,
            calibration=arguments.calibration,
            members=asked,
            precisions=arguments.precision,
            device=arguments.device,
            dry_run=arguments.dry_run,
        )
        store = EngineStore(bundle)
        best = [store.best(member) for member in bundle.manifest.members]
        if arguments.triton:
            triton_repository.write(bundle, arguments.triton, plans(bundle, best))
    except (BundleError, CalibrationError, engines.BackendUnavailable) as problem:
        sys.exit(f"build_engines: {problem}")
    except OSError as problem:
        sys.exit(f"build_engines: {problem}; nothing is half-written: run it again when this is solved")
    except KeyboardInterrupt:
        sys.exit(130)  # as of a command that SIGINT ends
    chosen = {stored.record.member: stored.record.key for stored in best if stored}
    if arguments.json:
        print(build_report.as_json(bundle, rows, chosen, store.choice()))
    else:
        print(build_report.table(rows, set(chosen.values())))
        choice = store.choice()
        if choice and not any(row.note == "would be built" for row in rows):
            print(build_report.told(choice))
        print(build_report.summary(bundle, rows, store, dry_run=arguments.dry_run))
        if arguments.triton:
            print(f"Triton model repository: {arguments.triton}")
    without = [name for name in asked if name not in chosen]
    if without and not arguments.dry_run:
        sys.exit(f"build_engines: no engine of {', '.join(without)} passed, so FP32 is compiled when a server starts")


def _asked(bundle: Bundle, only: list[str] | None) -> list[str]:
    names = [member.name for member in bundle.manifest.members]
    if unknown := set(only or ()) - set(names):
        sys.exit(f"build_engines: no member named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return only or names


if __name__ == "__main__":
    main()
