"""POST /predict on fake engines, which answer by brightness: black is airplane (0), white is truck (9)."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from resnet_ensemble.export.engines.fake import FakeEngine
from tests.server.test_refusals import assert_problem

Png = Callable[..., bytes]
Serve = Callable[..., Any]
RAW = {"Content-Type": "image/png"}


class Constant(FakeEngine):
    """Sure of one class, whatever it sees; a member of its own speed, so that plans have one order."""

    def __init__(self, index: int, milliseconds: float) -> None:
        super().__init__(10, seconds_per_view=milliseconds / 1000)
        self.index = index

    def run(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        super().run(views)
        return np.eye(10, dtype=np.float32)[[self.index] * len(views)]


class Fails(FakeEngine):
    """Fails on white views."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, fails=lambda view: bool(view.min() == 255))


@pytest.mark.parametrize(("brightness", "label", "index"), [(0, "airplane", 0), (255, "truck", 9)])
def test_a_form_with_one_image_is_answered_with_its_prediction(
    client: TestClient, png: Png, brightness: int, label: str, index: int
) -> None:
    response = client.post("/predict", files={"image": png(brightness)})

    body = response.json()
    assert response.status_code == 200
    assert (body["label"], body["index"]) == (label, index)
    assert body["probability"] == body["top"][0]["probability"] > 0.5


def test_a_raw_body_is_answered_as_a_form_is(client: TestClient, png: Png) -> None:
    form = client.post("/predict", files={"image": png(90)}).json()

    for headers in (RAW, {"Content-Type": "image/jpeg"}, {"Content-Type": "application/octet-stream"}, {}):
        raw = client.post("/predict", content=png(90), headers=headers).json()
        assert raw["top"] == form["top"]


def test_the_default_is_every_member_and_ten_views(client: TestClient, png: Png) -> None:
    body = client.post("/predict", content=png(), headers=RAW).json()

    members = len(body["members"])
    assert members >= 2
    assert (body["protocol"], body["stop_rule"]) == ("10crop", "full")
    assert body["views_used"] == body["views_planned"] == 10 * members


@pytest.mark.parametrize(
    ("protocol", "views"), [("center", 1), ("flip", 2), ("10crop", 10), ("dense", 2), ("multiscale", 10)]
)
def test_the_protocol_is_chosen_per_request(client: TestClient, png: Png, protocol: str, views: int) -> None:
    query = client.post("/predict", params={"protocol": protocol}, content=png(), headers=RAW)
    form = client.post("/predict", files={"image": png()}, data={"protocol": protocol})

    for body in (query.json(), form.json()):
        assert body["protocol"] == protocol
        assert body["views_used"] == views * len(body["members"])


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_top_k_answers_the_most_probable_classes_in_order(
    client: TestClient, png: Png, top_k: int, expected: int
) -> None:
    body = client.post("/predict", params={"top_k": top_k}, files={"image": png(100)}).json()

    probabilities = [entry["probability"] for entry in body["top"]]
    assert len(probabilities) == expected
    assert probabilities == sorted(probabilities, reverse=True)


def test_all_probabilities_sum_to_one(client: TestClient, png: Png) -> None:
    body = client.post("/predict", params={"top_k": 10}, content=png(77), headers=RAW).json()

    assert sum(entry["probability"] for entry in body["top"]) == pytest.approx(1, abs=1e-6)


def test_each_member_votes(serve: Serve, png: Png) -> None:
    with serve_constant(serve, 0, 3) as client:
        body = client.post("/predict", content=png(0), headers=RAW).json()

    assert [vote["index"] for vote in body["members"]] == [0, 3]
    assert {"member", "label", "index", "probability", "views"} == body["members"][0].keys()


def serve_constant(serve: Serve, *indices: int, **settings: Any) -> Any:
    """Members that always vote for these classes, each slower than the one before; opened once more for a restart."""
    engines = itertools.cycle([Constant(index, 0.2 + 0.4 * place) for place, index in enumerate(indices)])
    return serve(lambda _: next(engines), **settings)


def test_exact_stops_when_no_remaining_view_can_change_the_label(serve: Serve, png: Png) -> None:
    with serve_constant(serve, 3, 3) as client:
        full = client.post("/predict", content=png(), headers=RAW).json()
        for response in (
            client.post("/predict", params={"stop": "exact"}, content=png(), headers=RAW),
            client.post("/predict", files={"image": png()}, data={"stop": "exact"}),
        ):
            body = response.json()

            assert (body["stop_rule"], body["views_used"], body["views_planned"]) == ("exact", 11, 20)
            assert (body["label"], body["certain"]) == (full["label"], True)
            assert [vote["views"] for vote in body["members"]] == [10, 1]
            assert response.headers["x-stop-rule"] == "exact"
            assert response.headers["x-views-used"] == "11"
    assert (full["stop_rule"], full["views_used"], full["certain"], full["certain_top5"]) == ("full", 20, True, True)


def test_exact_runs_everything_where_the_members_disagree(serve: Serve, png: Png) -> None:
    with serve_constant(serve, 3, 5, stop="exact") as client:
        body = client.post("/predict", content=png(), headers=RAW).json()

    assert (body["views_used"], body["stop_rule"]) == (20, "exact")
    assert body["label"] == "cat"  # of equals the lower
    assert [vote["index"] for vote in body["members"]] == [3, 5]
    assert body["mutual_information"] == pytest.approx(np.log(2))
    assert body["entropy"] == pytest.approx(np.log(2))


