"""What this host is, as far as an engine depends on it."""

import math
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# More leaves the cores to others: of one that another process wants, too, a thread gets 25 % so. With 1 it would get
# 44 %, but with three workers on two cores the 99th percentile of a refusal at three times the capacity was 126 to 263
# ms then, and 31 to 144 with 5, all else equal (three rounds; two Zen 3 cores, Linux 6.18, 2026-11-26).
_NICER = 5


def cores() -> int:
    """CPU cores that this process may use: its affinity, and the cgroup's quota rounded up.

    Python and ONNX Runtime count the machine's cores, which in a container are not ours.
    """
    affinity = len(_cpus()) or os.cpu_count() or 1
    return max(1, min(affinity, _quota(Path("/sys/fs/cgroup"), _groups()) or affinity))


def keep_to_core(number: int) -> None:
    """Let this thread, and those that it starts from now on, run on one of our cores only, counted round.

    Linux leaves two busy threads on one core at times while the other is idle. Two workers that keep to a core each
    gave 1.22 and 1.13 times the images/s of two that don't, for 8 and 32 clients, at 0.74 and 0.84 times the p99
    (CIFAR-10 center, 16 rounds), and 1.16 and 1.14 times while another process kept a core busy (8 rounds; two Zen 3
    cores, Linux 6.18, 2026-11-26). Nothing happens under a quota of fewer than our CPUs: others are to have the rest.
    """
    if cpus := keepable():
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(threading.get_native_id(), {cpus[number % len(cpus)]})


def keepable() -> list[int]:
    """The CPUs that threads of ours may be kept to, by their numbers; none under a quota, or where it can't be done."""
    cpus = _cpus()
    return cpus if len(cpus) == cores() else []


@contextmanager
def on_cpu(number: int) -> Iterator[None]:
    """Let this thread run on one CPU only meanwhile, where that is allowed."""
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def leave_core() -> None:
    """Let this thread run on any of our cores again, like the main one."""
    if cpus := _cpus():
        with suppress(OSError):
            os.sched_setaffinity(threading.get_native_id(), cpus)


def give_way() -> None:
    """Where they compete, the main thread runs before this one, and before those that this one starts from now on.

    On Linux, that is: elsewhere niceness is of whole processes. A server at two to three times its capacity whose
    engines and decoders are nicer and don't interrupt others when they wake up answers what it refuses in 2 to 6 ms,
    instead of 400 (medians; 2 Zen 5 cores, Linux 6.18).
    """
    if sys.platform == "linux":
        thread, main = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid())
        with suppress(OSError):  # a sandbox may forbid it; then refusing takes longer, and nothing else is amiss
            os.setpriority(os.PRIO_PROCESS, thread, main + _NICER)
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def cpu() -> str:
    """The CPU's model, and the vector instructions that compiled graphs may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = f"{about.get('flags', '')} {about.get('Features', '')}".split()  # of x86, of ARM
    vectors = ("avx", "amx", "fma", "asimd", "sve", "sme", "bf16", "i8mm")
    parts = [f"{name} {about[name]}" for name in ("CPU implementer", "CPU part") if name in about]
    model = about.get("model name") or " ".join([platform.machine(), *parts])
    return " ".join([model, *sorted(flag for flag in flags if flag.startswith(vectors))])


def _cpus() -> list[int]:
    """What the main thread may run on; none where there is no affinity."""
    return sorted(os.sched_getaffinity(os.getpid())) if hasattr(os, "sched_getaffinity") else []


def _groups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:  # no cgroups here
        return ""


def _quota(mount: Path, groups: str) -> int | None:
    """Cores that a process in these cgroups may use: the lowest quota of its own and those around; None without one.

    - groups: as /proc/self/cgroup has them: "0::/system.slice/x.service", and of version 1 a line a controller. In a
      container it is mostly the root of what is mounted
    """
    found = [_limit(mount), _limit(mount / "cpu")]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        inner = Path(path.lstrip("/"))
        found += [_limit(root / group) for group in (inner, *inner.parents)]
    return min((limit for limit in found if limit), default=None)


def _limit(group: Path) -> int | None:
    """Of one: "200000 100000" in `cpu.max` is two cores. Version 1 has two files."""
    files = [group / "cpu.max"]
    if not files[0].exists():
        files = [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else math.ceil(int(quota) / int(period))
