import os
import platform
import sys
import threading
from pathlib import Path

import pytest

from resnet_ensemble.export import host


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", None), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_a_cgroup_quota_is_rounded_up_to_cores(tmp_path: Path, content: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content + "\n")

    assert host._quota(tmp_path, "0::/") == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", None), ("200000", 2), ("150000", 2), ("50000", 1)])
def test_so_is_one_of_a_cgroup_of_version_1(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")

    assert host._quota(tmp_path, "0::/") == cores


def test_the_lowest_quota_of_a_process_s_group_and_those_around_it_counts(tmp_path: Path) -> None:
    service = tmp_path / "system.slice" / "x.service"
    service.mkdir(parents=True)
    groups = "0::/system.slice/x.service\n"
    assert host._quota(tmp_path, groups) is None  # the root has no such file

    (service / "cpu.max").write_text("400000 100000\n")
    assert host._quota(tmp_path, groups) == 4
    (service.parent / "cpu.max").write_text("200000 100000\n")
    assert host._quota(tmp_path, groups) == 2
    assert host._quota(tmp_path, "0::/another\n") is None


def test_in_version_1_it_is_that_of_the_controller_of_cpus(tmp_path: Path) -> None:
    for controller, quota in (("cpu", "300000"), ("memory", "100000")):
        group = tmp_path / controller / "x.service"
        group.mkdir(parents=True)
        (group / "cpu.cfs_quota_us").write_text(quota)
        (group / "cpu.cfs_period_us").write_text("100000")

    assert host._quota(tmp_path, "9:name=systemd:/\n4:memory:/x.service\n1:cpu,cpuacct:/x.service\n0::/\n") == 3


def test_without_a_cgroup_there_is_no_quota(tmp_path: Path) -> None:
    assert host._quota(tmp_path, "0::/") is None


def test_cores_respect_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_quota", lambda *_: 1)

    assert host.cores() == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_cores_are_at_most_those_of_the_affinity() -> None:
    assert 1 <= host.cores() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize("number", [0, 1, 1000])
@pytest.mark.parametrize("quota", [None, 1])
def test_a_thread_keeps_to_one_core_without_a_quota(
    monkeypatch: pytest.MonkeyPatch, number: int, quota: int | None
) -> None:
    monkeypatch.setattr(host, "_quota", lambda *_: quota)
    ours, cores, found = os.sched_getaffinity(0), host.cores(), []

    def look() -> None:
        found.append((os.sched_getaffinity(0), host.cores()))

    def keep() -> None:
        host.keep_to_core(number)
        look()
        host.leave_core()
        look()

    thread = threading.Thread(target=keep)
    thread.start()
    thread.join()

    kept = {sorted(ours)[number % len(ours)]} if cores == len(ours) else ours
    assert found == [(kept, cores), (ours, cores)]
    assert os.sched_getaffinity(0) == ours


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_thread_is_on_one_cpu_for_a_while() -> None:
    ours = os.sched_getaffinity(0)

    with host.on_cpu(max(ours)):
        assert os.sched_getaffinity(0) == {max(ours)}

    assert os.sched_getaffinity(0) == ours


def test_under_a_quota_no_cpu_is_ours_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cpus", lambda: [4, 6, 7])
    monkeypatch.setattr(host, "_quota", lambda *_: None)
    assert host.keepable() == [4, 6, 7]

    monkeypatch.setattr(host, "_quota", lambda *_: 2)
    assert host.keepable() == []


def test_the_cpu_is_described_in_one_line() -> None:
    assert host.cpu()
    assert "\n" not in host.cpu()


@pytest.mark.parametrize(
    ("lines", "described"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse avx512f avx2 fma\n", "AMD EPYC avx2 avx512f fma"),
        (
            "Features\t: fp asimd aes sve i8mm bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
            "aarch64 CPU implementer 0x41 CPU part 0xd40 asimd bf16 i8mm sve",
        ),
        ("", "aarch64"),
    ],
    ids=["x86", "ARM", "unknown"],
)
def test_cpus_that_compute_differently_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, lines: str, described: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: lines)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    assert host.cpu() == described


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness is of whole processes")
def test_a_thread_that_gives_way_is_nicer_than_the_main_one_and_so_is_what_it_starts() -> None:
    found = []

    def look() -> None:
        thread = threading.get_native_id()
        found.append((os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)))

    def give_way() -> None:
        host.give_way()
        host.give_way()  # again makes no difference
        child = threading.Thread(target=look)
        child.start()
        child.join()
        look()

    before, policy = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    thread = threading.Thread(target=give_way)
    thread.start()
    thread.join()

    assert found == [(min(19, before + 5), os.SCHED_BATCH)] * 2
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)) == (before, policy)
