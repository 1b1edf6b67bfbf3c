"""What was found on a GPU, engine by engine, each looked at in a process of its own."""

import json
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MARKS = {True: "holds", False: "**does not hold**", None: "not tried"}


class DoesNotHold(Exception):
    """What a check found instead of what it should."""


@dataclass
class Check:
    """One thing that should hold. `held` is None where it could not be tried, since what it needs failed."""

    name: str
    held: bool | None
    found: str


@dataclass
class Report:
    """Everything that was found. `rates`: views/s, one run at a time and two, by engine and batch."""

    about: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether all that was tried held, and all could be tried."""
        return all(check.held for check in self.checks)

    def run(self, name: str, check: Callable[[], tuple[T, str]]) -> T | None:
        """Do a check; keep what it says, or how it failed. What it made, or None."""
        try:
            made, found = check()
        except Exception as error:  # noqa: BLE001  # whatever fails here is what somebody wants to read
            kind = "" if isinstance(error, DoesNotHold) else f"{type(error).__name__}: "
            where = "" if isinstance(error, DoesNotHold) else f" ({_place(error)})"
            self.add(Check(name, held=False, found=f"{kind}{error}{where}"))
            return None
        self.add(Check(name, held=True, found=found))
        return made

    def skip(self, name: str, why: str) -> None:
        """Keep that a check could not be tried."""
        self.add(Check(name, held=None, found=why))

    def add(self, check: Check) -> None:
        """Keep what a check found."""
        self.checks.append(check)
        print(f"{MARKS[check.held]}: {check.name}", file=sys.stderr)

    def markdown(self) -> str:
        """For people."""
        lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in self.about.items()), ""]
        lines += ["| check | | found |", "|---|---|---|"]
        lines += [
            f"| {c.name} | {MARKS[c.held]} | {' '.join(c.found.split()).replace('|', '/')} |" for c in self.checks
        ]
        batches = sorted({int(n) for rates in self.rates.values() for n in rates})
        if batches:
            lines += ["", "Views/s by batch, one run at a time / two side by side (medians).", ""]
            lines += [f"| engine | {' | '.join(map(str, batches))} |", "|---|" + "---|" * len(batches)]
            for name, rates in self.rates.items():
                cells = [" / ".join(f"{rate:,.0f}" for rate in rates.get(str(n), [])) for n in batches]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """gpu-check.md and gpu-check.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu-check.md").write_text(self.markdown())
        (folder / "gpu-check.json").write_text(json.dumps(asdict(self) | {"held": self.held}, indent=1) + "\n")


class _Sent(Report):
    """What a process finds for another."""

    def __init__(self, to: Connection) -> None:
        super().__init__({})
        self._to = to

    def add(self, check: Check) -> None:
        """Send it at once: the next check may end the process."""
        self._to.send(check)


def apart(report: Report, title: str, work: Callable[..., T], *given: Any) -> T | None:
    """`work(report, *given)` in a process of its own. What it returns, or None if the process ended before."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has asked CUDA anything can't use it
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, given))
    process.start()
    sender.close()
    made = None
    try:
        while isinstance(found := receiver.recv(), Check):
            report.add(found)
        made, rates = found
        report.rates |= rates
    except EOFError:
        process.join()
        code = process.exitcode or 0
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        report.add(Check(f"{title}: all else", held=False, found=f"its process ended with {ended}"))
    process.join()
    return made


def _work(to: Connection, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    report = _Sent(to)
    to.send((work(report, *given), report.rates))


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
