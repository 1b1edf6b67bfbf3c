"""What a bundle is to clients of the Open Inference Protocol: the ensemble, and each member, as a model.

The ensemble has the bundle's name, and takes pictures. The member `resnet20` of the bundle `cifar10` is the model
`cifar10-resnet20`, and takes ready-made views; names and tensors are those of `export/triton_repository.py`, so its
clients need no change. Both go through the scheduler: bounded, by deadline, in batches shared with everything else.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resnet_ensemble.server import ensemble
from resnet_ensemble.server.admission import Overloaded
from resnet_ensemble.server.classifier import Classifier, Content, refused, unavailable
from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.plan import Plan, Stage
from resnet_ensemble.server.scheduler import EngineFailure, EngineGone, EngineHung
from resnet_ensemble.server.schemas import Options
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.server.stopping import RULES
from resnet_ensemble.server.tensors import Parameters, Spec
from resnet_ensemble.training.views import can_be_view

log = logging.getLogger(__name__)

Inputs = Mapping[str, NDArray[np.uint8] | list[bytes]]
Outputs = dict[str, NDArray[Any]]
_VIEWS = "views"  # in the place of a protocol's name, for the scheduler's means


@dataclass(frozen=True)
class EnsembleModel:
    """The ensemble: `image`, encoded pictures, or `pixels`, RGB pictures of one size.

    `image` has a second dimension of 1, which may be left out: perf_analyzer can't send inputs with only one.
    """

    classifier: Classifier
    settings: Settings
    platform: ClassVar = "resnet_ensemble"  # at "ensemble", perf_analyzer looks for Triton's steps, and crashes
    alternatives: ClassVar = True  # of the inputs exactly one is given
    inputs: ClassVar = (Spec("image", "BYTES", (-1, 1)), Spec("pixels", "UINT8", (-1, -1, -1, 3)))

    @property
    def name(self) -> str:
        """The bundle's."""
        return self.classifier.bundle.manifest.name

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """As the fields of the same names of `Prediction`, one a picture."""
        return (
            Spec("probabilities", "FP32", (-1, len(self.classifier.bundle.manifest.labels))),
            Spec("label", "BYTES", (-1,)),
            Spec("index", "INT64", (-1,)),
            Spec("views_used", "INT64", (-1,)),
            Spec("certain", "BOOL", (-1,)),
            Spec("entropy", "FP32", (-1,)),
            Spec("mutual_information", "FP32", (-1,)),
        )

    @property
    def members(self) -> tuple[int, ...]:
        """Indices of those whose engines it needs: all."""
        return tuple(range(len(self.classifier.bundle.manifest.members)))

    def rows(self, inputs: Inputs) -> int:
        """Pictures in a request. Raises ApiError if there is nothing to run, or too much."""
        if len(inputs) != 1:
            raise ApiError("invalid_tensor", "send either `image`, encoded pictures, or `pixels`, not both")
        (given,) = inputs.values()
        return _limited(len(given), self.settings)

    async def infer(self, inputs: Inputs, parameters: Parameters, deadline: float) -> Outputs:
        """Every output by name, as POST /predict has them, but pictures fail together: raises ApiError."""
        (given,) = inputs.values()
        contents: list[Content | ApiError] = list(given)
        largest = self.settings.max_image_bytes
        for position, content in enumerate(given):
            if isinstance(content, bytes) and len(content) > largest:
                raise ApiError(
                    "image_too_large",
                    f"image {position} has {len(content)} bytes; at most {largest} are allowed",
                )
        options = Options(protocol=parameters.protocol, stop=parameters.stop)
        results = []
        for position, result in enumerate(await self.classifier.evaluate(contents, options, deadline, lambda r: r)):
            if isinstance(result, ApiError):
                raise ApiError(result.code, f"image {position}: {result.detail}", retry_after=result.retry_after)
            results.append(result)
        means = np.array([result.mean.ensemble for result in results])  # (n, classes)
        indices = np.array([ensemble.top(mean, 1)[0] for mean in means])
        unsure = np.array([ensemble.uncertainty(result.mean) for result in results], np.float32)
        return {
            "probabilities": means.astype(np.float32),
            "label": np.array(self.classifier.bundle.manifest.labels)[indices],
            "index": indices.astype(np.int64),
            "views_used": np.array([result.used for result in results], np.int64),
            "certain": np.array([result.certain() for result in results]),
            "entropy": unsure[:, 0],
            "mutual_information": unsure[:, 1],
        }


