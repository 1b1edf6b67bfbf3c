"""What the scheduler decides when batches fail and engines die, hang or are replaced."""

from tests.server.test_dispatch import add, dispatcher, in_line, next_batch, run_all


def test_a_failed_batch_is_run_part_by_part_and_one_bad_image_fails_alone() -> None:
    found = dispatcher()
    jobs = [add(found, label) for label in range(3)]
    batch = next_batch(found)
    assert found.failed(batch) == []

    first = next_batch(found)
    assert [part.job for part in first.parts] == [jobs[0]]
    assert found.failed(first) == [jobs[0]]
    run_all(found)
    assert [job.done for job in jobs[1:]] == [20, 20]
    assert found.images == 0


def test_what_is_lost_with_an_engine_is_run_once_more_when_it_is_back() -> None:
    found = dispatcher()
    job = add(found, 1)
    batch = next_batch(found)
    found.pause(0)
    assert found.lost(batch, first=True) == []
    run_all(found)
    assert job.views.tolist() == [0, 10]

    found.resume(0, 0.0)
    run_all(found)

    assert job.views.tolist() == [10, 10]


def test_what_kills_an_engine_twice_is_given_up() -> None:
    found = dispatcher()
    job = add(found, 1)
    for given_up in ([], [job]):
        batch = next_batch(found)
        assert found.lost(batch, first=True) == given_up
    assert found.images == 0


def test_what_ran_beside_a_batch_that_killed_the_engine_is_not_to_blame() -> None:
    found = dispatcher(streams=2)
    job = add(found, 1)
    for _ in range(3):
        batch = next_batch(found)
        assert found.lost(batch, first=False) == []
    run_all(found)

    assert job.done == 20


def test_images_that_wait_for_an_engine_that_is_gone_can_be_given_up() -> None:
    found = dispatcher()
    job = add(found, 1)
    found.pause(1)
    run_all(found)

    assert found.give_up(1) == [job]
    assert (found.images, found.waiting_views) == (0, 0)


def test_views_of_a_member_that_is_paused_keep_no_stream_busy() -> None:
    found = dispatcher(streams=2)
    add(found, 1)
    found.pause(1)

    assert run_all(found) == [(0, 5), (0, 3), (0, 1), (0, 1)]


def test_images_in_line_for_an_engine_that_is_gone_are_given_up() -> None:
    found = dispatcher()
    job = in_line(found, 1)

    assert found.give_up(1) == [job]
    assert found.next(0.0) is None
