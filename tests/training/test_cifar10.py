import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from resnet_ensemble.training import cifar10

PER_FILE = 4


def write_official(folder: Path, monkeypatch: pytest.MonkeyPatch, *, binary: bool) -> np.ndarray:
    """Six small files in the official format, whose MD5 takes the place of the published ones."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (6, PER_FILE, 3072), np.uint8)
    labels = generator.integers(0, 10, (6, PER_FILE), np.uint8)
    table = cifar10.BINARY if binary else cifar10.PYTHON
    for i, name in enumerate(table):
        if binary:
            content = np.concatenate([labels[i][:, None], rows[i]], axis=1).tobytes()
        else:
            content = pickle.dumps({b"data": rows[i], b"labels": labels[i].tolist()})
        (folder / name).write_bytes(content)
        monkeypatch.setitem(table, name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(cifar10, "TRAIN_IMAGES", 4 * PER_FILE)
    return rows.reshape(6 * PER_FILE, 3, 32, 32)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "python"])
def test_both_official_versions_are_read_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: bool
) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    rows = write_official(folder, monkeypatch, binary=binary)

    train, val, test = (cifar10.read(tmp_path, split) for split in cifar10.SPLITS)

    assert [len(split.labels) for split in (train, val, test)] == [16, 4, 4]
    everything = np.concatenate([train.images, val.images, test.images])
    np.testing.assert_array_equal(everything, rows.transpose(0, 2, 3, 1))


def test_the_folder_of_the_files_itself_is_accepted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "data", monkeypatch, binary=True)

    assert len(cifar10.read(tmp_path / "data", "test").labels) == PER_FILE


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "data", monkeypatch, binary=True)
    (tmp_path / "data" / "data_batch_3.bin").write_bytes(b"\0" * 3073)

    with pytest.raises(cifar10.DataError, match=r"data_batch_3\.bin is damaged"):
        cifar10.read(tmp_path / "data", "train")


def test_a_damaged_python_file_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "data", monkeypatch, binary=False)
    (tmp_path / "data" / "test_batch").write_bytes(pickle.dumps({b"data": [], b"labels": []}))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))

    with pytest.raises(cifar10.DataError, match="damaged"):
        cifar10.read(tmp_path / "data", "test")


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "data", monkeypatch, binary=True)
    (tmp_path / "data" / "test_batch.bin").unlink()

    with pytest.raises(cifar10.DataError, match=r"test_batch\.bin is missing"):
        cifar10.read(tmp_path / "data", "test")


def test_a_folder_without_cifar_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(cifar10.DataError, match=r"no CIFAR-10 in .*cs\.toronto\.edu"):
        cifar10.read(tmp_path, "train")


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cifar10.DataError, match="train, val, test"):
        cifar10.read(tmp_path, "validation")
