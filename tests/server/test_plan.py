from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.server.plan import Stage, Step, cheapest_first, in_order


def test_the_cheapest_views_come_first_whatever_the_order_of_the_members() -> None:
    plan = cheapest_first("10crop", [[0.3], [0.1], [0.2]], [10])

    assert [(stage.member, stage.first, stage.views) for stage in plan.stages] == [(1, 0, 10), (2, 10, 10), (0, 20, 10)]
    assert plan.views == 30


def test_members_take_turns_when_their_large_views_cost_more_than_anothers_small_ones() -> None:
    plan = cheapest_first("multiscale", [[1.0, 4.0], [2.0, 8.0]], [2, 2])

    assert [(stage.member, stage.block) for stage in plan.stages] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_of_equally_expensive_members_the_first_comes_first() -> None:
    assert [stage.member for stage in cheapest_first("flip", [[1.0], [1.0]], [2]).stages] == [0, 1]


def test_a_range_of_a_plan_is_cut_at_its_stages() -> None:
    plan = cheapest_first("10crop", [[1.0], [3.0]], [10])

    found = [(stage.member, start, stop) for stage, start, stop in plan.between(7, 12)]

    assert found == [(0, 7, 10), (1, 0, 2)]
    assert plan.seconds_between(7, 12) == 3 * 1.0 + 2 * 3.0
    assert plan.between(4, 4) == []


COSTS = st.integers(1, 4).flatmap(
    lambda blocks: st.lists(st.lists(st.floats(0, 9), min_size=blocks, max_size=blocks), min_size=1, max_size=5)
)


@given(COSTS, st.data())
def test_every_view_is_planned_once_and_none_after_a_more_expensive_one(
    seconds: list[list[float]], data: st.DataObject
) -> None:
    blocks = len(seconds[0])
    views = data.draw(st.lists(st.integers(1, 10), min_size=blocks, max_size=blocks))

    plan = cheapest_first("p", seconds, views)

    assert sorted((s.member, s.block) for s in plan.stages) == [
        (m, b) for m in range(len(seconds)) for b in range(blocks)
    ]
    assert [s.seconds for s in plan.stages] == sorted(s.seconds for s in plan.stages)
    assert all(stage.seconds == seconds[stage.member][stage.block] for stage in plan.stages)
    cut = data.draw(st.integers(0, plan.views))
    covered = [
        stage.first + i
        for a, b in ((0, cut), (cut, plan.views))
        for stage, x, y in plan.between(a, b)
        for i in range(x, y)
    ]
    assert covered == list(range(plan.views))
    assert plan.views == len(seconds) * sum(views)


def test_a_plan_in_any_order_joins_what_stands_side_by_side() -> None:
    steps = [Step(0, 0, 4), Step(1, 0, 0), Step(1, 0, 1), Step(0, 0, 5), Step(1, 1, 2)]

    plan = in_order("p", [[1.0, 4.0], [2.0, 8.0]], steps)

    assert plan.stages == (
        Stage(0, 0, 0, 1, 1.0, start=4),
        Stage(1, 0, 1, 2, 2.0, start=0),
        Stage(0, 0, 3, 1, 1.0, start=5),
        Stage(1, 1, 4, 1, 8.0, start=2),
    )
    assert [(stage.member, start, stop) for stage, start, stop in plan.between(2, 4)] == [(1, 1, 2), (0, 5, 6)]
    assert plan.seconds == 1 + 2 * 2 + 1 + 8


@given(st.permutations([Step(m, b, v) for m in range(2) for b in range(2) for v in range(3)]), st.integers(0, 12))
def test_the_ranges_of_a_plan_are_the_steps_it_was_made_of(steps: list[Step], cut: int) -> None:
    plan = in_order("p", [[1.0, 2.0], [3.0, 4.0]], steps)

    ranges = [*plan.between(0, cut), *plan.between(cut, 12)]
    assert [Step(stage.member, stage.block, view) for stage, a, b in ranges for view in range(a, b)] == steps
