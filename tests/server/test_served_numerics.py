"""The whole path on real engines: what is served is what torch computed."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from torchvision.transforms import v2

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import Settings
from resnet_ensemble.training.views import make_whole_views, mean_colour
from tests.conftest import wait_until_ready

RAW = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def client(shipped: Bundle) -> Iterator[TestClient]:
    # On a machine that does much else, what is sent here at once may wait for longer than is accepted by default.
    settings = Settings(bundle=shipped.path, max_wait_seconds=600)
    with TestClient(create_app(Service(settings))) as ready:
        wait_until_ready(ready)
        yield ready


def served(client: TestClient, content: bytes, labels: int, **options: str | int) -> np.ndarray:
    answer = client.post("/predict", params={"top_k": 1000} | options, content=content, headers=RAW).json()
    probabilities = np.zeros(labels)
    for entry in answer["top"]:
        probabilities[entry["index"]] = entry["probability"]
    return probabilities


def test_served_probabilities_are_torchs_on_the_golden_images(client: TestClient, shipped: Bundle) -> None:
    assert shipped.manifest.golden_protocol == "10crop"
    for golden in shipped.manifest.golden:
        expected = np.mean([golden.probabilities[member.name] for member in shipped.manifest.members], axis=0)

        probabilities = served(client, shipped.read(golden), len(shipped.manifest.labels), protocol="10crop")

        np.testing.assert_allclose(probabilities, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (77, 50), (50, 77), (33, 201), (640, 427)])
def test_ten_crops_are_torchvisions_through_the_onnx_reference(
    client: TestClient, shipped: Bundle, size: tuple[int, int]
) -> None:
    """Nothing of ours between the picture and the expected answer: torchvision's crops, ONNX's own interpreter."""
    width, height = size
    coarse = np.random.default_rng(5).integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "PNG")
    means = []
    for member in shipped.manifest.members:
        how = member.preprocessing
        pad = v2.Pad(how.padding, fill=mean_colour(how.mean))
        crops = v2.TenCrop(how.crop)(pad(v2.Resize(how.resize)(image)))
        views = np.stack([np.asarray(crop) for crop in crops])
        interpreter = onnx.reference.ReferenceEvaluator(onnx.load_from_string(shipped.read(member)))
        means.append(interpreter.run(None, {"views": views})[0].astype(np.float64).mean(axis=0))

    probabilities = served(client, content.getvalue(), len(shipped.manifest.labels))

    np.testing.assert_allclose(probabilities, np.mean(means, axis=0), atol=1e-4)


def test_whole_views_are_answered_as_by_the_onnx_reference(client: TestClient, shipped: Bundle) -> None:
    coarse = np.random.default_rng(6).integers(0, 256, (5, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((52, 40), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "PNG")
    means = []
    for member in shipped.manifest.members:
        interpreter = onnx.reference.ReferenceEvaluator(onnx.load_from_string(shipped.read(member)))
        views = make_whole_views(image, member.preprocessing, "dense")
        answers = [interpreter.run(None, {"views": view[None]})[0][0] for view in views]
        means.append(np.mean(answers, axis=0, dtype=np.float64))

    probabilities = served(client, content.getvalue(), len(shipped.manifest.labels), protocol="dense")

    np.testing.assert_allclose(probabilities, np.mean(means, axis=0), atol=1e-4)


def test_exact_gives_the_label_of_all_views_whatever_shares_its_batches(client: TestClient, shipped: Bundle) -> None:
    contents = [shipped.read(golden) for golden in shipped.manifest.golden] * 3
    planned = 10 * len(shipped.manifest.members)

    def classify(content: bytes, stop: str) -> Any:
        return client.post("/predict", params={"stop": stop}, content=content, headers=RAW).json()

    with ThreadPoolExecutor(32) as pool:
        full = [pool.submit(classify, content, "full") for content in contents]
        exact = [pool.submit(classify, content, "exact") for content in contents]
        pairs = [(one.result(), other.result()) for one, other in zip(full, exact, strict=True)]

    for all_views, stopped in pairs:
        assert stopped["label"] == all_views["label"]
        assert stopped["certain"]
        assert sum(vote["views"] for vote in stopped["members"]) == stopped["views_used"]
        assert stopped["views_used"] <= stopped["views_planned"] == planned
    assert min(stopped["views_used"] for _, stopped in pairs) == planned // 2 + 1
    # What is answered does not depend on what shares the batches.
    used = [stopped["views_used"] for _, stopped in pairs]
    assert used[:8] == used[8:16] == used[16:]


def test_members_votes_are_the_members_golden_answers(client: TestClient, shipped: Bundle) -> None:
    for golden in shipped.manifest.golden:
        votes = client.post("/predict", content=shipped.read(golden), headers=RAW).json()["members"]

        for vote in votes:
            expected = golden.probabilities[vote["member"]]
            assert vote["index"] == int(np.argmax(expected))
            assert vote["probability"] == pytest.approx(max(expected), abs=1e-4)


def test_a_picture_of_a_ship_is_a_ship(client: TestClient, shipped: Bundle) -> None:
    content = (shipped.path / "golden" / "ship.png").read_bytes()

    answer = client.post("/predict", content=content, headers=RAW).json()

    assert answer["label"] == "ship"