@dataclass(frozen=True)
class MemberModel:
    """One member, on views that the client has made: uint8 (n, h, w, 3) of a size that some protocol makes."""

    classifier: Classifier
    settings: Settings
    member: int
    alternatives: ClassVar = False
    inputs: ClassVar = (Spec("views", "UINT8", (-1, -1, -1, 3)),)

    @property
    def name(self) -> str:
        """The bundle's and the member's."""
        manifest = self.classifier.bundle.manifest
        return f"{manifest.name}-{manifest.members[self.member].name}"

    @property
    def platform(self) -> str:
        """What runs it."""
        return self.classifier.engines[self.member].info.backend

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """Softmax, one row a view."""
        return (Spec("probabilities", "FP32", (-1, len(self.classifier.bundle.manifest.labels))),)

    @property
    def members(self) -> tuple[int, ...]:
        """Only itself."""
        return (self.member,)

    def rows(self, inputs: Inputs) -> int:
        """Views in a request. Raises ApiError if they are none, or too many."""
        views = inputs["views"]
        assert isinstance(views, np.ndarray)
        rows, height, width, _ = views.shape
        preprocessing = self.classifier.bundle.manifest.members[self.member].preprocessing
        if not can_be_view(height, width, preprocessing):
            crop, quantum = preprocessing.crop, preprocessing.quantum
            raise ApiError(
                "invalid_tensor",
                f"the views are {height} x {width} pixels; {self.name} takes crops of {crop} x {crop}, and whole "
                f"pictures as `dense` and `multiscale` make them, whose longer side is a multiple of {quantum}",
            )
        return _limited(rows, self.settings)

    async def infer(self, inputs: Inputs, parameters: Parameters, deadline: float) -> Outputs:
        """Every output by name. Each view is scheduled as an image of one view would be. Raises ApiError."""
        if parameters.protocol or parameters.stop:
            raise ApiError("invalid_option", f"{self.name} takes ready-made views: it has no `protocol` and no `stop`")
        views = inputs["views"]
        assert isinstance(views, np.ndarray)
        _, height, width, _ = views.shape
        scheduler, manifest = self.classifier.scheduler, self.classifier.bundle.manifest
        crop = manifest.members[self.member].preprocessing.crop
        seconds = self.classifier.costs[self.member].seconds * height * width / crop**2
        plan = Plan(_VIEWS, (Stage(member=self.member, block=0, first=0, views=1, seconds=seconds),))
        try:
            jobs = scheduler.admit(plan, RULES["full"], len(views), deadline=deadline)
        except Overloaded as error:
            raise refused(error) from None
        others: list[tuple[NDArray[np.uint8], ...]] = [()] * len(manifest.members)
        try:
            for position, job in enumerate(jobs):
                mine = (views[position : position + 1],)
                scheduler.submit(job, [*others[: self.member], mine, *others[self.member + 1 :]])
            async with asyncio.timeout(deadline - time.monotonic()):
                tallies = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        except TimeoutError:
            raise ApiError("deadline_exceeded", "not all views were run in the time that the request has") from None
        except (EngineHung, EngineGone) as error:
            raise unavailable(error) from None
        except EngineFailure:
            log.exception("engine failure")
            raise ApiError("engine_failure", "the model failed on a view, even when it was run alone") from None
        finally:
            for job in jobs:
                scheduler.release(job)
        return {"probabilities": np.array([tally.sums[self.member] for tally in tallies], np.float32)}


Model = EnsembleModel | MemberModel


def all_models(classifier: Classifier, settings: Settings) -> list[Model]:
    """The ensemble, then the members."""
    count = len(classifier.bundle.manifest.members)
    return [
        EnsembleModel(classifier, settings),
        *(MemberModel(classifier, settings, member) for member in range(count)),
    ]


def find(classifier: Classifier, settings: Settings, name: str, version: str | None) -> Model:
    """The model of this name, and version if one is asked for. Raises ApiError("not_found")."""
    models = all_models(classifier, settings)
    for model in models:
        if model.name == name:
            break
    else:
        names = ", ".join(model.name for model in models)
        raise ApiError("not_found", f"there is no model {name[:100]!r}; there are {names}")
    if version not in (None, classifier.bundle.manifest.version):
        served = classifier.bundle.manifest.version
        raise ApiError("not_found", f"{name} is served in version {served}; there is no version {version[:100]!r}")
    return model


def _limited(rows: int, settings: Settings) -> int:
    if rows > settings.max_images_per_request:
        raise ApiError(
            "too_many_images", f"the tensor has {rows} rows; at most {settings.max_images_per_request} fit in a request"
        )
    return rows