def test_a_member_that_was_given_no_view_has_no_vote(serve: Serve, png: Png) -> None:
    with serve_constant(serve, 3, 3) as client:
        body = client.post("/predict", params={"stop": "exact", "protocol": "flip"}, content=png(), headers=RAW).json()
        assert (body["views_used"], [vote["views"] for vote in body["members"]]) == (3, [2, 1])
        # The cheap views of both members come before the expensive ones of any.
        body = client.post("/predict", params={"stop": "exact", "protocol": "multiscale"}, content=png()).json()
        assert body["views_used"] == 11
        body = client.post("/predict", params={"stop": "exact", "protocol": "center"}, content=png()).json()
        assert body["views_used"] == 2


def test_the_top_five_are_certain_later_than_the_label(serve: Serve, png: Png) -> None:
    with serve_constant(serve, 3, 3) as client:
        body = client.post("/predict", params={"stop": "exact"}, content=png(), headers=RAW).json()

    assert (body["certain"], body["certain_top5"]) == (True, False)


def test_what_all_members_agree_on_has_no_mutual_information(client: TestClient, png: Png) -> None:
    body = client.post("/predict", content=png(100), headers=RAW).json()

    assert body["entropy"] > 0.5
    assert body["mutual_information"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("below", "abstained"), [(None, False), ("0", False), ("0.3", False), ("0.99", True)])
def test_an_unsure_answer_abstains_where_it_was_asked_to(
    client: TestClient, png: Png, below: str | None, abstained: bool
) -> None:
    params = {} if below is None else {"abstain_below": below}

    body = client.post("/predict", params=params, content=png(100), headers=RAW).json()

    assert 0.3 < body["probability"] < 0.99
    assert body["abstained"] is abstained
    assert body["label"]


def test_protocol_and_stop_rule_of_the_server_count_where_a_request_does_not_say(serve: Serve, png: Png) -> None:
    with serve(protocol="dense", stop="exact") as client:
        body = client.post("/predict", content=png(), headers=RAW).json()
        other = client.post("/predict", params={"protocol": "flip", "stop": "full"}, content=png(), headers=RAW).json()
        info = client.get("/info").json()

    assert (body["protocol"], body["stop_rule"], body["views_planned"]) == ("dense", "exact", 4)
    assert (other["protocol"], other["stop_rule"]) == ("flip", "full")
    assert (info["protocol"], info["stop"]) == ("dense", "exact")


@pytest.mark.parametrize("size", [(32, 32), (90, 40), (33, 500)])
def test_whole_views_of_any_image_are_served(client: TestClient, png: Png, size: tuple[int, int]) -> None:
    for protocol in ("dense", "multiscale"):
        body = client.post("/predict", params={"protocol": protocol}, content=png(255, size), headers=RAW).json()

        assert body["label"] == "truck"


def test_timings_are_in_the_body_and_in_the_headers(client: TestClient, png: Png) -> None:
    response = client.post("/predict", files={"image": png()})

    timings = response.json()["timings_ms"]
    assert list(timings) == ["decode", "views", "queue", "inference", "average", "total"]
    assert all(value >= 0 for value in timings.values())
    assert timings["total"] >= timings["inference"]
    entries = [entry.split(";dur=") for entry in response.headers["server-timing"].split(", ")]
    assert {stage: float(value) for stage, value in entries} == pytest.approx(timings, rel=1e-5)
    assert response.headers["x-views-used"] == str(response.json()["views_used"])
    assert response.headers["x-protocol"] == "10crop"
    assert response.headers["x-bundle"] == response.json()["bundle"]


def test_several_images_are_answered_in_order_each_failing_alone(client: TestClient, png: Png) -> None:
    parts = [
        ("image", (f"{i}.png", content)) for i, content in enumerate([png(255), b"junk", png(0), b"", png(255)[:40]])
    ]

    response = client.post("/predict", files=parts)

    results = response.json()["results"]
    assert response.status_code == 200
    assert [(r["position"], r["filename"]) for r in results] == [(i, f"{i}.png") for i in range(5)]
    assert [r["prediction"] and r["prediction"]["label"] for r in results] == ["truck", None, "airplane", None, None]
    codes = [r["problem"] and r["problem"]["code"] for r in results]
    assert codes == [None, "unsupported_image_format", None, "empty_image", "corrupt_image"]


def test_an_image_that_breaks_a_model_fails_alone(serve: Serve, png: Png) -> None:
    with serve(Fails) as client:
        parts = [("image", png(brightness)) for brightness in (0, 255, 30)]
        results = client.post("/predict", files=parts).json()["results"]

        assert [r["problem"] and r["problem"]["code"] for r in results] == [None, "engine_failure", None]
        assert_problem(client.post("/predict", content=png(255), headers=RAW), "engine_failure")


def test_concurrent_requests_share_batches_and_get_their_own_answers(serve: Serve, png: Png) -> None:
    engines: list[FakeEngine] = []

    def engine(classes: int) -> FakeEngine:
        engines.append(FakeEngine(classes, seconds_per_view=0.0001))
        return engines[-1]

    with serve(engine, streams=1) as client, ThreadPoolExecutor(16) as pool:
        for warm in engines:
            warm.batches.clear()
        brightness = [int(b) for b in np.random.default_rng(0).integers(0, 256, 64)]
        answers = list(pool.map(lambda b: client.post("/predict", content=png(b), headers=RAW).json(), brightness))

    for value, answer in zip(brightness, answers, strict=True):
        assert abs(answer["index"] - value / 255 * 9) <= 0.51
    batches = [size for e in engines for size in e.batches]
    assert max(batches) > 10  # more than one image's views
