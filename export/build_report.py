"""What build_engines.py tells of a run: a table for people, JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engine_store import DECISIVE_BATCH, REPORT, Choice, EngineStore, Record
from resnet_ensemble.export.engines import Precision


@dataclass(frozen=True)
class Row:
    """One line of the table: an engine, or why there is none."""

    member: str
    backend: str
    precision: Precision
    record: Record | None
    note: str

    @property
    def key(self) -> str:
        """Its name in the report."""
        return f"{self.member}/{self.backend}/{self.precision}"


def table(rows: Sequence[Row], chosen: set[str]) -> str:
    """The rows as aligned text."""
    batches = sorted({n for row in rows if row.record for n in row.record.views_per_second}, key=int)
    rates = [f"views/s x{n}" for n in batches]
    cells = [["member", "backend", "precision", *rates, "agreement", "max |dp|", "MB", "build s", "verdict"]]
    for row in rows:
        if row.record is None:
            cells.append([row.member, row.backend, row.precision, *("" for _ in rates), "", "", "", "", row.note])
            continue
        record = row.record
        verdict = "chosen" if record.key in chosen else record.verdict
        cells.append(
            [
                record.member,
                f"{record.backend} {record.version}",
                record.precision,
                *(f"{record.views_per_second[n]:,.0f}" if n in record.views_per_second else "" for n in batches),
                f"{record.agreement:.1%} of {record.gate_views}",
                f"{record.difference:.1e}",
                f"{record.size / 1e6:.1f}",
                f"{record.build_seconds:.2f}",
                f"{verdict}, {row.note}",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def as_json(bundle: Bundle, rows: Sequence[Row], chosen: dict[str, str], choice: Choice | None) -> str:
    """The rows as JSON: engines with what was found of them, what was chosen, and why others are not there."""
    content = {
        "bundle": bundle.identity,
        "chosen": chosen,
        "choice": choice and asdict(choice),
        "engines": {row.key: asdict(row.record) | {"note": row.note} for row in rows if row.record},
        "without": {row.key: row.note for row in rows if not row.record},
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def unmade(note: str) -> str:
    """The same of a bundle that there is not yet. `note`: what would happen first."""
    content: dict[str, object] = {
        "bundle": None,
        "chosen": {},
        "choice": None,
        "engines": {},
        "without": {},
        "note": note,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def told(choice: Choice) -> str:
    """How good the engines are together that were chosen."""
    agreeing = round(choice.agreement * choice.images)
    text = f"the chosen together, over ten crops: FP32's label on {agreeing} of {choice.images} pictures"
    text += f" ({choice.agreement:.1%}), max |dp| {choice.difference:.1e}"
    if choice.error is not None:
        text += f", error {choice.error:.2f} % (FP32: {choice.reference_error:.2f} %)"
    return f"{text}; faster combinations that did not pass: {choice.refused}"


def summary(bundle: Bundle, rows: Sequence[Row], store: EngineStore, *, dry_run: bool) -> str:
    """How many were built, and where they are."""
    built = sum(row.note in ("built", "would be built") for row in rows)
    reused = sum(row.note == "reused" for row in rows)
    failed = sum(row.note.startswith("failed") for row in rows)
    counts = f"{built or 'no'} engines {'to build' if dry_run else 'built'}, {reused} reused"
    counts += f", {failed} failed" if failed else ""
    written = "nothing was written" if dry_run or not built else f"written to {store.folder / REPORT}"
    return f"{bundle.identity}: {counts}; chosen by views/s x{DECISIVE_BATCH} among those that passed; {written}"
