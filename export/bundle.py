"""The contract between training and serving: a directory with everything that serving needs.

    bundle.json      the manifest below: members, labels, preprocessing, measured errors, golden images, provenance
    members/*.onnx   one graph a member: uint8 (n, h, w, 3) in, float32 (n, classes) probabilities out
    members/*.calibration.safetensors   what its INT8 engines are made with, if it was calibrated
    golden/*.png     pictures whose probabilities the manifest records
    stopping.json    thresholds and temperatures that were found for it later, if any (server/calibration.py)

Every other file is named in the manifest with its SHA-256 and checked before it is used; the manifest and stopping.json
have theirs in their first lines. No torch, and no ONNX library.

    BundleError
    ├── BundleInvalid   the manifest is missing, of another format, or contradicts itself
    └── BundleDamaged   a file is missing or is not the one that the manifest describes
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from resnet_ensemble.export import sealed
from resnet_ensemble.training.files import read_regular, write_together
from resnet_ensemble.training.views import ALL_PROTOCOLS, PROTOCOLS, Preprocessing

FORMAT = 1
# ONNX's StringStringEntryProto with the key "location", as a tensor has whose values are in another file; its length
# may be written longer than it needs to be.
_ELSEWHERE = re.compile(rb"\n(?:\x08|\x88\x80*\x00)location")
MANIFEST = "bundle.json"
THRESHOLDS = "stopping.json"


class BundleError(Exception):
    """A bundle can't be used; the message says why and what to do."""


class BundleInvalid(BundleError):
    """The manifest is missing, of another format, or contradicts itself."""


