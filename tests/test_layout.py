"""The rules of the layout, and that each check fails when its rule is broken."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_ensemble.export.bundle import Bundle

FOLDERS = {"training": "training", "export": "export", "server": "server", "client": "clients/python"}
# Imports point to the left only; the client imports nothing of ours.
ALLOWED = {
    "training": {"training"},
    "export": {"training", "export"},
    "server": {"training", "export", "server"},
    "client": {"client"},
}
# A batch job without a server runs the server's application in its own process. It imports it inside a function:
# test_the_sdk_loads_no_numpy_and_no_pillow fails otherwise.
LAZY = {"clients/python/batch/_servers.py": {"server"}}
# Beside training/, these alone use torch.
TORCH = {"export/to_onnx.py", "export/weights.py"}
HEAVY = {"torch", "torchvision", "onnx", "onnxscript", "safetensors"}


def modules(root: Path, name: str) -> Iterator[Path]:
    yield from sorted((root / FOLDERS[name]).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_directions(root: Path) -> list[str]:
    """Imports of a folder to the right."""
    return [
        f"{file.relative_to(root)} imports {name}"
        for folder, allowed in ALLOWED.items()
        for file in modules(root, folder)
        for name in imported(file)
        if name.startswith("resnet_ensemble.")
        and name.split(".")[1] not in allowed | LAZY.get(str(file.relative_to(root)), set())
    ]


def users_of_torch(root: Path) -> list[str]:
    """Modules that import it though a machine which builds engines or serves may have none."""
    return [
        str(file.relative_to(root))
        for folder in ("export", "server", "client")
        for file in modules(root, folder)
        if str(file.relative_to(root)) not in TORCH
        and any(name.split(".")[0] in ("torch", "torchvision") for name in imported(file))
    ]


def shadowing_names(root: Path) -> list[str]:
    """Modules that, when a file beside them is run by path, would be imported in place of a package."""
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    stems = (file.relative_to(root) for name in FOLDERS for file in modules(root, name))
    return [str(file) for file in stems if file.stem in taken]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after `statement`."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def import_all(root: Path, name: str) -> str:
    """A statement that imports every module of a folder but those that run when imported."""
    names = []
    for file in modules(root, name):
        path = file.relative_to(root / FOLDERS[name]).with_suffix("")
        parts = [part for part in path.parts if part != "__init__"]
        if "__main__" not in parts:
            names.append(".".join(["resnet_ensemble", name, *parts]))
    return "import " + ", ".join(names)


# The repository keeps the rules


def test_imports_point_to_the_left(root: Path) -> None:
    assert wrong_directions(root) == []


def test_torch_is_for_training_and_for_export_alone(root: Path) -> None:
    assert users_of_torch(root) == []


def test_no_module_shadows_a_package(root: Path) -> None:
    assert shadowing_names(root) == []


def test_the_server_loads_no_torch_and_no_onnx(root: Path) -> None:
    assert loaded_by(import_all(root, "server")) & HEAVY == set()


def test_a_bundle_without_engines_is_served_without_other_backends(shipped: Bundle) -> None:
    statement = (
        "from pathlib import Path; from resnet_ensemble.export.bundle import Bundle; "
        "from resnet_ensemble.export.engine_store import open_engine; "
        f"bundle = Bundle.open(Path({str(shipped.path)!r})); open_engine(bundle, bundle.manifest.members[0])"
    )

    assert "openvino" not in loaded_by(statement)


def test_building_engines_loads_no_torch() -> None:
    assert "torch" not in loaded_by("import resnet_ensemble.export.build_engines")


def test_the_sdk_loads_no_numpy_and_no_pillow(root: Path) -> None:
    extras = {"numpy", "PIL", "pydantic", "fastapi", "pyarrow", "fsspec", "ray"}

    assert loaded_by(import_all(root, "client")) & (HEAVY | extras) == set()


def test_every_folder_with_code_is_in_the_distribution(root: Path) -> None:
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found = {str(file.parent.relative_to(root)) for name in FOLDERS for file in modules(root, name)}

    assert found <= set(packages.values())
    assert all((root / FOLDERS[name] / "py.typed").is_file() for name in FOLDERS)


def test_there_is_one_import_name() -> None:
    assert not {"training", "export", "server", "clients"} & importlib.metadata.packages_distributions().keys()


def test_the_root_has_about_a_dozen_entries(root: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout

    entries = {line.split("/")[0] for line in listed.splitlines()}
    assert len({entry for entry in entries if not entry.startswith(".")}) <= 17


# Each check fails when its rule is broken


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for folder in FOLDERS.values():
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("training", "from resnet_ensemble.export import bundle"),
        ("export", "import resnet_ensemble.server.app"),
        ("clients/python/batch", "def f():\n    from resnet_ensemble.export import bundle"),
        ("clients/python", "def f():\n    from resnet_ensemble.server.errors import KINDS"),
    ],
)
def test_an_import_to_the_right_is_found(broken: Path, folder: str, statement: str) -> None:
    (broken / folder).mkdir(exist_ok=True)
    (broken / folder / "module.py").write_text(statement)

    (found,) = wrong_directions(broken)
    assert found.startswith(f"{folder}/module.py imports resnet_ensemble.")


@pytest.mark.parametrize("name", ["onnx.py", "queue.py", "numpy.py"])
def test_a_shadowing_name_is_found(broken: Path, name: str) -> None:
    (broken / "export" / name).touch()

    assert shadowing_names(broken) == [f"export/{name}"]


def test_a_heavy_import_is_found() -> None:
    assert "torch" in loaded_by("import resnet_ensemble.training.model")
    assert "numpy" in loaded_by("import resnet_ensemble.training.views")


def test_the_sdk_is_imported_without_what_only_its_asynchronous_client_needs() -> None:
    assert "asyncio" not in loaded_by("import resnet_ensemble.client")


@pytest.mark.parametrize("name", ["training", "export", "server", "clients"])
def test_a_bare_import_is_found_by_the_linter(root: Path, name: str) -> None:
    code = f"import {name}.module\n"
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "tests/x.py", "-"]

    found = subprocess.run(command, cwd=root, input=code, capture_output=True, text=True, check=False)

    assert found.returncode == 1
    assert "TID251" in found.stdout


def test_a_module_named_as_the_standard_library_is_found_by_the_linter(root: Path) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "export/queue.py", "-"]

    found = subprocess.run(command, cwd=root, input='"""."""\n', capture_output=True, text=True, check=False)

    assert "A005" in found.stdout


def test_torch_in_a_backend_is_found(broken: Path) -> None:
    (broken / "export" / "backend.py").write_text("def load() -> None:\n    from torch import nn\n")
    (broken / "export" / "weights.py").write_text("import torch\n")
    (broken / "training" / "train.py").write_text("import torch\n")

    assert users_of_torch(broken) == ["export/backend.py"]
