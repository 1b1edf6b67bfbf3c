"""The README can't lie: its commands and its Python are run, and its numbers are those of the bundle."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contestants import CENTER, EVERY, LITSERVE, LITSERVE_SINGLE, NAIVE, NAIVE_SAME
from benchmarks.summary import OURS, Round, median
from resnet_ensemble.client.batch import COLUMNS
from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.server.errors import KINDS
from tests.server.test_process import process, wait_until_ready


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


@pytest.fixture(scope="module")
def server(shipped: Bundle) -> Iterator[str]:
    with process(RESNET_BUNDLE=str(shipped.path)) as (_, url):
        wait_until_ready(url)
        yield url.removeprefix("http://")


def blocks(readme: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


def run(command: list[str], root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_times(answer: Any) -> Any:
    """An answer without what differs between runs and, in the last digits, between CPUs."""
    if isinstance(answer, dict):
        return {k: without_times(v) for k, v in answer.items() if k not in ("timings_ms", "latency_ms", "request_id")}
    if isinstance(answer, list):
        return [without_times(entry) for entry in answer]
    if isinstance(answer, str) and (classified := re.fullmatch(r"(0\.\d{6})(:\d+:.*)", answer)):
        return f"{float(classified[1]):.2f}{classified[2]}"
    return round(answer, 2) if isinstance(answer, float) else answer


def test_every_curl_prints_the_answer_that_is_shown(readme: str, root: Path, server: str) -> None:
    pairs = zip(blocks(readme), blocks(readme)[1:], strict=False)
    shown = [
        (sh, answer)
        for (kind, sh), (next_kind, answer) in pairs
        if (kind, next_kind) == ("sh", "json") and "curl " in sh
    ]

    assert shown
    for command, answer in shown:
        printed = run(["bash", "-c", command.replace("localhost:8000", server)], root)
        assert without_times(json.loads(printed)) == without_times(json.loads(answer))


def test_the_python_prints_what_is_shown(readme: str, root: Path, server: str) -> None:
    pairs = zip(blocks(readme), blocks(readme)[1:], strict=False)
    shown = [(a, b) for (kind, a), (next_kind, b) in pairs if (kind, next_kind) == ("python", "text")]

    assert len(shown) >= 3
    for code, printed in shown:
        assert run([sys.executable, "-c", code.replace("localhost:8000", server)], root) == printed


def test_the_job_gives_the_row_that_is_shown(readme: str, root: Path, server: str, tmp_path: Path) -> None:
    pairs = zip(blocks(readme), blocks(readme)[1:], strict=False)
    ((command, shown),) = [(sh, row) for (_, sh), (kind, row) in pairs if sh.startswith("resnet-batch")]
    (tmp_path / "bundles").symlink_to(root / "bundles")
    command = command.replace("localhost:8000", server).replace(
        "resnet-batch", f"{sys.executable} -m resnet_ensemble.client.batch"
    )

    printed = run(["bash", "-c", command], tmp_path)

    assert without_times(json.loads(printed)) == without_times(json.loads(shown))
    assert list(json.loads(shown)) == list(COLUMNS)


def test_every_make_target_that_is_named_exists(readme: str, root: Path) -> None:
    named = set(re.findall(r"make ([a-z-]+)", readme))

    assert {"serve", "test", "check", "bench", "install"} <= named
    for target in named:
        run(["make", "--dry-run", target], root)


def test_every_script_that_is_named_explains_itself(readme: str, root: Path) -> None:
    readme += (root / "training" / "README.md").read_text()
    scripts = set(re.findall(r"python ((?:training|export|benchmarks|clients/examples)/\w+\.py)", readme))
    modules = set(re.findall(r"python -m ((?:resnet_ensemble|benchmarks)[\w.]+)", readme))

    assert {"export/build_engines.py", "training/evaluate.py", "benchmarks/loading.py"} <= scripts
    assert {"resnet_ensemble.server", "benchmarks.serving"} <= modules
    modules |= {"resnet_ensemble.client", "resnet_ensemble.client.batch"}  # resnet-classify and resnet-batch
    commands = [[script] for script in scripts] + [["-m", module] for module in modules]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each imports for seconds, on one core
        printed = list(pool.map(lambda command: run([sys.executable, *command, "--help"], root), commands))
    assert [command for command, text in zip(commands, printed, strict=True) if "usage:" not in text] == []


def test_the_errors_are_those_recorded_in_the_bundle(readme: str, shipped: Bundle) -> None:
    recorded = [m for member in shipped.manifest.members for m in member.measured] + list(shipped.manifest.measured)

    assert {"center", "10crop"} <= {m.protocol for m in recorded}
    assert [m for m in recorded if f"{m.top1_error:.2f}" not in readme] == []
    assert all(m.images == 5000 for m in recorded)


SYSTEMS = {
    "this server": OURS,
    "FastAPI and ONNX Runtime, as one writes it first": NAIVE,
    "the same, one thread a run": NAIVE_SAME,
    "LitServe, batches of 8": LITSERVE,
    "LitServe without batches": LITSERVE_SINGLE,
}


def tables(readme: str) -> dict[str, list[list[str]]]:
    """The cells of each table's rows, by its first cell."""
    found = re.findall(r"(?:^\|.*\|\n)+", readme, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()] for table in found]
    return {table[0][0]: table for table in rows}


def test_the_speeds_are_those_of_the_report(readme: str, root: Path) -> None:
    report = json.loads((root / "benchmarks" / "results" / "serving-cifar10.json").read_text())
    cells = [cell for cell in report["closed"] if cell["system"] in SYSTEMS.values()]
    closed = {(c["workload"], c["system"], c["clients"]): median([Round(**r) for r in c["rounds"]]) for c in cells}
    opened = {(one["system"], f"{one['rate']:.0f}/s"): f"{1000 * one['p99']:,.0f}" for one in report["open"]}
    read = tables(readme)

    compared = 0
    for title, workload in (("images/s (p99 in ms)", CENTER), ("all four members, one view", EVERY)):
        for name, *told in read[title][2:]:
            found = [closed[workload, SYSTEMS[name], clients] for clients in (1, 8, 32)]
            assert told == [f"{one.rate:.0f} ({1000 * one.p99:.0f})" for one in found]
            compared += 1
    heads, _, *rows = read["one member, p99 in ms, arrivals at random"]
    for name, *told in rows:
        assert told == [opened[SYSTEMS[name], rate] for rate in heads[1:]]
        compared += 1
    assert compared == 13
    assert report["about"]["date"] in readme


def test_every_problem_code_is_listed(readme: str) -> None:
    assert [code for code, kind in KINDS.items() if f"{kind.status} `{code}`" not in readme] == []


def test_every_folder_is_on_the_map(readme: str, root: Path) -> None:
    for folder in ("training", "export", "server", "clients/python", "bundles", "deploy", "tests", "benchmarks"):
        assert (root / folder).is_dir()
        assert f"`{folder}/`" in readme
