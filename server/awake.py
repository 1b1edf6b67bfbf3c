"""CPUs that do not halt between two requests, in virtual machines.

A virtual CPU that halts leaves its core to others of the host, and may wake up where it shares one. Then every engine
runs at 0.5 to 0.7 of its pace, for about a second, and requests queue up. It happens only where CPUs are idle at times:
at 80 % of the capacity, never at 100 %. With ten crops at even intervals, 26/s, the 99th percentile of six runs of 40 s
was 0.07 to 1.4 s, and of six others 0.05 to 0.07 s with CPUs that are kept from halting (CIFAR-10, four members, a lone
image takes 0.04 s; two Zen 4 cores of a Firecracker virtual machine, Linux 6.18, 2026-11-27).

Linux polls instead of halting while a program holds /dev/cpu_dma_latency open and has written 0 to it
(Documentation/power/pm_qos_interface). This is done only under the idle driver `haltpoll`, which exists for virtual
machines with CPUs of their own: elsewhere it would cost power, and make busy cores slower.
"""

import asyncio
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")  # of root; in Docker, where it is given: --device /dev/cpu_dma_latency
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
