"""What goes over the wire: options in, predictions out."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from resnet_ensemble.export.bundle import Measured
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.server.costs import Cost
from resnet_ensemble.server.errors import Problem
from resnet_ensemble.server.openapi import NotNull
from resnet_ensemble.server.stopping import CALIBRATED, RULES
from resnet_ensemble.training.views import ALL_PROTOCOLS, Preprocessing

ProtocolName = Literal["center", "flip", "10crop", "dense", "multiscale"]
StopRuleName = Literal["full", "exact", "calibrated"]
# The schema lists what the code can do.
assert get_args(ProtocolName) == ALL_PROTOCOLS
assert get_args(StopRuleName) == (*RULES, CALIBRATED)


class Options(BaseModel):
    """How to evaluate the images of a request: query parameters, or form fields beside the images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes to answer, most probable first")] = 5
    protocol: Annotated[
        ProtocolName | None, NotNull(), Field(description="Which views to average; the server's own by default")
    ] = None
    stop: Annotated[
        StopRuleName | None,
        NotNull(),
        Field(
            description="When to stop: after all views, as soon as no remaining view can change the most probable "
            "class, or as soon as that is unlikely enough; the server's own by default"
        ),
    ] = None
    abstain_below: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="Probability below which the answer says `abstained`"),
    ] = 0.0


class ClassProbability(BaseModel):
    """One class and its probability."""

    label: str
    index: int
    probability: float


class RankedClass(ClassProbability):
    """One of the ensemble's classes."""

    confidence: Annotated[
        float | None,
        Field(
            description="The probability at the temperature that made it as often right as it says. null where none "
            "was fitted for this protocol, stop rule and engines, or where it did not help"
        ),
    ]


class MemberVote(ClassProbability):
    """What one member alone would answer: its most probable class, averaged over those views that it was given."""

    member: str
    views: int


class Timings(BaseModel):
    """Milliseconds by stage. `queue`: waiting for decoders and engines; `inference`: from the first run to the last."""

    decode: float
    views: float
    queue: float
    inference: float
    average: float
    total: float


class Prediction(BaseModel):
    """The ensemble's answer for one image: the mean of the softmax vectors of all members and views that were used."""

    label: str
    index: int
    probability: float
    confidence: Annotated[float | None, Field(description="As in `top`")]
    top: list[RankedClass]
    members: Annotated[list[MemberVote], Field(description="Of the members that were given a view, in their order")]
    protocol: ProtocolName
    stop_rule: StopRuleName
    views_used: int
    views_planned: int
    certain: Annotated[
        bool,
        Field(
            description="The label is proven to be the one of all planned views. false where the picture was decoded "
            "smaller (`calibrated` with drafts, see /info): nothing is proven then about the views of the whole one"
        ),
    ]
    certain_top5: Annotated[bool, Field(description="So is the set of the five most probable classes")]
    entropy: Annotated[float, Field(description="Of the probabilities, in nats: how unsure the ensemble is")]
    mutual_information: Annotated[
        float, Field(description="Entropy minus the mean of the members' own, in nats: how much they disagree")
    ]
    abstained: Annotated[bool, Field(description="The probability is below the `abstain_below` of the request")]
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
    cost: Annotated[Cost, Field(description="Seconds of a view, by which plans are ordered, and views in a full batch")]


class CalibrationDescription(BaseModel):
    """What the stop rule `calibrated` promises for a protocol here, and what it took on the images that certify it."""

    disagreement: Annotated[float, Field(description="At most this share of labels is another than `full`'s ...")]
    confidence: Annotated[float, Field(description="... with this confidence")]
    images: int
    disagreements: Annotated[int, Field(description="Of these images, how many got another label than `full`'s")]
    views: float
    cost: Annotated[float, Field(description="Seconds of the views that were run by those of all")]
    draft: Annotated[
        int | None,
        Field(
            description="JPEGs are decoded smaller, as long as their shorter side keeps so many pixels; what is "
            "promised covers that. null: everything is decoded whole"
        ),
    ]


class Info(BaseModel):
    """What this server serves, and within which limits."""

    bundle: str
    version: str
    labels: tuple[str, ...]
    protocol: Annotated[ProtocolName, Field(description="Where a request does not say it")]
    protocols: dict[str, int] = Field(description="Every protocol and its views a member")
    stop: Annotated[StopRuleName, Field(description="Where a request does not say it")]
    stop_rules: tuple[StopRuleName, ...]
    calibrated: dict[str, CalibrationDescription] = Field(description="Every protocol that has the rule `calibrated`")
    members: list[MemberDescription]
    measured: tuple[Measured, ...]
    streams: int
    limits: dict[str, float | None]


class Status(BaseModel):
    """A healthy answer of /livez and /readyz."""

    status: Literal["ok"] = "ok"
