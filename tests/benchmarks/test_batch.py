"""A batch job beside fixed numbers of requests. What the numbers are is not looked at: other tests run here."""

from benchmarks.batch import bench
from resnet_ensemble.server.settings import SHIPPED_BUNDLE


def test_both_ways_have_every_picture_answered() -> None:
    with bench(SHIPPED_BUNDLE, None, limit=0.25, count=12, protocol="center") as prepared:
        rounds = [prepared.adaptive(), prepared.fixed(2)]

    assert all(one.rate > 0 for one in rounds)
    assert all(0 <= one.refused < 1 for one in rounds)
