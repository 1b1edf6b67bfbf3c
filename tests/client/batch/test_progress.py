from resnet_ensemble.client.batch._progress import Progress, duration


def test_the_line_tells_rate_eta_errors_and_percentiles() -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0], total=1000, skipped=100)
    progress.line()
    now[0], progress.rows, progress.errors = 10.0, 50, 2
    progress.latencies_ms.extend(range(1, 101))
    progress.views_used, progress.views_planned, progress.concurrency = 3, 4, 7

    assert progress.line() == (
        "150/1,000 (15.0%), 5.0/s, ETA 2:50, errors 2, p50 50 ms, p95 95 ms, views saved 25%, in flight 7"
    )


def test_the_rate_is_of_late() -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        progress.rows += 10 if second < 50 else 1
        progress.rate()

    assert 0.9 < progress.rate() < 1.2
    assert "ETA" not in progress.line()


def test_durations_are_read_easily() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3723, 360000)] == ["0:00", "1:01", "1:02:03", "100:00:00"]
