"""Scripts that are run by a Python without this project."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "training").mkdir()
    for file in ("environment.py", "plot.py"):
        shutil.copy(root / "training" / file, tmp_path / "training")
    return tmp_path


def run(python: Path, checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), "training/plot.py", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_without_make_install_they_say_so(bare: Path, checkout: Path) -> None:
    result = run(bare, checkout)

    assert result.returncode == 1
    assert result.stderr.startswith("resnet_ensemble is not installed; run `make install` in")


def test_after_make_install_they_go_on_with_its_python(bare: Path, checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "installed").touch()
    # A Python that has the project stands in for that of the new environment.
    (checkout / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (checkout / ".venv" / "bin" / "python").chmod(0o755)

    result = run(bare, checkout)

    assert result.returncode == 0, result.stderr
    assert "--beside" in result.stdout


def test_a_broken_environment_does_not_call_itself_for_ever(checkout: Path) -> None:
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    (checkout / ".venv" / "installed").touch()

    result = run(checkout / ".venv" / "bin" / "python", checkout)

    assert result.returncode == 1
    assert "make install" in result.stderr
