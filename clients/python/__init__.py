"""The Python SDK.

from resnet_ensemble.client import Client

with Client("http://localhost:8000") as client:
    print(client.classify("cat.jpg").label)
"""

from resnet_ensemble.client._client import Answer, AsyncClient, Client
from resnet_ensemble.client._errors import (
    AuthenticationError,
    BadRequestError,
    ConnectionFailedError,
    ImageError,
    NotReadyError,
    OverloadedError,
    QuotaExceededError,
    ResnetError,
    ResponseError,
    ServerError,
    StatusError,
    TimedOutError,
    TooLargeError,
    UnsupportedImageError,
)
from resnet_ensemble.client._images import Image
from resnet_ensemble.client._types import ClassProbability, Guarantee, Info, MemberVote, Prediction

__all__ = [
    "Answer",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "ClassProbability",
    "Client",
    "ConnectionFailedError",
    "Guarantee",
    "Image",
    "ImageError",
    "Info",
    "MemberVote",
    "NotReadyError",
    "OverloadedError",
    "Prediction",
    "QuotaExceededError",
    "ResnetError",
    "ResponseError",
    "ServerError",
    "StatusError",
    "TimedOutError",
    "TooLargeError",
    "UnsupportedImageError",
]
