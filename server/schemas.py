"""What goes over the wire: options in, predictions out."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from resnet_ensemble.export.bundle import Measured
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.server.errors import Problem
from resnet_ensemble.training.views import PROTOCOLS, Preprocessing

ProtocolName = Literal["center", "flip", "10crop"]
assert ProtocolName.__args__ == tuple(PROTOCOLS)  # type: ignore[attr-defined]  # the schema lists what the code can do


class Options(BaseModel):
    """How to evaluate the images of a request: query parameters, or form fields beside the images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes to answer, most probable first")] = 5
    protocol: Annotated[
        ProtocolName | None, Field(description="Which views to average; the bundle's own by default")
    ] = None


class ClassProbability(BaseModel):
    """One class and its probability."""

    label: str
    index: int
    probability: float


class MemberVote(ClassProbability):
    """What one member alone would answer: its most probable class, averaged over the same views."""

    member: str


class Timings(BaseModel):
    """Milliseconds by stage. `queue`: waiting for an engine; `inference`: from the first engine run to the last."""

    decode: float
    views: float
    queue: float
    inference: float
    average: float
    total: float


class Prediction(BaseModel):
    """The ensemble's answer for one image: the mean of all members' softmax vectors over all views."""

    label: str
    index: int
    probability: float
    top: list[ClassProbability]
    members: list[MemberVote]
    protocol: ProtocolName
    stop_rule: Literal["full"]
    views_used: int
    views_planned: int
    bundle: str
    timings_ms: Timings


class Result(BaseModel):
    """One image of several: its prediction, or the problem that only this image has."""

    position: int
    filename: str | None
    prediction: Prediction | None = None
    problem: Problem | None = None


class Results(BaseModel):
    """The answer to a request with several images, in their order."""

    results: list[Result]


class MemberDescription(BaseModel):
    """One network of the ensemble and the engine that runs it here."""

    name: str
    sha256: str
    parameters: int
    preprocessing: Preprocessing
    measured: tuple[Measured, ...]
    engine: EngineInfo


class Info(BaseModel):
    """What this server serves, and within which limits."""

    bundle: str
    version: str
    labels: tuple[str, ...]
    protocol: ProtocolName
    protocols: dict[str, int] = Field(description="Every protocol and its views a member")
    members: list[MemberDescription]
    measured: tuple[Measured, ...]
    streams: int
    max_batch: int
    limits: dict[str, float | None]


class Status(BaseModel):
    """A healthy answer of /livez and /readyz."""

    status: Literal["ok"] = "ok"
