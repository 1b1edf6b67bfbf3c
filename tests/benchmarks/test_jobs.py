import sys
from pathlib import Path

from benchmarks.jobs import Processes
from tests.conftest import until

_WORK = "import time\nwhile time.process_time() < 0.2: pass\nprint('done', flush=True)\ntime.sleep(60)"


def test_a_restart_is_another_process_and_its_cpu_time_comes_on_top(tmp_path: Path) -> None:
    with Processes([sys.executable, "-c", _WORK], tmp_path / "log") as processes:
        until(lambda: "done" in processes.log.read_text())
        first = processes.main

        processes.restart()

        assert first.poll() is not None
        assert processes.main.pid != first.pid
        until(lambda: "done" in processes.log.read_text())
        assert processes.cpu_seconds() > 0.35
    assert processes.main.poll() is not None
