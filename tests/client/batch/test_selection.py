"""Which inputs are done: a sample, and those that were seen."""

from collections.abc import Iterator

from resnet_ensemble.client.batch._places import Item
from resnet_ensemble.client.batch._selection import Seen, sampled


def named(count: int) -> Iterator[Item]:
    return (Item(f"{n}.jpg", f"{n}.jpg") for n in range(count))


def test_a_sample_is_the_same_in_any_order() -> None:
    chosen = {item.id for item in sampled(named(2000), 0.1)}

    assert 150 < len(chosen) < 250
    assert {item.id for item in sampled(reversed(list(named(2000))), 0.1)} == chosen
    assert len(list(sampled(named(10), None))) == len(list(sampled(named(10), 1.0))) == 10


def test_seen_ids_are_known() -> None:
    seen = Seen(["a", "b"])

    assert [seen.add(id) for id in ("a", "c", "c", "b")] == [False, True, False, False]
