"""What the server answers, as frozen objects. Fields that a newer server adds are ignored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

_T = TypeVar("_T")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # what can't be, can't be written anywhere either
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise TypeError(f"{value!r:.50} is no whole number of 32 bits")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


def _or_none(check: Callable[[Any], _T], value: Any) -> _T | None:
    return None if value is None else check(value)


@dataclass(frozen=True)
class ClassProbability:
    """One class and its probability; `confidence` as in Prediction."""

    label: str
    index: int
    probability: float
    confidence: float | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """From the server's JSON."""
        return cls(
            _text(answer["label"]),
            _whole(answer["index"]),
            _number(answer["probability"]),
            _or_none(_number, answer.get("confidence")),
        )


@dataclass(frozen=True)
class MemberVote:
    """What one member of the ensemble alone would answer, by the `views` that it was given."""

    member: str
    label: str
    index: int
    probability: float
    views: int | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """From the server's JSON."""
        return cls(
            _text(answer["member"]),
            _text(answer["label"]),
            _whole(answer["index"]),
            _number(answer["probability"]),
            _or_none(_whole, answer.get("views")),
        )


@dataclass(frozen=True)
class Prediction:
    """The ensemble's answer for one image: the most probable class, then the top k, then each member's vote.

    - views_used, views_planned: views evaluated, and views that the protocol has, over all members
    - bundle: name, version and hash of the models that answered
    - stop_rule: which rule ended the evaluation
    - certain: whether the label is provably that of all planned views; certain_top5: whether the five first ones are.
      Never where "calibrated" decoded the picture smaller
    - entropy: of the averaged probabilities, in nats; mutual_information: how much the members disagree, in nats
    - abstained: whether the probability is below the `abstain_below` of the request
    - confidence: the probability at the temperature that was found for the bundle and the rule, if there is one
    - timings_ms: the server's milliseconds by stage
    - request_id: what to quote when asking about this answer

    What an older server does not tell is None.
    """

    label: str
    index: int
    probability: float
    top: tuple[ClassProbability, ...]
    members: tuple[MemberVote, ...]
    protocol: str
    views_used: int
    views_planned: int
    bundle: str
    timings_ms: Mapping[str, float]
    request_id: str
    stop_rule: str | None = None
    certain: bool | None = None
    certain_top5: bool | None = None
    entropy: float | None = None
    mutual_information: float | None = None
    abstained: bool | None = None
    confidence: float | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, Any], request_id: str) -> Self:
        """From the server's JSON."""
        return cls(
            label=_text(answer["label"]),
            index=_whole(answer["index"]),
            probability=_number(answer["probability"]),
            top=tuple(ClassProbability.parse(entry) for entry in answer["top"]),
            members=tuple(MemberVote.parse(vote) for vote in answer["members"]),
            protocol=_text(answer["protocol"]),
            views_used=_whole(answer["views_used"]),
            views_planned=_whole(answer["views_planned"]),
            bundle=_text(answer["bundle"]),
            timings_ms={_text(stage): _number(value) for stage, value in answer["timings_ms"].items()},
            request_id=request_id,
            stop_rule=_or_none(_text, answer.get("stop_rule")),
            certain=_or_none(bool, answer.get("certain")),
            certain_top5=_or_none(bool, answer.get("certain_top5")),
            entropy=_or_none(_number, answer.get("entropy")),
            mutual_information=_or_none(_number, answer.get("mutual_information")),
            abstained=_or_none(bool, answer.get("abstained")),
            confidence=_or_none(_number, answer.get("confidence")),
        )


@dataclass(frozen=True)
class Guarantee:
    """What the stop rule "calibrated" promises for a protocol, and what it took where that was certified.

    - disagreement, confidence: with this confidence, at most this share of labels is another than that of "full"
    - images, disagreements: how many certified it, and on how many of them the label was another
    - views, cost: an image, on average; cost is engine time by that of all views
    - draft: JPEGs are decoded smaller, as long as their shorter side keeps so many pixels; None: they are not
    """

    disagreement: float
    confidence: float
    images: int
    disagreements: int
    views: float
    cost: float
    draft: int | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """From the server's JSON."""
        return cls(**{name: answer[name] for name in cls.__dataclass_fields__ if name in answer})


@dataclass(frozen=True)
class Info:
    """What a server serves.

    - protocol, stop: what counts where a request does not say it
    - protocols: every protocol and its views a member; stop_rules: every stop rule that some protocol has
    - calibrated: by protocol, what the stop rule "calibrated" promises; others do not have it
    - members: the networks; costs: the seconds that a view takes on each of them there
    - limits: what it refuses more of, such as "max_image_bytes"; None where there is no limit

    What an older server does not tell is None or empty.
    """

    bundle: str
    version: str
    labels: tuple[str, ...]
    protocol: str
    protocols: Mapping[str, int]
    members: tuple[str, ...]
    stop: str | None = None
    stop_rules: tuple[str, ...] = ()
    calibrated: Mapping[str, Guarantee] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """From the server's JSON."""
        return cls(
            bundle=answer["bundle"],
            version=answer["version"],
            labels=tuple(answer["labels"]),
            protocol=answer["protocol"],
            protocols=dict(answer["protocols"]),
            members=tuple(member["name"] for member in answer["members"]),
            stop=answer.get("stop"),
            stop_rules=tuple(answer.get("stop_rules", ())),
            calibrated={name: Guarantee.parse(told) for name, told in answer.get("calibrated", {}).items()},
            costs={member["name"]: member["cost"]["seconds"] for member in answer["members"] if "cost" in member},
            limits=dict(answer.get("limits", {})),
        )
