"""Serve a bundle: python -m resnet_ensemble.server

Settings are environment variables, listed below. SIGTERM and SIGINT stop the listener, answer what was accepted, and
exit with 0; what can't be ended, such as an engine that hangs, is left after RESNET_DRAIN_SECONDS, and the exit code is
1. SIGHUP loads the bundle again and switches to it if it is sound.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from resnet_ensemble.server.app import create_app
from resnet_ensemble.server.direct import DirectHttp
from resnet_ensemble.server.service import Service
from resnet_ensemble.server.settings import SettingsError, explain, from_environment

log = logging.getLogger(__name__)

# Seconds that a thread may keep the interpreter while another wants it. With Python's own 5 ms, engines and decoders
# interrupt the event loop in the middle of a refusal too often: at three times the capacity, once the pace is known,
# the 99th percentile of a 503 is 15 to 70 ms so, and was 100; with 0.5 ms, 150 to 400 (CIFAR-10 center, 2 Zen 5 cores).
_SWITCH_INTERVAL = 0.02
# Seconds that a connection stays open between requests. A server that closes it before its client does loses what is
# just on its way: with 1, that happened to 1 of 34,000 requests at three times the capacity. Load balancers wait 60.
_KEEP_ALIVE = 75
# Objects made and not freed until a garbage collection looks for cycles, while every thread waits. Answers leave none
# (tests/server/test_classifier.py), but with Python's own 700, requests that just wait in line are looked at.
_COLLECT_AFTER = 10_000
_GRACE = 5  # seconds after the drain limit in which engines end their runs and are closed


class _Server(uvicorn.Server):
    """Ends its process a while after the drain limit, whatever hangs."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        timer = threading.Timer((self.config.timeout_graceful_shutdown or 0) + _GRACE, _give_up)
        timer.daemon = True
        timer.start()


def _give_up() -> None:
    log.critical("not everything could be ended in time; exiting without it")
    logging.shutdown()
    os._exit(1)  # nothing less ends a process whose threads hang in native code


def _spare_collections() -> None:
    """What was loaded stays; a full garbage collection that looks at all of it stops every thread, once for 94 ms.

    What is left of the bundle before is looked at, though.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def main() -> int:
    """Run until a signal, or until the bundle turns out not to be servable."""
    argparse.ArgumentParser(
        prog="python -m resnet_ensemble.server",
        description=f"{__doc__}\n{explain()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    gc.set_threshold(_COLLECT_AFTER)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Strangers' images would fill the log: Pillow warns of much that it then decodes well.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        settings = from_environment()
    except SettingsError as error:
        print(f"resnet_ensemble.server: {error}", file=sys.stderr)
        return 2

    fatal: list[str] = []

    def stop(message: str) -> None:
        fatal.append(message)
        server.should_exit = True

    service = Service(settings, on_fatal=stop, on_loaded=_spare_collections)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        http=cast("Any", partial(DirectHttp, service)),
        timeout_graceful_shutdown=settings.drain_seconds,
        timeout_keep_alive=_KEEP_ALIVE,
        access_log=False,
        log_config=None,
    )
    server = _Server(config)
    # uvicorn handles these while it runs, and raises what it has caught again after a clean stop, when that must not
    # turn into an exit code. One that comes just before it runs must not be lost.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, lambda *_: None if server.should_exit else service.reload_soon())
    server.run()
    if any(thread.name.startswith("engine-") for thread in threading.enumerate()):
        _give_up()
    return 1 if fatal or not server.started else 0


if __name__ == "__main__":
    sys.exit(main())
