"""NVIDIA's own client, unmodified, against a server process over a real socket."""

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.training.views import make_views
from tests.server.test_process import process, wait_until_ready

ENSEMBLE, MEMBER = "cifar10", "cifar10-resnet20"


@pytest.fixture(scope="module")
def client() -> Iterator[triton.InferenceServerClient]:
    with process() as (_, url):
        wait_until_ready(url)
        with triton.InferenceServerClient(url.removeprefix("http://")) as connected:
            yield connected


def pictures(bundle: Bundle, *names: str) -> triton.InferInput:
    contents = [(bundle.path / "golden" / f"{name}.png").read_bytes() for name in names]
    image = triton.InferInput("image", [len(contents), 1], "BYTES")
    return image.set_data_from_numpy(np.array(contents, np.object_)[:, None])


def test_health_metadata_and_the_index(client: triton.InferenceServerClient, pair: Bundle) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(ENSEMBLE)
    assert client.is_model_ready(MEMBER, pair.manifest.version)
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "resnet-ensemble"
    assert client.get_model_metadata(MEMBER)["inputs"][0]["name"] == "views"
    assert client.get_model_config(ENSEMBLE)["max_batch_size"] == 64
    assert next(model["name"] for model in client.get_model_repository_index()) == ENSEMBLE


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_pictures(client: triton.InferenceServerClient, pair: Bundle, compression: str | None) -> None:
    result = client.infer(
        ENSEMBLE,
        [pictures(pair, "ship", "frog")],
        request_id="7",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
        parameters={"protocol": "flip", "stop": "exact"},
        timeout=30_000_000,
    )

    assert result.get_response()["id"] == "7"
    assert result.as_numpy("label").tolist() == [b"ship", b"frog"]
    assert result.as_numpy("index").tolist() == [8, 6]
    assert result.as_numpy("certain").tolist() == [True, True]
    assert result.as_numpy("probabilities").shape == (2, 10)
    assert result.as_numpy("probabilities").dtype == np.float32


def test_pixels_and_classification(client: triton.InferenceServerClient, pair: Bundle) -> None:
    with Image.open(pair.path / "golden" / "truck.png") as picture:
        array = np.asarray(picture.convert("RGB"))[None]
    pixels = triton.InferInput("pixels", [*array.shape], "UINT8").set_data_from_numpy(array)

    for binary in (True, False):
        best = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)
        (row,) = client.infer(ENSEMBLE, [pixels], outputs=[best]).as_numpy("probabilities")
        assert len(row) == 3
        assert row[0].split(b":" if binary else ":")[2] in (b"truck", "truck")


def test_a_members_views_average_to_its_golden_probabilities(
    client: triton.InferenceServerClient, pair: Bundle
) -> None:
    manifest = pair.manifest
    golden = next(golden for golden in manifest.golden if "ship" in golden.file)
    with Image.open(pair.path / golden.file) as picture:
        views = make_views(picture.convert("RGB"), manifest.members[0].preprocessing, manifest.golden_protocol)
    for binary in (True, False):
        given = triton.InferInput("views", [*views.shape], "UINT8").set_data_from_numpy(views, binary_data=binary)
        wanted = triton.InferRequestedOutput("probabilities", binary_data=binary)
        found = client.infer(MEMBER, [given], outputs=[wanted]).as_numpy("probabilities")
        np.testing.assert_allclose(found.mean(axis=0), golden.probabilities["resnet20"], atol=manifest.golden_tolerance)


def test_requests_side_by_side(client: triton.InferenceServerClient, pair: Bundle) -> None:
    requests = [client.async_infer(ENSEMBLE, [pictures(pair, "ship")]) for _ in range(5)]

    assert [request.get_result().as_numpy("label").tolist() for request in requests] == [[b"ship"]] * 5


def test_errors_are_the_clients_own(client: triton.InferenceServerClient) -> None:
    junk = triton.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"junk"], np.object_))

    with pytest.raises(InferenceServerException) as caught:
        client.infer(ENSEMBLE, [junk])

    assert caught.value.status() == "415"
    assert "unsupported_image_format" in caught.value.message()
