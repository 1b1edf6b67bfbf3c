"""What a stranger does: a new folder, one command, a picture. Slow, because environments are made for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from tests.server.test_process import free_port, wait_until_ready

MEGABYTE = 2**20


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """The files that git has or would add, in a new folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


@contextmanager
def running(command: list[str], folder: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def wait_for_environment(marker: Path) -> None:
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_make_serve_sets_up_and_answers_a_picture(checkout: Path) -> None:
    port = free_port()
    with running(["make", "serve", f"PORT={port}", f"PYTHON={sys.executable}"], checkout) as make:
        wait_for_environment(checkout / ".venv-serve" / "installed")
        wait_until_ready(f"http://127.0.0.1:{port}")
        ship = checkout / "bundles" / "cifar10" / "golden" / "ship.png"
        curl = ["curl", "-s", "-F", f"image=@{ship}", f"localhost:{port}/predict"]
        answer = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
        make.terminate()  # as a supervisor does, which knows of no other process
        make.wait(60)
        deadline = time.monotonic() + 60
        while subprocess.run(curl, capture_output=True, check=False).returncode == 0:
            assert time.monotonic() < deadline

    packages = {path.name.split("-")[0] for path in checkout.glob(".venv-serve/lib/*/site-packages/*")}
    assert answer["label"] == "ship"
    assert not {"torch", "torchvision", "onnx"} & packages
    assert size(checkout / ".venv-serve") < 450 * MEGABYTE


def test_the_dockerfile_s_commands_install_serve_and_check_health(checkout: Path, tmp_path: Path) -> None:
    """No engine can build the image here, so its cpu target is followed by hand: RUN, CMD and HEALTHCHECK."""
    dockerfile = (checkout / "Dockerfile").read_text()
    (install,) = re.findall(r"^RUN (.+)$", dockerfile.split("AS cpu")[1], re.MULTILINE)
    (health,) = (json.loads(found) for found in re.findall(r"^HEALTHCHECK .* CMD (\[.+\])$", dockerfile, re.MULTILINE))
    (serve,) = (json.loads(found) for found in re.findall(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE))
    copied = {
        name.rstrip("/") for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    for entry in checkout.iterdir():  # the image has only what was copied into it
        if entry.name not in copied:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "image"], check=True)
    path = f"{tmp_path / 'image' / 'bin'}:{os.environ['PATH']}"
    port = str(free_port())

    subprocess.run(
        shlex.split(install), cwd=checkout, env={**os.environ, "PATH": path}, check=True, capture_output=True
    )
    shutil.rmtree(checkout)  # what serves now is the installed package, with its bundle
    with running(serve, tmp_path, PATH=path, RESNET_PORT=port):
        wait_until_ready(f"http://127.0.0.1:{port}")
        checked = subprocess.run(health, env={**os.environ, "PATH": path, "RESNET_PORT": port}, check=False)
        info = httpx2.get(f"http://127.0.0.1:{port}/info").json()

    assert checked.returncode == 0
    assert info["bundle"].startswith("cifar10-")


def test_the_gpu_target_differs_from_the_cpu_target_only_in_its_extra(root: Path) -> None:
    _, gpu, cpu = re.split(r"^FROM base AS (?:gpu|cpu)$", (root / "Dockerfile").read_text(), flags=re.MULTILINE)

    assert gpu.replace("[server,gpu]", "[server,cpu,openvino]").strip() == cpu.strip()
