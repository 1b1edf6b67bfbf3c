from resnet_ensemble.server.hangs import Runs


def test_a_run_hangs_after_the_limit_or_many_times_its_plan_whichever_is_longer() -> None:
    runs: Runs[str] = Runs(limit=10.0)
    runs.begin("a", "small", 0.1, now=100.0)
    runs.begin("b", "large", 1.0, now=100.0)

    assert not runs.overdue(109.9)
    assert {key: run.what for key, run in runs.overdue(110.0).items()} == {"a": "small"}
    assert runs.overdue(120.0).keys() == {"a", "b"}


def test_a_run_that_has_ended_does_not_hang() -> None:
    runs: Runs[str] = Runs(limit=10.0)
    runs.begin("a", "first", 0.1, now=0.0)
    runs.end("a")
    runs.begin("a", "second", 0.1, now=9.0)

    assert not runs.overdue(18.9)
    assert runs.overdue(19.0)["a"].what == "second"
