"""Check the TensorRT files against the bindings of TensorRT 11.4, on a machine without a GPU: `make types-tensorrt`.

The bindings come from their wheel on PyPI. The libraries that they link to don't, so empty ones take their place, and
pybind11-stubgen reads the interface off the module. mypy then must accept our files, and must refuse a file with calls
of TensorRT 10. Everything is made under build/tensorrt-types; nothing of it is committed, since it derives from
NVIDIA's bindings. Needs a C compiler and PyPI.
"""

import ast
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "tensorrt-types"
PACKAGES = ("tensorrt-cu13-bindings==11.4.0.106", "pybind11-stubgen==3.0.0", "numpy")
CHECKED = ("tensorrt_builder", "tensorrt_runtime")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# What the bindings import from them. Never called: the interface is only looked at.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
SETTINGS = """[mypy]
strict = True
python_version = 3.11
explicit_package_bases = True
namespace_packages = True
# What TensorRT may answer with None, its signatures don't say.
warn_unreachable = False
# Without these stubs, some of the comments are needed.
warn_unused_ignores = False
[mypy-tensorrt,onnx.*,onnxruntime.*,ml_dtypes.*,safetensors.*,tqdm.*,cuda.*]
ignore_errors = True
ignore_missing_imports = True
"""


def main() -> int:
    """Make the stubs, then check."""
    python = _environment()
    stubs = PLACE / "stubs"
    (stubs / "tensorrt").mkdir(parents=True, exist_ok=True)
    (stubs / "tensorrt" / "__init__.pyi").write_text(_mended(_generated(python)))
    (PLACE / "mypy.ini").write_text(SETTINGS)

    files = [f"resnet_ensemble.export.engines.{name}" for name in CHECKED]
    accepted = _mypy(stubs, [option for name in files for option in ("-m", name)])
    print(f"our files: {accepted.stdout.strip()}")
    planted = Path(__file__).with_name("tensorrt10.py")
    refused = _mypy(stubs, [str(planted)])
    print(f"calls of TensorRT 10, which must be refused:\n{refused.stdout.strip()}")
    lines = planted.read_text().splitlines()
    expected = {i for i, line in enumerate(lines, 1) if "# refused" in line}
    found = {int(number) for number in re.findall(r"tensorrt10\.py:(\d+): error", refused.stdout)}
    if found != expected:
        print(f"lines {sorted(expected)} should be refused, and lines {sorted(found)} are")
    return 0 if accepted.returncode == 0 and found == expected else 1


def _environment() -> Path:
    """The Python of an environment that has the bindings."""
    python = PLACE / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(PLACE / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def _generated(python: Path) -> str:
    libraries = PLACE / "libraries"
    libraries.mkdir(exist_ok=True)
    source = libraries / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", libraries / f"lib{name}.so.11", source], check=True)
    command = [python.with_name("pybind11-stubgen"), "tensorrt_bindings.tensorrt", "-o", PLACE, "--ignore-all-errors"]
    subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": str(libraries)}, check=True, capture_output=True)
    return (PLACE / "tensorrt_bindings" / "tensorrt.pyi").read_text()


class _Mend(ast.NodeTransformer):
    """What the generator can't know."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        # The module has a data type called bool.
        return ast.copy_location(ast.parse("builtins.bool", mode="eval").body, node) if node.id == "bool" else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        # In a type, `...` is one that pybind11 did not register. (As a default or a body it may be Any as well.)
        return ast.copy_location(ast.parse("typing.Any", mode="eval").body, node) if node.value is ... else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        self.generic_visit(node)
        if isinstance(node.annotation, ast.Name) and node.annotation.id == "Dims":  # made of any tuple
            node.annotation = ast.parse("Dims | collections.abc.Sequence[int]", mode="eval").body
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        added = {
            "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
            "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
        }
        if node.name in added:
            node.body += ast.parse(added[node.name]).body
        return node


def _mended(stub: str) -> str:
    """The generated stub, made Python that mypy reads."""
    stub = re.sub(r"\bin: ", "in_: ", stub)  # a keyword
    # Parameters without a default after some with one: then none has.
    lines = stub.split("\n")
    for i, line in enumerate(lines):
        if re.match(r"\s*def .*= [^,()]+, \w+: [^=,()]+\)", line):
            lines[i] = re.sub(r" = [^,()]+", "", line)
    tree = _Mend().visit(ast.parse("\n".join(lines)))
    tree.body[1:1] = ast.parse("import builtins, typing_extensions\n__version__: str").body
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _mypy(stubs: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--config-file", PLACE / "mypy.ini", "--no-error-summary", *arguments]
    links = ROOT / "build" / "links"
    paths = {"MYPYPATH": f"{stubs}:{links}"}
    done = subprocess.run(command, cwd=PLACE, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout + done.stderr or "no errors")


if __name__ == "__main__":
    sys.exit(main())
