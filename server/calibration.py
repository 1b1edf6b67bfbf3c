"""What server/calibrate.py found for a bundle: the plan and thresholds of `calibrated`, and temperatures.

They are in `stopping.json` beside the bundle's manifest, one entry for each protocol and set of engines, and hold for
the very members and kinds of engines that they were found with: `find` gives nothing else.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resnet_ensemble.export import sealed
from resnet_ensemble.export.bundle import THRESHOLDS, Bundle, BundleInvalid, Protocol, Sha256
from resnet_ensemble.export.engine_store import EngineStore
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.server.plan import Plan, Step, in_order
from resnet_ensemble.server.stopping import Calibrated
from resnet_ensemble.training.files import read_regular, write_atomically
from resnet_ensemble.training.views import Preprocessing, block_sizes

FILE = THRESHOLDS
COMMAND = "python -m resnet_ensemble.server.calibrate"
Share = Annotated[float, Field(ge=0, le=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class NotCalibrated(Exception):
    """There are no thresholds for what is asked; the message says for what there are, and how to find others."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineKind(_Part):
    """A member and how it is run: everything that its answers depend on.

    - sha256: of its graph
    - preprocessing: what its views are made with
    - calibration: identity of what its engine was quantized with, empty for one that was not
    """

    member: str
    sha256: Sha256
    preprocessing: Preprocessing
    backend: str
    precision: str
    calibration: str


class Temperature(_Part):
    """A temperature (server/temperature.py), fitted on so many images.

    What it is worth is measured out of fold: each image at the temperature that the others have.

    - error_before, error_after: expected calibration error over `bins` bins of equal width
    - loss_before, loss_after: mean negative logarithm of the true label's probability
    """

    temperature: float = Field(gt=0)
    images: int = Field(gt=0)
    folds: int = Field(gt=1)
    bins: int = Field(gt=0)
    error_before: Share
    error_after: Share
    loss_before: float = Field(ge=0)
    loss_after: float = Field(ge=0)

    @property
    def helps(self) -> bool:
        """On images that it was not fitted on. The calibration error alone falls by chance, where it is small."""
        return self.error_after < self.error_before and self.loss_after < self.loss_before


class RuleCost(_Part):
    """What a stop rule takes on the images that certify. `cost`: seconds, as a share of those of all views."""

    views: float = Field(ge=0)
    cost: Share


class Draft(_Part):
    """JPEGs are decoded smaller, as server/images.py can, down to a shorter side of so many pixels.

    - images: of those that certify, how many were; disagreements: on how many of these the label was another
    """

    shorter_side: int = Field(gt=0)
    images: int = Field(gt=0)
    disagreements: Count


class Calibration(_Part):
    """Plan and thresholds for one protocol.

    - engines: what they belong to, in the members' order
    - plan: (member, block, view) of every view, in order
    - checkpoints, thresholds: as in stopping.Calibrated; None: never stop there
    - disagreement, confidence: the guarantee of server/thresholds.py
    - draft: what it covers beside the thresholds; None: everything is decoded whole
    - images_searched, images_certified: how many images each part had
    - disagreements: on how many of those that certify the label was another than that of all views of
      the picture decoded whole
    - planned: views of all members
    - seconds: of one view, by member and block, as measured
    - costs: of `calibrated`, and of `exact`, whose plan is the cheapest first
    - errors: top-1 in %, of `full` and `calibrated` on the images that certify, if their labels are known
    - temperatures: by stop rule, if labels are known
    """

    protocol: Protocol
    engines: tuple[EngineKind, ...] = Field(min_length=1)
    plan: tuple[Step, ...] = Field(min_length=1)
    checkpoints: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    disagreement: InnerShare
    confidence: InnerShare
    images: str
    images_searched: int = Field(gt=0)
    images_certified: int = Field(gt=0)
    disagreements: Count
    planned: int = Field(gt=0)
    seconds: tuple[tuple[float, ...], ...]
    costs: dict[str, RuleCost]
    errors: dict[str, float] | None
    temperatures: dict[str, Temperature] | None
    draft: Draft | None = None  # files that were written before there were drafts have none

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.thresholds) != len(self.checkpoints):
            raise ValueError(f"{len(self.checkpoints)} checkpoints have {len(self.thresholds)} thresholds")
        if any(a >= b for a, b in pairwise((0, *self.checkpoints, self.planned))):
            raise ValueError(f"checkpoints must ascend from 1 to less than {self.planned}: {self.checkpoints}")
        sizes = block_sizes(self.protocol)
        views = [Step(m, b, v) for m in range(len(self.engines)) for b, size in enumerate(sizes) for v in range(size)]
        if sorted(self.plan) != views or self.planned != len(views):
            raise ValueError(f"the plan must have each of the {len(views)} views of {self.protocol} once")
        return self

    @property
    def rule(self) -> Calibrated:
        """The stop rule. It is for `ordered_plan` only."""
        pairs = zip(self.checkpoints, self.thresholds, strict=True)
        kept = [(checkpoint, threshold) for checkpoint, threshold in pairs if threshold is not None]
        return Calibrated(tuple(checkpoint for checkpoint, _ in kept), tuple(threshold for _, threshold in kept))

    @property
    def draft_side(self) -> int | None:
        """`draft` of images.decode, for this rule only."""
        return self.draft.shorter_side if self.draft else None

    def temperature(self, rule: str) -> float | None:
        """That of a stop rule, if it helped on images that it was not fitted on."""
        known = (self.temperatures or {}).get(rule)
        return known.temperature if known and known.helps else None

    def ordered_plan(self, seconds: Sequence[Sequence[float]]) -> Plan:
        """The plan. `seconds`: of one view, for each member and block, on the host that runs it."""
        return in_order(self.protocol, seconds, self.plan)


