import json

import pytest

from resnet_ensemble.export import sealed

CONTENT = {"b": [1, 0.5, None], "a": "ü", "c": {"x": True}}


def test_what_was_written_is_read_without_its_hash() -> None:
    assert sealed.loads(sealed.dumps(CONTENT)) == CONTENT


def test_spaces_and_the_order_of_keys_mean_nothing() -> None:
    again = json.loads(sealed.dumps(CONTENT))

    assert sealed.loads(json.dumps(again, sort_keys=True, indent=4).encode()) == CONTENT


def test_another_value_is_found() -> None:
    with pytest.raises(sealed.SealBroken):
        sealed.loads(sealed.dumps(CONTENT).replace(b"0.5", b"0.6"))


def test_a_hash_that_is_no_hash_is_found() -> None:
    with pytest.raises(sealed.SealBroken):
        sealed.loads(json.dumps({"sha256": 1} | CONTENT).encode())


@pytest.mark.parametrize("content", [CONTENT, [1, 2], "text", None])
def test_what_has_no_hash_is_taken_as_it_is(content: object) -> None:
    assert sealed.loads(json.dumps(content).encode()) == content


@pytest.mark.parametrize("text", [b"", b"{", b"\xff{}"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|decode"):
        sealed.loads(text)
