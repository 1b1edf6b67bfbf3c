"""CPUs that do not halt between two requests, in virtual machines.

After a virtual CPU has halted, engines run at 0.5 to 0.7 of their pace at times, for about a second, and requests queue
up; why is the host's secret. It was seen where CPUs are idle at times, at 80 % of the capacity, and not at 100 %. With
ten crops at even intervals, 25/s, the 99th percentiles of three runs of 30 s were 208, 196 and 1,077 ms, and of three
in turn with them, whose CPUs were kept from halting, 42, 42 and 47 (CIFAR-10, four members, a lone image takes 37; two
Zen 4 cores of a Firecracker virtual machine, Linux 6.18, 2026-11-27).

Linux polls instead of halting while a program holds /dev/cpu_dma_latency open and has written 0 to it
(Documentation/power/pm_qos_interface). This is done only under the idle driver `haltpoll`, which is for virtual
machines: elsewhere it would cost power. In a virtual machine without an idle driver requests queued up at times, too,
whether its CPUs could halt or were kept busy (three runs of 30 s of each, in turns; two cores of an Intel Xeon,
2026-11-28).
"""

import asyncio
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")  # only root may write to it, as a rule
DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
# Seconds after the last request, so that CPUs don't halt in the gaps of a stream of requests.
LINGER = 0.25


class Awake:
    """Keeps CPUs from halting while requests are answered, where that is possible and makes sense. Of one event loop.

    - device, driver: the kernel's files, as above
    """

    def __init__(self, device: Path = DEVICE, driver: Path = DRIVER) -> None:
        self._device = device
        self._possible = _driver(driver) == "haltpoll" and os.access(device, os.W_OK)
        if self._possible:
            log.info("CPUs are kept from halting while requests are answered, by %s", device)
        self._requests = 0
        self._descriptor: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def holds(self) -> bool:
        """Whether CPUs are kept from halting now."""
        return self._descriptor is not None

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a request is answered, and a little longer."""
        self._requests += 1
        if self._possible and self._requests == 1:
            self._hold()
        try:
            yield
        finally:
            self._requests -= 1
            if self.holds and not self._requests:
                self._timer = asyncio.get_running_loop().call_later(LINGER, self.close)

    def close(self) -> None:
        """Let CPUs halt again."""
        if self._timer:
            self._timer.cancel()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._timer = self._descriptor = None

    def _hold(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._descriptor is not None:
            return
        try:
            self._descriptor = os.open(self._device, os.O_WRONLY)
            os.write(self._descriptor, struct.pack("i", 0))
        except OSError as error:  # a sandbox may forbid it; then it is as if there were no such device
            log.warning("CPUs may halt between requests: %s", error)
            self._possible = False
            self.close()


def _driver(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # no Linux, or a kernel without drivers for idle CPUs
        return ""
