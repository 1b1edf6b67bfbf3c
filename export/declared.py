"""Ensembles declared in small TOML files: those in export/ensembles/, and anyone's own.

    protocol = "10crop"                              # what the bundle runs by default
    labels = "labels.txt"                            # one a line; not needed for ImageNet, CIFAR and our checkpoints
    members = [
      { weights = "resnet50:IMAGENET1K_V2" },        # export/weights.py says what may stand here
      { weights = "mine.pth", name = "mine", resize = 232, crop = 224, stride = "v1" },
      { weights = "plain20.pth", shortcut = "plain" },  # without projections, a state dict is taken for option A's
    ]

Paths are relative to the current folder.

No torch here: whether a bundle is made of just that already is told without it.
"""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resnet_ensemble.export.bundle import MANIFEST, Bundle, BundleError, Name, Protocol
from resnet_ensemble.training.files import read_regular

FOLDER = Path(__file__).parent / "ensembles"


class WeightsError(Exception):
    """The weights can't be found or read, or are not those of a network that we know."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeclaredMember(_Part):
    """Weights and, where they don't say it themselves, how they want to see a picture."""

    weights: str
    name: Name | None = None
    stride: Literal["v1", "v1.5"] = "v1.5"  # training.model's Stride
    shortcut: Literal["A", "plain"] = "A"  # of training.model's Shortcut, those that the tensors don't tell
    resize: int | None = None
    crop: int | None = None
    padding: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class Declared(_Part):
    """An ensemble before its weights are read."""

    protocol: Protocol = "10crop"
    labels: Path | None = None
    members: tuple[DeclaredMember, ...] = Field(min_length=1)

    def identity(self) -> str:
        """A hash of the declaration and of the files that it names: the same as long as the bundle would be."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        for named in [member.weights for member in self.members] + [str(self.labels)] * bool(self.labels):
            path = Path(named) / "checkpoint.safetensors" if Path(named).is_dir() else Path(named)
            if path.is_file():
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def choose(weights: Sequence[str], ensemble: str | None, labels: Path | None) -> Declared:
    """The ensemble of that name, or else of the weights. Raises WeightsError."""
    if ensemble:
        return load(ensemble)
    return Declared(labels=labels, members=tuple(DeclaredMember(weights=text) for text in weights))


def made_before(path: Path, chosen: Declared) -> Bundle | None:
    """The bundle that is there, if it is made of just that and whole: a damaged one is made again."""
    try:
        bundle = Bundle.open(path)
        bundle.verify()
    except BundleError:
        return None
    return bundle if bundle.manifest.provenance.get("weights") == chosen.identity() else None


def check_replaceable(path: Path, chosen: Declared) -> None:
    """Raise WeightsError if the bundle that is there is made of anything else: nobody said that it may go."""
    try:
        bundle = Bundle.open(path)
    except BundleError as problem:
        if (path / MANIFEST).exists() and _made_of(path) != chosen.identity():
            raise WeightsError(
                f"{path} holds a bundle that can't be used ({problem}); give another folder, or remove it"
            ) from None
        return
    if bundle.manifest.provenance.get("weights") != chosen.identity():
        raise WeightsError(
            f"{path} holds {bundle.identity}, which is not made of these weights; give another folder, or remove it"
        )


def _made_of(path: Path) -> object:
    """What the manifest of a damaged bundle says that it is made of, if that can be told."""
    try:
        return json.loads(read_regular(path / MANIFEST))["provenance"]["weights"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def load(name: str) -> Declared:
    """The ensemble in a file, or the one of that name in export/ensembles/. Raises WeightsError."""
    path = Path(name)
    if not path.is_file():
        path = FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise WeightsError(f"no ensemble {name}: give a TOML file, or one of {known}")
    try:
        return Declared.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_labels(path: Path) -> tuple[str, ...]:
    """Names from a file, one a line. Raises WeightsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin UTF-8 with a mark, which is of no name
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"can't read the labels in {path} ({error})") from None
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise WeightsError(f"{path} has no labels; write them one a line, in the order of the classes")
    return labels
