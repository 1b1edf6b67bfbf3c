"""Findings of processes, also of those that crash."""

import os
import signal

from resnet_ensemble.export import gpu_report
from resnet_ensemble.export.gpu_report import Check, Report


def checked(report: Report, found: str) -> int:
    report.run("some", lambda: (None, found))
    report.rates["engine"] = {"1": [2.0]}
    return os.getpid()


def crashed(report: Report) -> None:
    report.run("some", lambda: (None, "found before"))
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_engine_is_checked_in_a_process_of_its_own() -> None:
    report = Report({})

    assert gpu_report.apart(report, "engine", checked, "right") not in (None, os.getpid())
    assert report.checks == [Check("some", held=True, found="right")]
    assert report.rates == {"engine": {"1": [2.0]}}


def test_a_library_that_crashes_is_a_finding_and_what_was_found_before_is_kept() -> None:
    report = Report({})

    assert gpu_report.apart(report, "engine", crashed) is None
    assert report.checks == [
        Check("some", held=True, found="found before"),
        Check("engine: all else", held=False, found="its process ended with SIGKILL"),
    ]
    assert gpu_report.apart(report, "next", checked, "right") is not None
