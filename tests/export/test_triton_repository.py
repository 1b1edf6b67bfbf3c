import io
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType

from resnet_ensemble.export import triton_repository
from resnet_ensemble.export.bundle import Bundle, BundleDamaged
from resnet_ensemble.export.triton_repository import Plan, RepositoryError
from resnet_ensemble.training.views import Preprocessing, make_views
from tests.export.simulated_triton import DTYPES, Triton, configs

ORT_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


@pytest.fixture(scope="module")
def repository(pair: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    triton_repository.write(pair, folder)
    return folder


@pytest.fixture(scope="module")
def triton(repository: Path) -> Triton:
    return Triton(repository)


def picture(bundle: Bundle, index: int) -> Image.Image:
    return Image.open(io.BytesIO(bundle.read(bundle.manifest.golden[index]))).convert("RGB")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def disk_full_beyond(size: int) -> Iterator[None]:
    """No file may become larger: writes fail as those to a full disk do, with an OSError in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What is written


def test_there_is_a_model_a_member_their_mean_and_the_ensemble(repository: Path, pair: Bundle) -> None:
    found = configs(repository)

    members = [f"cifar10-{member.name}" for member in pair.manifest.members]
    assert set(found) == {"cifar10", "cifar10_mean", *members}
    assert {name: config.name for name, config in found.items()} == {name: name for name in found}
    assert {found[name].platform for name in (*members, "cifar10_mean")} == {"onnxruntime_onnx"}
    assert found["cifar10"].platform == "ensemble"
    assert all((repository / name / "1").is_dir() for name in found)
    assert all(found[name].HasField("dynamic_batching") for name in members)


def test_every_model_names_its_labels(repository: Path, pair: Bundle) -> None:
    for name, config in configs(repository).items():
        (output,) = config.output
        labels = (repository / name / output.label_filename).read_text().splitlines()
        assert tuple(labels) == pair.manifest.labels


def test_every_config_says_what_the_onnx_file_has(triton: Triton) -> None:
    for name, session in triton.sessions.items():
        config = triton.configs[name]
        for said, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [(tensor.name, DTYPES[DataType.Name(tensor.data_type)], list(tensor.dims)) for tensor in said] == [
                (tensor.name, ORT_DTYPES[tensor.type], [-1 if isinstance(n, str) else n for n in tensor.shape[1:]])
                for tensor in found
            ]
            assert all(isinstance(tensor.shape[0], str) for tensor in found)  # any batch


def test_the_ensemble_is_the_mean_of_the_members_on_every_golden_picture(triton: Triton, pair: Bundle) -> None:
    engines = [onnxruntime.InferenceSession(pair.read(member)) for member in pair.manifest.members]
    for index, golden in enumerate(pair.manifest.golden):
        views = make_views(picture(pair, index), pair.manifest.members[0].preprocessing, "10crop")

        (found,) = triton.infer("cifar10", {"views": views}).values()

        assert found.shape == (10, 10)
        expected = np.mean([engine.run(None, {"views": views})[0] for engine in engines], axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(
            found.mean(axis=0),
            np.mean(list(golden.probabilities.values()), axis=0),
            atol=pair.manifest.golden_tolerance,
        )


@pytest.mark.parametrize("members", [1, 3])
def test_the_mean_is_one_of_any_number_of_members(members: int) -> None:
    votes = {f"m{i}": np.random.default_rng(i).random((4, 5), np.float32) for i in range(members)}

    (found,) = onnxruntime.InferenceSession(triton_repository.mean_graph(list(votes), 5)).run(None, votes)

    np.testing.assert_allclose(found, np.mean(list(votes.values()), axis=0), atol=1e-6)


def with_second_member_seeing(bundle: Bundle, **changes: object) -> Bundle:
    first, second, *rest = bundle.manifest.members
    seen: Preprocessing = replace(second.preprocessing, **changes)  # type: ignore[arg-type]
    members = (first, second.model_copy(update={"preprocessing": seen}), *rest)
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"members": members}))


def test_members_that_see_pictures_differently_have_inputs_of_their_own(pair: Bundle, tmp_path: Path) -> None:
    bundle = with_second_member_seeing(pair, resize=48, crop=40)
    triton_repository.write(bundle, tmp_path / "models")
    triton = Triton(tmp_path / "models")

    views = {
        f"views_{member.name}": make_views(picture(bundle, 0), member.preprocessing, "10crop")
        for member in bundle.manifest.members[:2]
    }
    (found,) = triton.infer("cifar10", views).values()

    alone = [triton.infer(f"cifar10-{name.removeprefix('views_')}", {"views": v}) for name, v in views.items()]
    np.testing.assert_allclose(found, np.mean([answer["probabilities"] for answer in alone], axis=0), atol=1e-6)
    assert not np.allclose(alone[0]["probabilities"], alone[1]["probabilities"], atol=1e-3)


def test_members_that_differ_only_in_what_the_graph_does_share_their_input(pair: Bundle, tmp_path: Path) -> None:
    triton_repository.write(with_second_member_seeing(pair, std=(0.5, 0.5, 0.5)), tmp_path / "models")

    assert [tensor.name for tensor in configs(tmp_path / "models")["cifar10"].input] == ["views"]


def test_a_plan_takes_the_place_of_the_onnx_file(pair: Bundle, tmp_path: Path) -> None:
    triton_repository.write(pair, tmp_path / "models", {"resnet20": Plan(b"a plan", max_batch=16)})

    found = configs(tmp_path / "models")
    assert (tmp_path / "models" / "cifar10-resnet20" / "1" / "model.plan").read_bytes() == b"a plan"
    assert not (tmp_path / "models" / "cifar10-resnet20" / "1" / "model.onnx").exists()
    assert found["cifar10-resnet20"].platform == "tensorrt_plan"
    assert list(found["cifar10-resnet20"].input[0].dims) == [32, 32, 3]
    assert {config.max_batch_size for config in found.values()} == {16}  # an ensemble has the smallest of its members


def test_the_client_in_the_readme_prints_the_classes(triton: Triton, repository: Path, pair: Bundle) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (repository / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    ship = pair.path / "golden" / "ship.png"

    with triton.served() as address:
        command = [sys.executable, "-c", code, str(ship), address]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    golden = next(golden for golden in pair.manifest.golden if golden.file == "golden/ship.png")
    mean = np.mean(list(golden.probabilities.values()), axis=0)
    assert [line.split()[1] for line in lines[:2]] == [pair.manifest.labels[i] for i in mean.argsort()[:-3:-1]]
    assert float(lines[0].split()[0]) == pytest.approx(mean.max(), abs=2e-4)


def test_where_the_bundle_s_protocol_has_views_of_several_shapes_the_client_sends_ten_crops(
    pair: Bundle, tmp_path: Path
) -> None:
    bundle = Bundle(pair.path, pair.manifest.model_copy(update={"protocol": "multiscale"}))
    triton_repository.write(bundle, tmp_path / "models")

    text = (tmp_path / "models" / "README.md").read_text()
    assert "The bundle's protocol is `multiscale`, whose whole views have several shapes" in text
    assert 'make_views(image, preprocessing, "10crop")' in text


def test_the_list_of_contents_has_the_hash_of_every_file(repository: Path) -> None:
    listed = json.loads((repository / "resnet_ensemble.json").read_text())["files"]

    files = content(repository)
    assert set(files) == {*listed, "resnet_ensemble.json"}
    assert all(triton_repository._sha256(files[name]) == digest for name, digest in listed.items())


def test_a_label_of_two_lines_is_refused(pair: Bundle, tmp_path: Path) -> None:
    labels = ("one\ntwo", *pair.manifest.labels[1:])
    bundle = Bundle(pair.path, pair.manifest.model_copy(update={"labels": labels}))

    with pytest.raises(RepositoryError, match=r"the label 'one\\ntwo' is not one line"):
        triton_repository.write(bundle, tmp_path / "models")


# What is replaced


def test_an_unchanged_repository_of_ours_is_replaced(pair: Bundle, tmp_path: Path) -> None:
    triton_repository.write(pair, tmp_path / "models", {"resnet20": Plan(b"a plan", max_batch=16)})
    triton_repository.write(pair, tmp_path / "models")

    assert "cifar10-resnet20/1/model.onnx" in content(tmp_path / "models")
    assert "cifar10-resnet20/1/model.plan" not in content(tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cifar10/config.pbtxt", b'name: "mine"', r"was changed after it was written \(cifar10/config\.pbtxt\)"),
        ("mine/config.pbtxt", b'name: "mine"', r"was changed after it was written \(mine/config\.pbtxt\)"),
        ("resnet_ensemble.json", b"{", r"resnet_ensemble\.json is damaged"),
        ("resnet_ensemble.json", b"{}", r"resnet_ensemble\.json is damaged"),
        ("resnet_ensemble.json", None, r"has no resnet_ensemble\.json, so it is not ours; name another folder"),
        ("cifar10/labels.txt", None, r"was changed after it was written \(cifar10/labels\.txt\)"),
    ],
)
def test_what_someone_changed_is_not_replaced(
    pair: Bundle, tmp_path: Path, file: str, text: bytes | None, message: str
) -> None:
    folder = tmp_path / "models"
    triton_repository.write(pair, folder)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(text)
    before = content(folder)

    with pytest.raises(RepositoryError, match=message):
        triton_repository.write(pair, folder)
    assert content(folder) == before


def test_other_things_are_not_replaced(pair: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")

    with pytest.raises(RepositoryError, match="is a file; name a new folder"):
        triton_repository.write(pair, tmp_path / "file")
    with pytest.raises(RepositoryError, match="is not ours"):
        triton_repository.write(pair, tmp_path / "folder")
    assert content(tmp_path) == {"file": b"mine", "folder/mine.txt": b"mine"}


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(pair: Bundle, tmp_path: Path, existing: bool) -> None:
    if existing:
        triton_repository.write(pair, tmp_path / "models")
    before = content(tmp_path)

    with disk_full_beyond(100_000), pytest.raises(OSError, match=r"model\.onnx"):
        triton_repository.write(pair, tmp_path / "models")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"] * existing


def test_a_repository_that_can_t_be_moved_into_place_leaves_the_old_one(
    pair: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_repository.write(pair, tmp_path / "models")
    before, rename = content(tmp_path), Path.rename

    def rename_unless_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("the device is busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_unless_new)

    with pytest.raises(OSError, match="busy"):
        triton_repository.write(pair, tmp_path / "models")
    assert content(tmp_path) == before


def test_a_damaged_bundle_makes_no_repository(pair: Bundle, tmp_path: Path) -> None:
    first = pair.manifest.members[0].model_copy(update={"sha256": "0" * 64})
    members = (first, *pair.manifest.members[1:])
    bundle = Bundle(pair.path, pair.manifest.model_copy(update={"members": members}))

    with pytest.raises(BundleDamaged, match="is not the file that"):
        triton_repository.write(bundle, tmp_path / "models")
    assert not list(tmp_path.iterdir())
