import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from resnet_ensemble.export.bundle import Bundle, BundleDamaged, BundleInvalid, write


@pytest.fixture
def copy(shipped: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped.path, tmp_path / "cifar10"))


def edit(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["sha256"]  # as one does who means the change
    (bundle / "bundle.json").write_text(json.dumps(manifest | changes))


def test_the_shipped_bundle_is_whole(shipped: Bundle) -> None:
    for member in shipped.manifest.members:
        assert shipped.read(member)
        assert member.calibration
        assert shipped.read(member.calibration)
    for golden in shipped.manifest.golden:
        assert shipped.read(golden)


def test_the_shipped_bundle_holds_nothing_but_thresholds_that_the_manifest_does_not_name(shipped: Bundle) -> None:
    manifest = shipped.manifest
    calibrations = [member.calibration for member in manifest.members if member.calibration]
    named = {part.file for part in (*manifest.members, *calibrations, *manifest.golden)}
    named |= {"bundle.json", "stopping.json"}
    found = {str(path.relative_to(shipped.path)) for path in shipped.path.rglob("*") if path.is_file()}

    assert found == named


def test_a_bundle_is_read_as_it_was_written(shipped: Bundle, tmp_path: Path) -> None:
    files = {part.file: shipped.read(part) for part in (*shipped.manifest.members, *shipped.manifest.golden)}

    write(tmp_path / "copy", shipped.manifest, files)

    assert Bundle.open(tmp_path / "copy").manifest == shipped.manifest
    assert Bundle.open(tmp_path / "copy").identity == shipped.identity


def test_a_bundle_that_is_replaced_leaves_nothing_but_what_the_new_one_has_too(
    pair: Bundle, copy: Path, shipped: Bundle
) -> None:
    (copy / "notes.txt").write_text("somebody's own")
    files = {part.file: pair.read(part) for part in (*pair.manifest.members, *pair.manifest.golden)}
    without = tuple(member.model_copy(update={"calibration": None}) for member in pair.manifest.members)
    manifest = pair.manifest.model_copy(update={"members": without})

    write(copy, shipped.manifest, {})  # the same once more
    assert (copy / "stopping.json").exists()
    write(copy, manifest, files)

    left = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert left == {*files, "bundle.json", "notes.txt"}


@pytest.mark.parametrize("content", [b"", b"something else"])
def test_a_changed_member_is_refused(copy: Path, content: bytes) -> None:
    bundle = Bundle.open(copy)
    (copy / bundle.manifest.members[0].file).write_bytes(content)

    with pytest.raises(BundleDamaged, match=r"not the file that bundle\.json describes.*git checkout"):
        bundle.read(bundle.manifest.members[0])


def test_a_missing_golden_picture_is_refused(copy: Path) -> None:
    bundle = Bundle.open(copy)
    (copy / bundle.manifest.golden[0].file).unlink()

    with pytest.raises(BundleDamaged, match="is missing; restore"):
        bundle.read(bundle.manifest.golden[0])


def test_a_folder_without_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"no bundle\.json in .*export/to_onnx\.py"):
        Bundle.open(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "bundle.json").write_text("{")

    with pytest.raises(BundleInvalid, match="is not JSON"):
        Bundle.open(copy)


def test_another_format_is_named(copy: Path) -> None:
    edit(copy, format=2)

    with pytest.raises(BundleInvalid, match="bundle format 2; this version reads 1"):
        Bundle.open(copy)


def test_an_unknown_key_is_named(copy: Path) -> None:
    edit(copy, lables=["typo"])

    with pytest.raises(BundleInvalid, match="lables"):
        Bundle.open(copy)


@pytest.mark.parametrize("file", ["../secret.onnx", "/etc/passwd", "a//b", "a\\b"])
def test_a_file_outside_of_the_bundle_is_refused(copy: Path, shipped: Bundle, file: str) -> None:
    member = shipped.manifest.members[0].model_dump(mode="json") | {"file": file}
    edit(copy, members=[member])

    with pytest.raises(BundleInvalid, match="inside the bundle"):
        Bundle.open(copy)


def test_two_members_of_one_name_are_refused(copy: Path, shipped: Bundle) -> None:
    member = shipped.manifest.members[0].model_dump(mode="json")
    edit(copy, members=[member, member])

    with pytest.raises(BundleInvalid, match="same name"):
        Bundle.open(copy)


def test_golden_probabilities_must_fit_the_labels(copy: Path) -> None:
    edit(copy, labels=["cat", "dog"])

    with pytest.raises(BundleInvalid, match="must have 2 probabilities a member"):
        Bundle.open(copy)


def test_a_changed_manifest_is_refused_unless_its_hash_is_deleted(copy: Path) -> None:
    text = (copy / "bundle.json").read_text()
    (copy / "bundle.json").write_text(text.replace('"ship"', '"shop"'))
    with pytest.raises(BundleInvalid, match=r"is not as it was written.*git checkout.*delete its line \"sha256\""):
        Bundle.open(copy)

    edit(copy)
    assert "shop" in Bundle.open(copy).manifest.labels


@pytest.mark.parametrize("name", ["..", ".hidden", "-x", "a/b", ""])
def test_a_name_that_is_no_good_file_name_is_refused(copy: Path, name: str) -> None:
    edit(copy, name=name)

    with pytest.raises(BundleInvalid, match=r"bundle\.json is not valid: name"):
        Bundle.open(copy)


@pytest.mark.parametrize("part", ["weights", "preprocessing", "labels"])
def test_identity_changes_with_all_that_answers_depend_on(copy: Path, shipped: Bundle, part: str) -> None:
    members = [member.model_dump(mode="json") for member in shipped.manifest.members]
    labels = list(shipped.manifest.labels)
    if part == "weights":
        members[0]["sha256"] = "0" * 64
    elif part == "preprocessing":
        members[0]["preprocessing"]["padding"] += 1
    else:
        labels[0] = "aeroplane"
    edit(copy, members=members, labels=labels)

    assert Bundle.open(copy).identity != shipped.identity


@pytest.mark.parametrize("protocol", ["center", "10crop", "dense", "multiscale"])
def test_any_protocol_may_be_a_bundle_s_own(copy: Path, protocol: str) -> None:
    edit(copy, protocol=protocol)

    assert Bundle.open(copy).manifest.protocol == protocol


@pytest.mark.parametrize(("name", "protocol"), [("protocol", "11crop"), ("golden_protocol", "dense")])
def test_a_protocol_that_is_none_is_refused_and_golden_values_are_of_crops(
    copy: Path, name: str, protocol: str
) -> None:
    edit(copy, **{name: protocol})

    with pytest.raises(BundleInvalid, match=f"{name}: .*no protocol named '{protocol}'; there are center"):
        Bundle.open(copy)


@pytest.mark.parametrize("length", [b"\x08", b"\x88\x00", b"\x88\x80\x00"])
def test_a_graph_whose_weights_are_in_another_file_is_refused(copy: Path, length: bytes) -> None:
    """No hash covers that file, and it may be any of this host."""
    manifest = json.loads((copy / "bundle.json").read_text())
    member = copy / manifest["members"][0]["file"]
    member.write_bytes(member.read_bytes() + b"\n" + length + b"location\x12\x0b/etc/passwd")
    manifest["members"][0]["sha256"] = hashlib.sha256(member.read_bytes()).hexdigest()
    del manifest["sha256"]
    (copy / "bundle.json").write_text(json.dumps(manifest))

    with pytest.raises(BundleInvalid, match="weights in another file"):
        Bundle.open(copy).verify()
