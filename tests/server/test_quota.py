import pytest

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.quota import Memory, Quota


def test_a_client_may_hold_up_to_the_limit() -> None:
    quota = Quota(3)

    with quota.hold("a", 2), quota.hold("a", 1), pytest.raises(ApiError, match="a has 3 images in progress"):
        quota.hold("a", 1).__enter__()


def test_without_a_limit_everything_is_allowed() -> None:
    with Quota(None).hold("a", 10**9):
        pass


def test_clients_do_not_share_a_quota() -> None:
    quota = Quota(1)

    with quota.hold("a", 1), quota.hold("b", 1):
        pass


def test_what_was_held_is_given_back_even_after_a_failure() -> None:
    quota = Quota(1)
    with pytest.raises(ZeroDivisionError), quota.hold("a", 1):
        raise ZeroDivisionError

    with quota.hold("a", 1):
        pass
    assert not quota._held


def test_bodies_in_progress_have_only_so_many_bytes_together() -> None:
    memory = Memory(100)
    with memory.hold(60) as first:
        first(60)
        with pytest.raises(ApiError, match="have 60 bytes, and 50 more would come; together 100"), memory.hold(50):
            pass
        with memory.hold(0) as second:
            second(40)
            with pytest.raises(ApiError, match="have 100 bytes, and 1 more would come"):
                second(1)

    with memory.hold(100):
        pass


def test_what_is_announced_and_does_not_come_keeps_nobody_away() -> None:
    memory = Memory(100)
    with memory.hold(100), memory.hold(100) as second:
        second(100)