class Calibrations(_Part):
    """The content of stopping.json."""

    format: Literal[1] = 1
    calibrations: tuple[Calibration, ...] = ()


def kinds(bundle: Bundle, engines: Sequence[EngineInfo]) -> tuple[EngineKind, ...]:
    """The engines of a bundle's members, in their order."""
    store = EngineStore(bundle)
    found = []
    for member, info in zip(bundle.manifest.members, engines, strict=True):
        record = store.current(member, info.backend, info.precision)
        found.append(
            EngineKind(
                member=member.name,
                sha256=member.sha256,
                preprocessing=member.preprocessing,
                backend=info.backend,
                precision=info.precision,
                calibration=record.calibration if record else "",
            )
        )
    return tuple(found)


def read(bundle: Bundle) -> tuple[Calibration, ...]:
    """Everything in the bundle's stopping.json; nothing if there is none. Raises BundleInvalid for a damaged one."""
    file = f"{FILE} of {bundle.manifest.name}"
    remedy = f"remove it and run {COMMAND}"
    try:
        return Calibrations.model_validate(sealed.loads(read_regular(bundle.path / FILE))).calibrations
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise BundleInvalid(f"{file} can't be read ({error.strerror})") from None
    except sealed.SealBroken:
        raise BundleInvalid(f"{file} is not what was written (SHA-256); {remedy}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise BundleInvalid(f"{file} is not valid: {where}: {first['msg']}; {remedy}") from None
    except ValueError as error:
        raise BundleInvalid(f"{file} is not JSON ({error}); {remedy}") from None


def find(bundle: Bundle, protocol: str, engines: Sequence[EngineInfo]) -> Calibration:
    """What was found for this protocol with these weights and engines. Raises NotCalibrated, BundleInvalid."""
    wanted = kinds(bundle, engines)
    candidates = [known for known in read(bundle) if known.protocol == protocol]
    for known in candidates:
        if known.engines == wanted:
            return known
    command = f"run {COMMAND} BUNDLE IMAGES --protocol {protocol}"
    file = f"{FILE} of {bundle.manifest.name}"  # without its path: clients are told
    if not candidates:
        raise NotCalibrated(f"no thresholds for {protocol} in {file}: {command}")
    others = "; ".join(_difference(wanted, known.engines) for known in candidates)
    raise NotCalibrated(f"the thresholds for {protocol} in {file} are of others: {others}; {command}")


def write(bundle: Bundle, found: Calibration) -> None:
    """Add to the bundle's stopping.json, atomically; what was found for the same protocol and engines is replaced.

    Thresholds of other weights are dropped. Raises BundleInvalid if the file that is there is damaged.
    """
    hashes = [member.sha256 for member in bundle.manifest.members]
    kept = [
        known
        for known in read(bundle)
        if [engine.sha256 for engine in known.engines] == hashes
        and (known.protocol, known.engines) != (found.protocol, found.engines)
    ]
    content = Calibrations(calibrations=(*kept, found))
    write_atomically(bundle.path / FILE, sealed.dumps(content.model_dump(mode="json")))


def _difference(wanted: Sequence[EngineKind], known: Sequence[EngineKind]) -> str:
    names, known_names = ([engine.member for engine in engines] for engines in (wanted, known))
    if names != known_names:
        return f"of members {', '.join(known_names)}, not {', '.join(names)}"
    parts = []
    for ours, theirs in zip(wanted, known, strict=True):
        if ours.sha256 != theirs.sha256:
            parts.append(f"{ours.member} has other weights")
        if (ours.backend, ours.precision) != (theirs.backend, theirs.precision):
            parts.append(
                f"{ours.member} ran on {theirs.backend} {theirs.precision}, not {ours.backend} {ours.precision}"
            )
        elif ours.calibration != theirs.calibration:
            parts.append(f"the {ours.precision} of {ours.member} was calibrated on other pictures")
        if ours.preprocessing != theirs.preprocessing:
            parts.append(f"{ours.member} saw other views")
    return ", ".join(parts)
