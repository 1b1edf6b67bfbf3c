from pathlib import Path

import pytest
import safetensors.torch
import torch

from resnet_ensemble.export import declared
from resnet_ensemble.export.declared import FOLDER, WeightsError
from resnet_ensemble.export.weights import read_all
from resnet_ensemble.training.model import cifar, imagenet


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.toml")))
def test_every_ensemble_of_ours_is_valid(name: str) -> None:
    assert declared.load(name).protocol == "10crop"


def test_the_paper_s_ensemble_has_its_six_members() -> None:
    names = [Path(member.weights).name for member in declared.load("ilsvrc2015").members]

    depths = ("34b", "34c", "50", "101", "152", "152")
    assert names == [f"resnet{depth}-imagenet-paper" for depth in depths]
    assert len({member.weights for member in declared.load("ilsvrc2015").members}) == 6


def test_someone_s_own_ensemble_is_read_with_all_that_it_says(tmp_path: Path) -> None:
    torch.save(imagenet(18, classes=3).state_dict(), tmp_path / "a.pth")
    labels = write(tmp_path / "labels.txt", "red\ngreen\n\nblue\n")
    file = write(
        tmp_path / "mine.toml",
        f"""
        protocol = "flip"
        labels = "{labels}"
        members = [
          {{ weights = "{tmp_path}/a.pth" }},
          {{ weights = "{tmp_path}/a.pth", name = "again", resize = 232, std = [0.5, 0.5, 0.5] }},
        ]
        """,
    )

    ensemble = declared.load(file)
    first, second = read_all(ensemble)

    assert ensemble.protocol == "flip"
    assert (first.name, second.name) == ("resnet18", "again")
    assert first.labels == ("red", "green", "blue")
    assert (first.preprocessing.resize, second.preprocessing.resize) == (256, 232)
    assert (second.preprocessing.crop, second.preprocessing.std) == (224, (0.5, 0.5, 0.5))


def test_a_plain_network_is_declared_as_one(tmp_path: Path) -> None:
    torch.save(cifar(20, shortcut="plain").state_dict(), tmp_path / "a.pth")
    members = f'members = [{{ weights = "{tmp_path}/a.pth", shortcut = "plain" }}]'

    (source,) = read_all(declared.load(write(tmp_path / "mine.toml", members)))

    assert source.name == "plain20"
    assert source.network.layer1[0].downsample is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members = [", "is not TOML"),
        ("members = []", "members: Tuple should have at least 1 item"),
        ('members = [{ weight = "x" }]', r"members\.0\.weights: Field required"),
        ('members = [{ weights = "x" }]\nprotocol = "20crop"', "protocol: .*no protocol named"),
        ('members = [{ weights = "x", stride = "v2" }]', r"members\.0\.stride"),
        ('members = [{ weights = "x", shortcut = "B" }]', r"members\.0\.shortcut"),  # the tensors tell
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        declared.load(write(tmp_path / "x.toml", text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b'name = "\xff"')

    with pytest.raises(WeightsError, match="is not TOML"):
        declared.load(str(tmp_path / "x.toml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [("resize = 100", "a crop of 224 does not fit"), ("crop = 0", "must be positive"), ("std = [0, 1, 1]", "std")],
)
def test_a_preprocessing_that_can_t_be_is_refused(tmp_path: Path, given: str, message: str) -> None:
    torch.save(imagenet(18).state_dict(), tmp_path / "r.pth")
    text = f'members = [{{ weights = "{tmp_path}/r.pth", {given} }}]'

    with pytest.raises(WeightsError, match=rf"r\.pth: .*{message}"):
        read_all(declared.load(write(tmp_path / "x.toml", text)))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(WeightsError, match="no ensemble x: give a TOML file, or one of cifar10, ilsvrc2015"):
        declared.load("x")


def test_labels_that_can_t_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="can't read the labels in"):
        declared.read_labels(tmp_path / "none.txt")


def test_a_mark_at_the_beginning_of_the_labels_is_of_none(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("Äpfel\r\nBirnen\r\n".encode("utf-8-sig"))

    assert declared.read_labels(tmp_path / "labels.txt") == ("Äpfel", "Birnen")


def test_labels_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"labels\.txt has no labels"):
        declared.read_labels(Path(write(tmp_path / "labels.txt", "\n \n")))


def test_a_network_is_no_two_members_whatever_its_files_are_called(tmp_path: Path) -> None:
    state = cifar(20).state_dict()
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    torch.save(cifar(20).state_dict(), tmp_path / "c.pth")

    def read(*members: str) -> int:
        text = "members = [" + ", ".join(f'{{ weights = "{tmp_path}/{member} }}' for member in members) + "]"
        return len(read_all(declared.load(write(tmp_path / "x.toml", text))))

    for other in ('a.pth"', 'b.safetensors"', 'a.pth", name = "again"'):
        with pytest.raises(WeightsError, match=r"is the network of .*a\.pth once more"):
            read('a.pth"', 'c.pth"', other)
    assert read('a.pth"', 'c.pth"', 'a.pth", padding = 4', 'a.pth", shortcut = "plain"') == 4


def test_what_a_bundle_is_made_of_does_not_depend_on_the_folder_it_is_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    chosen = declared.choose([str(tmp_path / "weights.pth")], None, None)
    before = chosen.identity()

    (tmp_path / "checkpoint.safetensors").write_bytes(b"of a run")
    monkeypatch.chdir(tmp_path)
    assert chosen.identity() == before
