import hashlib
import http.client
import pickle
import tarfile
import urllib.request
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from resnet_ensemble.training import cifar
from resnet_ensemble.training.cifar import Dataset, Version

PER_FILE = 4


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def official(version: Version, dataset: Dataset) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """Small files in a version's format, their pictures (n, 3, 32, 32) and labels."""
    generator = np.random.default_rng(0)
    names = [*version.train, *version.test]
    rows = generator.integers(0, 256, (len(names), PER_FILE, 3072), np.uint8)
    labels = generator.integers(0, len(dataset.labels), (len(names), PER_FILE), np.uint8)
    files = {}
    for name, pixels, numbers in zip(names, rows, labels, strict=True):
        if name.endswith(".bin"):
            coarse = np.full((PER_FILE, dataset.label_bytes - 1), 99, np.uint8)
            files[name] = np.concatenate([coarse, numbers[:, None], pixels], axis=1).tobytes()
        else:
            files[name] = pickle.dumps({b"data": pixels, dataset.label_key: numbers.tolist(), b"coarse_labels": []})
    return files, rows.reshape(-1, 3, 32, 32), labels.reshape(-1)


def archive_of(version: Version, files: dict[str, bytes]) -> bytes:
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            about = tarfile.TarInfo(f"{version.folder}/{name}")
            about.size = len(data)
            archive.addfile(about, BytesIO(data))
    return content.getvalue()


def with_md5(dataset: Dataset, version: Version, files: dict[str, bytes], archive: bytes) -> Dataset:
    """The data set as if these small files had been published."""
    changed = replace(
        version,
        archive_md5=md5(archive),
        train={name: md5(files[name]) for name in version.train},
        test={name: md5(files[name]) for name in version.test},
    )
    return replace(dataset, versions=tuple(changed if v is version else v for v in dataset.versions))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 3)


VERSIONS = [(dataset, version) for dataset in (cifar.CIFAR10, cifar.CIFAR100) for version in dataset.versions]
IDS = [version.archive for _, version in VERSIONS]


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("kept", ["archive", "unpacked"])
@pytest.mark.parametrize(("dataset", "version"), VERSIONS, ids=IDS)
def test_every_official_version_is_read_and_split(
    tmp_path: Path, dataset: Dataset, version: Version, kept: str
) -> None:
    files, pictures, labels = official(version, dataset)
    archive = archive_of(version, files)
    published = with_md5(dataset, version, files, archive)
    if kept == "archive":
        write(tmp_path, {version.archive: archive})
    else:
        write(tmp_path / version.folder, files)

    train, val, test = (cifar.read(tmp_path, split, published) for split in cifar.SPLITS)

    trained = PER_FILE * len(version.train)
    assert [len(part.labels) for part in (train, val, test)] == [3, trained - 3, PER_FILE]
    everything = np.concatenate([train.images, val.images, test.images])
    np.testing.assert_array_equal(everything, pictures.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(np.concatenate([train.labels, val.labels, test.labels]), labels)


@pytest.fixture
def binary() -> tuple[Dataset, dict[str, bytes], bytes]:
    version = cifar.CIFAR10.versions[0]
    files, _, _ = official(version, cifar.CIFAR10)
    archive = archive_of(version, files)
    return with_md5(cifar.CIFAR10, version, files, archive), files, archive


Binary = tuple[Dataset, dict[str, bytes], bytes]


def test_the_folder_of_the_files_itself_is_accepted_too(tmp_path: Path, binary: Binary) -> None:
    dataset, files, _ = binary
    write(tmp_path / "data", files)

    assert len(cifar.read(tmp_path / "data", "test", dataset).labels) == PER_FILE


def test_a_damaged_file_is_named(tmp_path: Path, binary: Binary) -> None:
    dataset, files, _ = binary
    write(tmp_path, files | {"data_batch_3.bin": bytes(3073)})

    with pytest.raises(cifar.DataError, match=r"data_batch_3\.bin is damaged"):
        cifar.read(tmp_path, "train", dataset)


def test_a_damaged_archive_is_named(tmp_path: Path, binary: Binary) -> None:
    dataset, _, archive = binary
    write(tmp_path, {"cifar-10-binary.tar.gz": archive[:-1]})

    with pytest.raises(cifar.DataError, match=r"cifar-10-binary\.tar\.gz is damaged.*download it again"):
        cifar.read(tmp_path, "train", dataset)


def test_a_damaged_python_file_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cifar-10-batches-py", {"data_batch_1": b"", "test_batch": pickle.dumps({b"data": []})})
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))

    with pytest.raises(cifar.DataError, match="damaged"):
        cifar.read(tmp_path, "test")


def test_a_folder_whose_files_can_t_be_checked_is_told_and_not_said_to_be_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary").mkdir()

    with pytest.raises(cifar.DataError) as told:
        cifar.read(tmp_path, "train", cifar.CIFAR100)
    looked, there = str(told.value).split(". ", maxsplit=1)
    assert looked.endswith(": looked for cifar-100-binary.tar.gz, cifar-100-python.tar.gz, cifar-100-python/")
    assert there.startswith("cifar-100-binary/ is there, but its files can't be checked: ")
    assert "put cifar-100-binary.tar.gz beside it." in there


def test_a_missing_file_is_named(tmp_path: Path, binary: Binary) -> None:
    dataset, files, _ = binary
    write(tmp_path, {name: content for name, content in files.items() if name != "test_batch.bin"})

    with pytest.raises(cifar.DataError, match=r"test_batch\.bin is missing"):
        cifar.read(tmp_path, "test", dataset)


@pytest.mark.parametrize("dataset", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda dataset: dataset.title)
def test_a_folder_without_the_data_says_what_it_looked_for_and_where_to_get_it(
    tmp_path: Path, dataset: Dataset
) -> None:
    with pytest.raises(cifar.DataError, match=rf"no {dataset.title} in .*{dataset.versions[0].archive}.*toronto\.edu"):
        cifar.read(tmp_path, "train", dataset)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cifar.DataError, match="train, val, test"):
        cifar.read(tmp_path, "validation")


def test_every_label_has_one_name() -> None:
    assert [len(set(dataset.labels)) for dataset in (cifar.CIFAR10, cifar.CIFAR100)] == [10, 100]
    assert list(cifar.CIFAR100.labels) == sorted(cifar.CIFAR100.labels)


def test_a_download_is_checked_written_and_not_repeated(
    tmp_path: Path, binary: Binary, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _, archive = binary
    asked = []

    def answer(url: str, timeout: float) -> BytesIO:
        asked.append(url)
        return BytesIO(archive)

    monkeypatch.setattr(urllib.request, "urlopen", answer)

    for _ in range(2):
        cifar.download(tmp_path / "new", dataset)

    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert len(cifar.read(tmp_path / "new", "train", dataset).labels) == 3


def test_a_damaged_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: BytesIO(b"<html>"))

    with pytest.raises(cifar.DataError, match="damaged"):
        cifar.download(tmp_path, cifar.CIFAR10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("Name or service not known"), http.client.IncompleteRead(b"half")])
def test_offline_the_error_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)

    with pytest.raises(cifar.DataError, match=r"can't download .*; put cifar-100-binary\.tar\.gz into"):
        cifar.download(tmp_path, cifar.CIFAR100)
