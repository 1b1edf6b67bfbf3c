"""The scheduler's decisions, one by one."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_ensemble.server.admission import Overloaded
from resnet_ensemble.server.dispatch import Dispatcher
from resnet_ensemble.server.jobs import Batch, Decoding, Job
from resnet_ensemble.server.plan import cheapest_first
from resnet_ensemble.server.stopping import RULES

CLASSES = 10
FULL, EXACT = RULES["full"], RULES["exact"]
SOUND, BAD, DEADLY = 0, 1, 2
# Two members, of which the second costs twice the first: 30 s for an image.
PLAN = cheapest_first("10crop", [[1.0], [2.0]], [10])


def dispatcher(**options: Any) -> Dispatcher:
    defaults: dict[str, Any] = {"classes": CLASSES, "streams": 1, "batch_pixels": [32, 32], "max_wait": 1e9}
    return Dispatcher(**(defaults | options))


def views(label: int, count: int = 10, side: int = 1, sureness: int = 255, kind: int = SOUND) -> NDArray[np.uint8]:
    """Views that tell the simulated engine what to answer."""
    return np.full((count, side, side, 3), (label, sureness, kind), np.uint8)


def answers(batch: Batch) -> NDArray[np.float32]:
    """What a sound engine says: the label has the probability of the sureness, the next class the rest."""
    told = np.concatenate([part.views[:, 0, 0] for part in batch.parts]).astype(int)
    probabilities = np.zeros((len(told), CLASSES), np.float32)
    rows = np.arange(len(told))
    probabilities[rows, told[:, 0]] = told[:, 1] / 255
    probabilities[rows, (told[:, 0] + 1) % CLASSES] = 1 - told[:, 1] / 255
    return probabilities


def add(found: Dispatcher, label: int, *, now: float = 0.0, rule: Any = FULL, **options: Any) -> Job:
    (job,) = found.admit(now, now + 1e6, PLAN, rule, 1)
    found.submit(now, job, [[views(label, **options)], [views(label, **options)]])
    return job


def in_line(found: Dispatcher, label: int, *, now: float = 0.0, timeout: float = 1e6, **options: Any) -> Job:
    """An admitted image that is not decoded."""
    (job,) = found.admit(now, now + timeout, PLAN, FULL, 1)
    found.put_in_line(now, job, lambda: [[views(label, **options)], [views(label, **options)]])
    return job


def next_batch(found: Dispatcher, now: float = 0.0) -> Batch:
    batch = found.next(now, decode=False)
    assert isinstance(batch, Batch)
    return batch


def run(found: Dispatcher, now: float = 0.0) -> tuple[Batch, list[Job]]:
    batch = next_batch(found, now)
    return batch, found.done(batch, answers(batch), now + batch.seconds)


def work(found: Dispatcher, now: float = 0.0) -> Job | Batch:
    """Do what comes next."""
    what = found.next(now)
    if isinstance(what, Decoding):
        found.decoded(now, what.job, what.work(), 0.0)
        return what.job
    assert what is not None
    found.done(what, answers(what), now)
    return what


def run_all(found: Dispatcher, slowness: float = 1.0) -> list[tuple[int, int]]:
    """(member, views) of every batch until nothing waits."""
    ran, now = [], 0.0
    while isinstance(batch := found.next(now), Batch):
        now += slowness * batch.seconds
        found.done(batch, answers(batch), now)
        ran.append((batch.member, batch.views))
    return ran


def test_a_full_image_runs_its_whole_plan_the_cheap_member_first() -> None:
    found = dispatcher()
    job = add(found, 3)

    assert run_all(found) == [(0, 10), (1, 10)]
    assert job.views.tolist() == [10, 10]
    np.testing.assert_allclose(job.sums, 10 * np.eye(CLASSES)[[3, 3]])


def test_an_exact_image_runs_only_what_it_needs() -> None:
    found = dispatcher()
    job = add(found, 3, rule=EXACT)

    assert run_all(found) == [(0, 10), (1, 1)]
    assert job.views.tolist() == [10, 1]
    assert found.unfinished_views == 0


def test_an_unsure_image_is_asked_for_more_and_packed_with_others() -> None:
    found = dispatcher(batch_pixels=[10, 32])
    unsure, sure = add(found, 3, rule=EXACT, sureness=200), add(found, 4, rule=EXACT)

    ran = run_all(found)

    assert ran == [(0, 10), (1, 2), (1, 2), (0, 10)]  # the second batch has a view of each
    assert unsure.views.tolist() == [10, 3]
    assert sure.views.tolist() == [10, 1]


def test_views_of_waiting_images_share_batches_by_rank() -> None:
    found = dispatcher()
    jobs = [add(found, label) for label in range(6)]

    batch, _ = run(found)

    assert batch.views == 32
    assert [part.job for part in batch.parts] == jobs[:4]
    assert len(batch.parts[-1].views) == 2


def test_a_batch_is_not_filled_with_images_that_came_much_later() -> None:
    found = dispatcher(max_wait=1000.0)
    old, near, late = (add(found, 1, now=now) for now in (0.0, 0.4, 0.6))

    batch, _ = run(found)

    assert [part.job for part in batch.parts] == [old, near]
    assert late.done == 0


def test_a_lone_image_is_shared_out_over_the_streams() -> None:
    found = dispatcher(streams=2)
    add(found, 1)

    assert run_all(found) == [(0, 10), (1, 5), (1, 3), (1, 1), (1, 1)]  # while one stream runs 10, another has the rest


def test_on_a_gpu_a_lone_image_s_views_of_a_member_are_one_batch() -> None:
    found = dispatcher(streams=2, spread=False)
    add(found, 1)

    assert run_all(found) == [(0, 10), (1, 10)]


def test_views_of_other_shapes_are_not_packed_together_and_large_ones_make_smaller_batches() -> None:
    found = dispatcher()
    for side in (1, 2, 8):
        add(found, 1, side=side)

    assert run_all(found)[:6] == [(0, 10), (1, 10), (0, 8), (0, 2), (1, 8), (1, 2)]


def test_a_released_image_leaves_the_queues_at_once() -> None:
    found = dispatcher()
    dropped, kept = add(found, 1), add(found, 2)

    assert found.release(dropped)
    assert not found.release(dropped)
    assert (found.unfinished_views, found.waiting_views, found.images) == (20, 20, 1)
    batch, _ = run(found)
    assert [part.job for part in batch.parts] == [kept]


def test_an_image_that_is_released_while_it_runs_is_ignored() -> None:
    found = dispatcher()
    job = add(found, 1)
    batch = next_batch(found)
    found.release(job)

    assert found.done(batch, answers(batch), 1.0) == []
    assert (found.unfinished_views, found.waiting_views, found.images, found.predicted_wait()) == (0, 0, 0, 0)


def test_an_image_that_is_released_before_it_is_decoded_is_not_queued() -> None:
    found = dispatcher()
    (job,) = found.admit(0.0, 1e6, PLAN, FULL, 1)
    found.release(job)
    found.submit(0.0, job, [[views(1)], [views(1)]])

    assert found.next(0.0) is None


def test_an_image_that_was_begun_is_finished_before_the_next_one_is_decoded() -> None:
    found = dispatcher(batch_pixels=[10, 10])
    first, second = in_line(found, 1), in_line(found, 2)

    done = [work(found) for _ in range(6)]

    assert done[0] is first
    assert [batch.member for batch in done[1:3] if isinstance(batch, Batch)] == [0, 1]
    assert done[3] is second


@pytest.mark.parametrize("members", [1, 2])
def test_batches_are_filled_where_many_images_are_in_line(members: int) -> None:
    found = dispatcher(batch_pixels=members * [4])
    plan = cheapest_first("center", members * [[1.0]], members * [1])
    jobs = [found.admit(0.0, 1e6, plan, FULL, 1)[0] for _ in range(9)]
    for job in jobs:
        found.put_in_line(0.0, job, lambda: members * [[views(1, count=1)]])

    done = [work(found) for _ in range(9 + 4 * members)]

    for member in range(members):
        assert [what.views for what in done if isinstance(what, Batch) and what.member == member] == [4, 3, 1, 1]
    assert done[:4] == jobs[:4]
    assert done[4] not in jobs


def test_a_few_images_in_line_do_not_keep_a_decoded_one_waiting() -> None:
    found = dispatcher()
    first, second, *_ = (in_line(found, label) for label in range(8))

    assert work(found) is first  # its 10 views are more than 7 images
    assert isinstance(work(found), Batch)
    assert isinstance(work(found), Batch)
    assert work(found) is second


def test_an_urgent_image_is_decoded_before_others_are_run() -> None:
    found = dispatcher(batch_pixels=[5, 5], max_wait=1000.0)
    patient = in_line(found, 1)
    assert work(found) is patient
    urgent = in_line(found, 2, timeout=20.0)

    assert work(found) is urgent
    batch = work(found)
    assert isinstance(batch, Batch)
    assert {part.job for part in batch.parts} == {urgent}


def test_who_only_decodes_or_only_runs_gets_nothing_else() -> None:
    found = dispatcher()
    first, second = in_line(found, 1), in_line(found, 2)
    assert found.can(decode=True, run=False)
    assert not found.can(decode=False, run=True)
    assert found.next(0.0, decode=False) is None

    assert work(found) is first
    assert found.can(decode=False, run=True)
    decoding = found.next(0.0, run=False)
    assert isinstance(decoding, Decoding)
    assert decoding.job is second
    assert found.next(0.0, run=False) is None


def test_nothing_is_decoded_while_too_many_bytes_of_views_are_held() -> None:
    found = dispatcher(max_bytes=10 * 3)
    first, second = in_line(found, 1), in_line(found, 2)
    assert work(found) is first
    assert found.view_bytes == 2 * 10 * 3
    assert found.next(0.0, run=False) is None

    found.release(first)
    assert found.view_bytes == 0
    assert work(found) is second


def test_views_that_members_share_are_counted_once() -> None:
    found = dispatcher()
    (job,) = found.admit(0.0, 1e6, PLAN, FULL, 1)
    same = [views(1)]
    found.submit(0.0, job, [same, same])

    assert found.view_bytes == 10 * 3


def test_an_image_that_is_released_before_its_turn_is_never_decoded() -> None:
    found = dispatcher()
    dropped, kept = in_line(found, 1), in_line(found, 2)
    found.release(dropped)

    assert work(found) is kept
    found.release(kept)
    assert not found.can(decode=True, run=True)


def test_the_time_in_line_and_in_the_queue_counts_as_waiting() -> None:
    found = dispatcher()
    job = in_line(found, 1, now=10.0)
    decoding = found.next(12.0)
    assert isinstance(decoding, Decoding)
    found.submit(15.0, job, decoding.work())
    next_batch(found, 19.0)

    assert job.queued == 2 + 4


def test_a_single_image_does_not_wait_for_a_large_request() -> None:
    found = dispatcher(max_wait=100.0, batch_pixels=[10, 10])
    large = found.admit(0.0, 1e6, PLAN, FULL, 200)
    for job in large:
        found.submit(0.0, job, [[views(1)], [views(1)]])
    for _ in range(5):
        run(found)
    with pytest.raises(Overloaded):
        found.admit(1.0, 1e6, PLAN, FULL, 200)

    single = add(found, 2, now=1.0)
    ran = 0
    while single.active:
        run(found)
        ran += 1

    assert ran <= 8


@pytest.mark.parametrize(("decoding", "slowness"), [(0.3, 1.0), (0.001, 8.0)], ids=["pictures", "engines"])
def test_a_single_image_does_not_wait_for_a_large_request_that_takes_longer_than_expected(
    decoding: float, slowness: float
) -> None:
    """Ranks are given by what images took before: here, small pictures on engines that were quick."""
    found = dispatcher(max_wait=10.0)
    plan = cheapest_first("center", [[0.03]], [1])
    large: set[Job] = set()

    def arrive(now: float, images: int) -> list[Job]:
        jobs = found.admit(now, now + 300, plan, FULL, images)
        for job in jobs:
            found.put_in_line(now, job, lambda: [[views(1, 1)]])
        return jobs

    def step(now: float) -> float:
        """Do what comes next; when it is done."""
        what = found.next(now)
        assert what is not None
        if isinstance(what, Decoding):
            seconds = decoding if what.job in large else 0.001
            found.decoded(now + seconds, what.job, what.work(), seconds)
            return now + seconds
        now += slowness * what.seconds if what.parts[0].job in large else what.seconds
        found.done(what, answers(what), now)
        return now

    now = 0.0
    for _ in range(40):
        (job,) = arrive(now, 1)
        while job.active:
            now = step(now)
    large.update(arrive(now, 100))
    began, waits = now, []
    while any(job.active for job in large):
        for _ in range(min(3, found.images)):
            now = step(now)
        (single,) = arrive(now, 1)
        came = now
        while single.active:
            now = step(now)
        waits.append(now - came)

    assert now - began > 20
    assert len(waits) > 30
    assert max(waits) < 2.5


def test_admission_is_by_predicted_wait_and_says_when_to_come_back() -> None:
    found = dispatcher(max_wait=70.0, streams=2)
    for now in range(3):
        found.admit(now, 1e6, PLAN, FULL, 1)

    assert found.predicted_wait() == 45
    with pytest.raises(Overloaded, match=r"90\.0 s, above the limit of 70 s") as error:  # twice, for caution
        found.admit(4.0, 1e6, PLAN, FULL, 1)
    assert (error.value.retry_after, error.value.reason) == (20, "wait")


def test_a_request_that_can_not_be_answered_in_its_time_is_refused_at_once() -> None:
    found = dispatcher(max_wait=50.0)
    found.admit(0.0, 10.0, PLAN, FULL, 1)

    with pytest.raises(Overloaded, match="the time that the request has left of 10 s") as error:
        found.admit(1.0, 11.0, PLAN, FULL, 1)
    assert (error.value.retry_after, error.value.reason) == (50, "deadline")
    assert len(found.admit(0.0, 9.0, PLAN, FULL, 1)) == 1  # nothing is ahead of it


def test_an_idle_server_takes_a_request_of_any_size() -> None:
    assert len(dispatcher(max_wait=0.1).admit(0.0, 1.0, PLAN, FULL, 1000)) == 1000


def test_a_stop_rule_that_saves_work_lets_more_images_in() -> None:
    found = dispatcher()
    for _ in range(100):
        add(found, 1, rule=EXACT)
        run_all(found)
    before = found.predicted_wait()
    found.admit(0.0, 1e6, PLAN, EXACT, 1)

    assert before == 0
    assert found.predicted_wait() == pytest.approx(12, rel=0.01)  # 10 cheap views and one of the other


def test_predicted_wait_counts_decoding_as_soon_as_one_image_was_decoded() -> None:
    found = dispatcher(max_wait=1000.0)
    first = in_line(found, 1)
    assert found.predicted_wait() == 30
    decoding = found.next(0.0)
    assert isinstance(decoding, Decoding)
    found.decoded(0.0, first, decoding.work(), 7.0)
    assert found.predicted_wait() == 30

    in_line(found, 2)
    assert found.predicted_wait() == 30 + 7 + 30


def test_predicted_wait_follows_the_measured_pace() -> None:
    found = dispatcher(max_wait=1000.0)
    for _ in range(10):
        add(found, 1)
    run_all(found, slowness=3)
    found.admit(0.0, 1e6, PLAN, FULL, 1)

    assert found.predicted_wait() == pytest.approx(90, rel=0.05)


def test_the_pace_is_that_of_the_time_in_which_something_was_to_be_done() -> None:
    """Hours without a request, or with an engine that is opened anew, are no sign of slowness."""

    def done(found: Dispatcher, now: float) -> float:
        batch = next_batch(found, now)
        found.done(batch, answers(batch), now + batch.seconds)
        return now + batch.seconds

    found = dispatcher(max_wait=1000.0, batch_pixels=[10, 10])
    for brightness in range(5):
        add(found, brightness)
    run_all(found)
    now = 36_000.0
    for brightness in range(5):
        add(found, brightness, now=now)
    now = done(found, now)
    first = found.predicted_wait()

    found.pause(0)
    found.pause(1)
    now += 500
    found.resume(0, now)
    found.resume(1, now)
    done(found, now)

    assert first == pytest.approx(140)
    assert found.predicted_wait() < first


def test_what_is_decoded_is_not_waited_for_any_more() -> None:
    found = dispatcher(max_wait=1e9)
    in_line(found, 1)
    known = found.next(0.0)
    assert isinstance(known, Decoding)
    found.decoded(5.0, known.job, known.work(), 5.0)
    run_all(found)
    for brightness in range(3):
        in_line(found, brightness)

    waits = [found.predicted_wait()]
    for _ in range(3):
        decoding = found.next(10.0, run=False)
        assert isinstance(decoding, Decoding)
        found.decoded(10.0, decoding.job, decoding.work(), 5.0)
        waits.append(found.predicted_wait())

    assert [before - after for before, after in pairwise(waits)] == pytest.approx([5.0] * 3)


def test_an_image_that_needs_more_views_than_others_is_expected_to_need_them() -> None:
    found = dispatcher(max_wait=1e9)
    for brightness in range(30):
        add(found, brightness % 10, rule=EXACT)
    run_all(found)
    add(found, 3, rule=EXACT, sureness=140)

    now, waits = 0.0, []
    while isinstance(batch := found.next(now), Batch):
        now += batch.seconds
        found.done(batch, answers(batch), now)
        waits.append(found.predicted_wait())

    assert all(waits[:-1])
    assert waits[-1] == 0
