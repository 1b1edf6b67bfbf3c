"""The builder with the real compiler of TensorRT-RTX. With TensorRT, which compiles only on a GPU, not yet run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import Precision
from resnet_ensemble.export.engines.tensorrt_builder import BuildFailed, Timings, WrongPrecision, build, check_types
from tests.export.engines.random_members import IMAGENET, PRECISIONS, exported, jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the dev extra has TensorRT-RTX on Linux only")
RTX = Path(__file__).with_name("rtx.py")


def compiled(asked: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The compiler's answers. It crashes rather than raises, so it has a process of its own."""
    (folder / "jobs.json").write_text(json.dumps(asked))
    done = subprocess.run([sys.executable, RTX, folder / "jobs.json"], capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"it ended with {done.returncode} at {asked[len(answers)]}: {done.stderr}"
    return answers


@pytest.fixture(scope="module")
def members(shipped: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By name and precision: the shipped ResNet-20, and a ResNet-18 for ImageNet with random weights."""
    folder = tmp_path_factory.mktemp("graphs")
    member = shipped.manifest.members[0]
    asked = jobs(shipped.read(member), folder, "resnet20", member.preprocessing)
    asked += jobs(exported(18), folder, "resnet18", IMAGENET)
    return dict(zip((Path(str(job["graph"])).stem for job in asked), compiled(asked, folder), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("member", "layers"), [("resnet20", 22), ("resnet18", 21)])
def test_a_member_compiles_for_every_size_of_view_in_the_precision_asked_for(
    members: dict[str, dict[str, Any]], member: str, layers: int, precision: Precision
) -> None:
    answer = members[f"{member}-{precision}"]

    assert "error" not in answer, answer
    assert len(answer["layers"]) == layers
    check_types(answer["layers"], precision)


@pytest.mark.parametrize("member", ["resnet20", "resnet18"])
def test_no_two_precisions_are_computed_alike(members: dict[str, dict[str, Any]], member: str) -> None:
    assert len({tuple(members[f"{member}-{precision}"]["layers"].values()) for precision in PRECISIONS}) == 5


def test_layers_of_another_type_are_named() -> None:
    layers = {"first": "HALF", "a": "INT8", "b": "HALF and INT8", "last": "HALF"}

    with pytest.raises(WrongPrecision, match=r"1 of 4 layers .* b in HALF and INT8 instead of INT8"):
        check_types(layers, "int8")
    check_types(layers | {"b": "INT8"}, "int8")


def test_a_library_that_makes_no_builder_is_an_error() -> None:
    """TensorRT without a driver: its factories give nothing, and pybind11 says so."""

    def factory(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    class ILogger:
        Severity = None

    with pytest.raises(BuildFailed, match="returned nullptr"):
        build(SimpleNamespace(ILogger=ILogger, Builder=factory), b"", [], timings=Timings())


def small(folder: Path, name: str = "views", operator: str = "Relu", *, external: bool = False) -> Path:
    """A graph of one convolution and one more node."""
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Cast", [name], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["channels_first"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["channels_first", "weight"], ["sums"], "conv"),
        helper.make_node(operator, ["sums"], ["out"], "odd", domain="" if operator == "Relu" else "mine"),
    ]
    sizes = ["batch", "height", "width", 3]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, sizes)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2, "height", "width"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)])
    file = folder / f"{name}-{operator}-{external}.onnx"
    onnx.save_model(model, file, save_as_external_data=external, location=f"{file.stem}.data", size_threshold=0)
    return file


CROPS = [[[1, 8, 8], [2, 8, 8], [4, 8, 8]]]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "noise.onnx").write_bytes(b"not a graph")
    good = small(folder)
    asked: dict[str, dict[str, Any]] = {
        "good": {"graph": good, "profiles": CROPS},
        "good again": {"graph": good, "profiles": CROPS},
        "noise": {"graph": folder / "noise.onnx", "profiles": CROPS},
        "unknown operator": {"graph": small(folder, operator="Odd"), "profiles": CROPS},
        "external weights": {"graph": small(folder, external=True), "profiles": CROPS},
        "another input": {"graph": small(folder, name="pixels"), "profiles": CROPS},
        "no profile": {"graph": good, "profiles": []},
        "least above most": {"graph": good, "profiles": [[[4, 8, 8], [4, 8, 8], [2, 8, 8]]]},
        "best outside": {"graph": good, "profiles": [[[1, 8, 8], [9, 8, 8], [4, 8, 8]]]},
        "no memory": {"graph": good, "profiles": CROPS, "workspace": 1},
        "wrong precision": {"graph": good, "profiles": CROPS, "precision": "fp16"},
    }
    for job in asked.values():
        job.update(graph=str(job["graph"]), crop=8, resize=8)
    return dict(zip(asked, compiled(list(asked.values()), folder), strict=True))


def test_the_small_graph_is_good_also_a_second_time(refusals: dict[str, dict[str, Any]]) -> None:
    assert refusals["good"]["layers"] == refusals["good again"]["layers"] == {"conv": "FLOAT"}


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("noise", "GraphRefused", "can't read the graph: .*ONNX"),
        ("unknown operator", "GraphRefused", "Odd odd"),
        ("external weights", "GraphRefused", "Failed to import initializer: weight"),
        ("another input", "ProfileRefused", "inputs are pixels, the profiles are of views"),
        ("no profile", "BuildFailed", "no optimization profile"),
        ("least above most", "ProfileRefused", r"from \(4, 8, 8, 3\) to \(2, 8, 8, 3\)"),
        ("best outside", "ProfileRefused", r"best \(9, 8, 8, 3\)"),
        ("no memory", "BuildFailed", "within workspace limit"),
        ("wrong precision", "WrongPrecision", "conv in FLOAT instead of HALF"),
    ],
)
def test_what_the_compiler_refuses_is_an_error_that_says_why(
    refusals: dict[str, dict[str, Any]], case: str, error: str, message: str
) -> None:
    assert refusals[case].get("error") == error, refusals[case]
    assert re.search(message, refusals[case]["message"]), refusals[case]["message"]
