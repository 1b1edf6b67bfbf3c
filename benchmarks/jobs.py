"""Processes that do jobs: a JSON object a line in, a JSON object a line out. And what processes cost: CPU and memory.

Everything that is measured is a process of its own, so that nothing shares an interpreter lock or a heap. A server
whose turn it is not is paused (SIGSTOP), so that one that polls while it has no work takes nothing from the others.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
_PROC = Path("/proc")
_SESSION, _USER, _SYSTEM = 3, 11, 12  # fields of /proc/PID/stat after the name
_STOP_SECONDS = 20


class Processes:
    """A command and all processes that it starts. A context manager: they end with it.

    - log: where its standard error goes
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, pipes: bool = False
    ) -> None:
        self.log = log
        self._command = command
        self._environment = {**os.environ, **(environment or {})}
        self._pipe = subprocess.PIPE if pipes else None
        self._before = 0.0  # CPU seconds of those that were ended
        self.main = self._begin()

    def restart(self) -> None:
        """End them, and start the same command again."""
        spent = self.cpu_seconds()
        self._end()
        self._before = spent
        self.main = self._begin()

    def pause(self) -> None:
        """Stop everything until `go_on`."""
        os.killpg(self.main.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run."""
        os.killpg(self.main.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """CPU time of those that run now, and of those before a restart."""
        ticks = sum(int(fields[_USER]) + int(fields[_SYSTEM]) for _, fields in self._all())
        return self._before + ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """RSS, summed: what two of them share counts twice."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = 0
        for folder, _ in self._all():
            try:
                total += int((folder / "statm").read_text().split()[1]) * page
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        return total

    def failure(self) -> str:
        """The end of its log."""
        return f"{' '.join(map(str, self.main.args))}: {self.log.read_text()[-2000:]}"  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> "subprocess.Popen[str]":
        with self.log.open("w") as file:
            return subprocess.Popen(  # noqa: S603  # the commands are in this folder
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=self._pipe,
                stdout=self._pipe or file,
                stderr=file,
                text=True,
                start_new_session=True,
            )

    def _end(self) -> None:
        if self.main.poll() is None:
            self.go_on()
            self.main.terminate()
            try:
                self.main.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.main.kill()
                self.main.wait()
            with suppress(ProcessLookupError):  # what it has left behind
                os.killpg(self.main.pid, signal.SIGKILL)
        for pipe in (self.main.stdin, self.main.stdout):
            if pipe:
                pipe.close()

    def _all(self) -> list[tuple[Path, list[str]]]:
        """Folders in /proc, and fields of their `stat`, of the session that the command leads."""
        found = []
        for folder in _PROC.glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[_SESSION]) == self.main.pid:
                found.append((folder, fields))
        return found


class Worker(Processes):
    """A module of this folder that does jobs with `serve_jobs`."""

    def __init__(self, module: str, log: Path, *arguments: str) -> None:
        super().__init__([sys.executable, "-m", f"benchmarks.{module}", *arguments], log, pipes=True)

    def do(self, **job: Any) -> dict[str, Any]:
        """The answer to a job. Raises SystemExit if the process has ended."""
        assert self.main.stdin is not None
        assert self.main.stdout is not None
        try:
            print(json.dumps(job), file=self.main.stdin, flush=True)
        except BrokenPipeError:
            raise SystemExit(self.failure()) from None
        line = self.main.stdout.readline()
        if not line:
            raise SystemExit(self.failure())
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve_jobs(do: Callable[..., dict[str, Any]]) -> None:
    """In the worker: do each job that comes, until there are no more."""
    # Unbuffered, as PYTHONUNBUFFERED makes it, sys.stdout drops what an interrupted write leaves over, as there are
    # once uvloop has run.
    with open(sys.stdout.fileno(), "w", closefd=False) as answers:  # a file that is open already
        for line in sys.stdin:
            print(json.dumps(do(**json.loads(line))), file=answers, flush=True)


def kill_children() -> None:
    """Kill what this process has started, with all that these have started. Only on Linux; elsewhere none are found."""
    for listed in _PROC.glob("self/task/*/children"):
        for pid in map(int, listed.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def machine_busy_seconds() -> float:
    """CPU time since boot that was not idle, of all processes, and what the host of a virtual machine took."""
    user, nice, system, _idle, _wait, *interrupts_and_steal = map(
        int, (_PROC / "stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