class BundleDamaged(BundleError):
    """A file is missing or is not the one that the manifest describes."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name != str(path):
        raise ValueError(f"{name!r} must be a plain path inside the bundle")
    return name


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"no protocol named {name!r}; there are {', '.join(known)}")
        return name

    return check


RelativePath = Annotated[str, AfterValidator(_inside)]
Protocol = Annotated[str, AfterValidator(_one_of(ALL_PROTOCOLS))]
CropProtocol = Annotated[str, AfterValidator(_one_of(PROTOCOLS))]
# Files and folders are named after members and bundles: none is hidden, and none is `..`.
NAME = "^[a-zA-Z0-9][a-zA-Z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]
VERSION = "^[!-~]+$"  # it goes into headers and paths
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Part):
    """A measured top-1 error in %, never without its protocol and number of images."""

    dataset: str
    split: str
    protocol: Protocol
    images: int = Field(gt=0)
    top1_error: float = Field(ge=0, le=100)
    measured_by: str


class CalibrationFile(_Part):
    """Ranges of activations and integer weights (export/quantize.py), found on so many images of a data set."""

    file: RelativePath
    sha256: Sha256
    dataset: str
    images: int = Field(gt=0)


class Member(_Part):
    """One network of the ensemble.

    - multiply_adds: of one crop, as the paper counts them; None in bundles that were exported before it was recorded
    """

    name: Name
    file: RelativePath
    sha256: Sha256
    parameters: int = Field(gt=0)
    preprocessing: Preprocessing
    recipe: dict[str, str | bool | int | float | list[float]]
    measured: tuple[Measured, ...]
    calibration: CalibrationFile | None = None
    multiply_adds: int | None = Field(default=None, gt=0)


class Golden(_Part):
    """A picture and the probabilities that each member gives it: the mean over the views of the golden protocol."""

    file: RelativePath
    sha256: Sha256
    probabilities: dict[str, tuple[float, ...]]


class Manifest(_Part):
    """The content of bundle.json."""

    format: Literal[1]
    name: Name
    version: str = Field(pattern=VERSION)
    protocol: Protocol
    labels: tuple[str, ...] = Field(min_length=2)
    members: tuple[Member, ...] = Field(min_length=1)
    golden_protocol: CropProtocol
    golden_tolerance: float = Field(gt=0, le=0.1)
    golden: tuple[Golden, ...] = Field(min_length=1)
    measured: tuple[Measured, ...]
    provenance: dict[str, str]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"two members have the same name: {names}")
        for golden in self.golden:
            if golden.probabilities.keys() != set(names):
                raise ValueError(f"{golden.file} must have probabilities of the members {names}")
            if any(len(row) != len(self.labels) for row in golden.probabilities.values()):
                raise ValueError(f"{golden.file} must have {len(self.labels)} probabilities a member, one a label")
        return self


class Bundle:
    """A bundle on disk. Its files are read through it, so that nothing unverified is used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and validate the manifest. Raises BundleInvalid."""
        file = path / MANIFEST
        try:
            text = read_regular(file)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleInvalid(
                f"no {MANIFEST} in {path}; make a bundle with: python export/to_onnx.py --help"
            ) from None
        except OSError as error:
            raise BundleInvalid(f"{file} can't be read ({error.strerror})") from None
        try:
            content = sealed.loads(text)
        except sealed.SealBroken:
            raise BundleInvalid(
                f"{file} is not as it was written (SHA-256); {_remedy(path)}, or, if the change is "
                f'meant, delete its line "{sealed.KEY}"'
            ) from None
        except ValueError as error:
            raise BundleInvalid(f"{file} is not JSON ({error}); {_remedy(path)}") from None
        if isinstance(content, dict) and content.get("format") != FORMAT:
            found = content.get("format")
            raise BundleInvalid(f"{file} has bundle format {found!r}; this version reads {FORMAT}: export it again")
        try:
            return cls(path, Manifest.model_validate(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            raise BundleInvalid(f"{file} is not valid: {where}: {first['msg']}; {_remedy(path)}") from None

    def read(self, part: Member | CalibrationFile | Golden) -> bytes:
        """The bytes of a member's graph or calibration, or of a golden picture, checked.

        Raises BundleDamaged; BundleInvalid for a graph that would read other files, of whatever folder.
        """
        file = self.path / part.file
        try:
            content = read_regular(file)
        except FileNotFoundError:
            raise BundleDamaged(f"{file} is missing; {_remedy(self.path)}") from None
        except OSError as error:
            raise BundleDamaged(f"{file} can't be read ({error.strerror}); {_remedy(self.path)}") from None
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise BundleDamaged(f"{file} is not the file that {MANIFEST} describes (SHA-256); {_remedy(self.path)}")
        if isinstance(part, Member) and _ELSEWHERE.search(content):
            raise BundleInvalid(f"{file} has weights in another file, without a hash; export it again, as one file")
        return content

    def verify(self) -> None:
        """Read every file that the manifest names. Raises BundleDamaged."""
        for member in self.manifest.members:
            self.read(member)
            if member.calibration:
                self.read(member.calibration)
        for picture in self.manifest.golden:
            self.read(picture)

    @property
    def identity(self) -> str:
        """Name, version and the first digits of a hash: of all that answers are computed with, and of their labels."""
        members = [[member.sha256, asdict(member.preprocessing)] for member in self.manifest.members]
        whole = json.dumps([members, self.manifest.labels], sort_keys=True).encode()
        return f"{self.manifest.name}-{self.manifest.version}-{hashlib.sha256(whole).hexdigest()[:8]}"


def write(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write the files and the manifest, which is replaced last and never names a file that is not there yet.

    A full disk leaves a bundle that was there before as it was. Otherwise nothing of it stays but what the new one
    names, too, and the thresholds if they are of the same members.
    """
    try:
        before = Bundle.open(path).manifest
    except BundleInvalid:  # there is none, or nobody knows what is of it
        before = manifest
    contents = {path / name: content for name, content in files.items()}
    write_together(contents | {path / MANIFEST: sealed.dumps(manifest.model_dump(mode="json"))})
    stale = _named(before) - _named(manifest)
    if [member.sha256 for member in before.members] != [member.sha256 for member in manifest.members]:
        stale.add(THRESHOLDS)
    for name in stale:
        (path / name).unlink(missing_ok=True)
    return Bundle(path, manifest)


def _named(manifest: Manifest) -> set[str]:
    parts: list[Member | CalibrationFile | Golden] = [*manifest.members, *manifest.golden]
    parts += [member.calibration for member in manifest.members if member.calibration]
    return {part.file for part in parts}


def _remedy(path: Path) -> str:
    return f"restore it (git checkout -- {path}) or export it again (export/to_onnx.py)"
