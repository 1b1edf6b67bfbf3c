"""The Open Inference Protocol's wire format: what is well-formed comes back whole, and nothing hostile gets further."""

import base64
import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_ensemble.server.errors import ApiError
from resnet_ensemble.server.tensors import MAX_JSON_BYTES, Spec, decode, encode, pack

IMAGE = Spec("image", "BYTES", (-1, 1))
PIXELS = Spec("pixels", "UINT8", (-1, -1, -1, 3))
OUTPUTS = (Spec("probabilities", "FP32", (-1, 3)), Spec("label", "BYTES", (-1,)), Spec("certain", "BOOL", (-1,)))
LABELS = ("cat", "dog", "größer")


def body(header: Any, binary: bytes = b"") -> tuple[bytes, str | None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return text + binary, str(len(text)) if binary else None


def tensor(**changes: Any) -> dict[str, Any]:
    """An input `pixels` of two images of 1 x 1, as JSON, with changes; None takes a field away."""
    whole = {"name": "pixels", "shape": [2, 1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3, 4, 5, 6]} | changes
    return {name: value for name, value in whole.items() if value is not None}


def binary(size: object, **changes: Any) -> dict[str, Any]:
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


def request(*inputs: Any, **fields: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **fields}


def parse(header: Any, behind: bytes = b"") -> Any:
    return decode(*body(header, behind), (IMAGE, PIXELS), OUTPUTS)


def refusal(header: Any, behind: bytes = b"") -> str:
    with pytest.raises(ApiError) as caught:
        parse(header, behind)
    return caught.value.code


# What is well-formed


def test_null_is_the_same_as_nothing() -> None:
    pixels, image = tensor(), {"name": "image", "shape": [1], "datatype": "BYTES", "data": [""]}
    without = parse(request(pixels, outputs=[{"name": "label"}]))
    null = request(pixels, outputs=[{"name": "label", "parameters": None}], id=None, model_name=None, parameters=None)
    nulls = dict.fromkeys(("binary_data_output", "timeout", "protocol", "stop"))

    assert str(parse(null)) == str(without)
    assert parse(request(pixels, parameters=nulls)).outputs == parse(request(pixels)).outputs
    assert parse(request(image | {"parameters": None})).inputs == {"image": [b""]}


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=8), st.booleans())
def test_bytes_come_back_whole(elements: list[bytes], flat: bool) -> None:
    shape = [len(elements)] if flat else [len(elements), 1]
    packed = pack(elements)
    there = {"name": "image", "datatype": "BYTES", "shape": shape}

    behind = parse(request(there | {"parameters": {"binary_data_size": len(packed)}}), packed)
    within = parse(request(there | {"data": [base64.b64encode(element).decode() for element in elements]}))

    assert behind.inputs["image"] == within.inputs["image"] == elements


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_pixels_come_back_whole(images: int, height: int, width: int, data: st.DataObject) -> None:
    shape = (images, height, width, 3)
    size = images * height * width * 3
    content = data.draw(st.binary(min_size=size, max_size=size))
    pixels = np.frombuffer(content, np.uint8).reshape(shape)

    behind = parse(request(binary(size, shape=shape)), content).inputs["pixels"]
    flat = parse(request(tensor(shape=shape, data=pixels.ravel().tolist()))).inputs["pixels"]
    nested = parse(request(tensor(shape=shape, data=pixels.tolist()))).inputs["pixels"]

    for found in (behind, flat, nested):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)


def test_several_inputs_take_the_bytes_in_their_order() -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}

    found = parse(request(binary(6), image), bytes(range(6)) + pack([b"ab"])).inputs

    assert found["pixels"].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert found["image"] == [b"ab"]


ANSWER = {
    "probabilities": np.array([[0.25, 0.5, 0.25], [0.0, 0.125, 0.875]], np.float32),
    "label": np.array(["dog", "größer"]),
    "certain": np.array([True, False]),
}


def answer(**fields: Any) -> tuple[dict[str, Any], bytes]:
    content, length = encode({"model_name": "m"}, parse(request(tensor(), **fields)), ANSWER, LABELS)
    return json.loads(content[:length]), b"" if length is None else content[length:]


def test_outputs_are_json_unless_asked_otherwise() -> None:
    header, behind = answer(id="7")

    assert behind == b""
    assert (header["model_name"], header["id"]) == ("m", "7")
    assert header["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [2, 3], "data": [0.25, 0.5, 0.25, 0.0, 0.125, 0.875]},
        {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["dog", "größer"]},
        {"name": "certain", "datatype": "BOOL", "shape": [2], "data": [True, False]},
    ]


def test_binary_outputs_stand_behind_the_json_in_their_order() -> None:
    header, behind = answer(parameters={"binary_data_output": True})

    sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"]]
    label = pack([b"dog", "größer".encode()])
    assert sizes == [24, len(label), 2]
    assert behind == struct.pack("<6f", *ANSWER["probabilities"].ravel()) + label + b"\x01\x00"


def test_an_output_says_for_itself_whether_it_is_binary() -> None:
    header, behind = answer(
        parameters={"binary_data_output": True},
        outputs=[{"name": "certain"}, {"name": "label", "parameters": {"binary_data": False}}],
    )

    assert [output["name"] for output in header["outputs"]] == ["certain", "label"]
    assert header["outputs"][1]["data"] == ["dog", "größer"]
    assert behind == b"\x01\x00"


def test_a_classification_is_the_best_classes_as_text() -> None:
    header, _ = answer(outputs=[{"name": "probabilities", "parameters": {"classification": 2}}])

    (output,) = header["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.500000:1:dog", "0.250000:0:cat", "0.875000:2:größer", "0.125000:1:dog"]


# What is not


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]]", b"\xff\xfe", b"null", b"[]", b'{"inputs": NaN}', b"[" * 100_000, b'{"inputs":' * 50_000],
    ids=range(9),
)
def test_what_is_no_json_object_is_refused(header: bytes) -> None:
    assert refusal(header) in ("malformed_request", "invalid_tensor")


@pytest.mark.parametrize("length", ["-1", "+5", "1e1", "0x5", "", " ", "five", "٣", "9" * 5000, "1000000"])
def test_a_length_of_the_json_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(json.dumps(request(tensor())).encode(), length, (PIXELS,), OUTPUTS)

    assert caught.value.code == "malformed_request"


def test_a_length_that_cuts_the_json_is_refused() -> None:
    text = json.dumps(request(tensor())).encode()
    for length in ("0", "10", str(len(text) - 1)):
        with pytest.raises(ApiError) as caught:
            decode(text, length, (PIXELS,), OUTPUTS)
        assert caught.value.code == "malformed_request"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "picture"},
        {"name": 7},
        {"datatype": "FP32"},
        {"datatype": "uint8"},
        {"shape": None},
        {"shape": []},
        {"shape": [2, 1, 3]},
        {"shape": [2, 1, 1, 4]},
        {"shape": [0, 1, 1, 3]},
        {"shape": [-1, 1, 1, 3]},
        {"shape": [1, 1, 1, 3]},
        {"shape": [2.0, 1, 1, 3.5]},
        {"shape": ["2", 1, 1, 3]},
        {"shape": [True, 1, 1, 3]},
        {"shape": [2**31, 1, 1, 3]},
        {"shape": [2**31 - 1, 2**31 - 1, 2**31 - 1, 3]},
        {"shape": [10**400, 1, 1, 3]},
        {"shape": [1] * 1000},
        {"data": None},
        {"data": 7},
        {"data": "abcdef"},
        {"data": {"0": 1}},
        {"data": []},
        {"data": [1] * 5},
        {"data": [1] * 7},
        {"data": [[[[1, 2, 3]]], [[[4, 5]]]]},
        {"data": [[1, 2, 3], [4, 5, 6]]},
        {"data": [1, 2, 3, 4, 5, 256]},
        {"data": [1, 2, 3, 4, 5, -1]},
        {"data": [1, 2, 3, 4, 5, 6.5]},
        {"data": [1, 2, 3, 4, 5, float("nan")]},
        {"data": [1, 2, 3, 4, 5, float("inf")]},
        {"data": [1, 2, 3, 4, 5, 10**400]},
        {"data": [1, 2, 3, 4, 5, "6"]},
        {"data": [1, 2, 3, 4, 5, None]},
        {"data": [True] * 6},
        {"data": [[[[[[[[1]]]]]]]]},
        {"dtype": "UINT8"},
        {"parameters": {"binary_data_size": 6}},  # and data
    ],
    ids=str,
)
def test_a_tensor_that_is_not_what_the_model_takes_is_refused(changes: dict[str, Any]) -> None:
    assert refusal(request(tensor(**changes))) == "invalid_tensor"


def test_texts_take_no_more_room_than_they_have() -> None:
    texts = ["x" * 2**20, *[""] * 2**18]  # in an array of texts, a terabyte

    assert refusal(request(tensor(data=texts))) == "invalid_tensor"


def test_lists_of_other_lengths_are_told_from_what_is_no_number() -> None:
    with pytest.raises(ApiError, match="a list of 6, or lists nested as its shape says"):
        parse(request(tensor(data=[[[[1, 2, 3]]], [[[4, 5]]]])))
    with pytest.raises(ApiError, match="whole numbers from 0 to 255"):
        parse(request(tensor(data=[1, 2, 3, 4, 5, "6"])))


def test_of_many_unknown_fields_the_first_is_told() -> None:
    with pytest.raises(ApiError, match=r"^invalid_tensor: .{1,99}'0' is not known$"):
        parse(request(tensor(), **{str(i): i for i in range(1000)}))
    assert refusal(request(tensor(), parameters={"stopp": "exact"})) == "invalid_option"
    assert refusal(request(tensor(parameters={"x": 1}))) == "invalid_option"


def test_a_request_of_kserve_s_client_may_name_its_model_again() -> None:
    assert parse({"id": "7", "model_name": "cifar10", **request(tensor())}).id == "7"


@pytest.mark.parametrize("data", [["no base64!"], ["YQ"], ["ä"], [7], [None], [["YQ=="]], ["YQ=="] * 2, "YQ=="])
def test_in_json_pictures_are_base64(data: object) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}

    assert refusal(request(image)) == "invalid_tensor"


@pytest.mark.parametrize("data", [["YQ==", "Yg=="], [["YQ=="], ["Yg=="]]])
def test_in_json_pictures_are_flat_or_nested_as_their_shape_is(data: object) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [2, 1], "data": data}

    assert parse(request(image)).inputs["image"] == [b"a", b"b"]
    assert refusal(request(image | {"data": [["YQ==", "Yg=="]]})) == "invalid_tensor"
    assert refusal(request(image | {"data": [["YQ=="], "Yg=="]})) == "invalid_tensor"


@pytest.mark.parametrize("size", [0, 5, 7, 2**40, 10**400])
def test_bytes_that_are_not_the_size_of_the_shape_are_refused(size: int) -> None:
    assert refusal(request(binary(size)), bytes(min(size, 10))) in ("invalid_tensor", "malformed_request")


def test_bytes_of_no_input_are_refused() -> None:
    assert refusal(request(binary(6)), bytes(7)) == "malformed_request"
    assert refusal(request(tensor()), bytes(1)) == "malformed_request"


@pytest.mark.parametrize(
    "content", [b"\0", b"\4\0\0\0abc", b"\xff\xff\xff\xffabc", pack([b"abc"])[:-1], pack([b"a"]) + b"x"]
)
def test_elements_that_are_cut_off_or_longer_are_refused(content: bytes) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(content)}}

    assert refusal(request(image), content) == "invalid_tensor"


def test_a_number_of_elements_that_can_t_be_is_refused_before_they_are_counted() -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [2**31 - 1], "parameters": {"binary_data_size": 4}}
    began = time.monotonic()

    assert refusal(request(image), bytes(4)) == "invalid_tensor"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"outputs": [{"name": "logits"}]}, "invalid_tensor"),
        ({"outputs": [{"name": "label"}] * 2}, "invalid_tensor"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "invalid_option"),
        ({"outputs": [{"name": "probabilities", "parameters": {"classification": 0}}]}, "invalid_option"),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]}, "invalid_option"),
        ({"outputs": [{"name": "label", "parameters": {"shared_memory_region": "x"}}]}, "invalid_option"),
        ({"parameters": {"priority": 1}}, "invalid_option"),
        ({"parameters": {"timeout": 0}}, "invalid_option"),
        ({"parameters": {"timeout": "soon"}}, "invalid_option"),
        ({"parameters": {"protocol": "11crop"}}, "invalid_option"),
        ({"parameters": {"stop": "early"}}, "invalid_option"),
        ({"parameters": {"binary_data_output": 1}}, "invalid_option"),
        ({"parameters": 7}, "invalid_option"),
        ({"output": []}, "invalid_tensor"),
        ({"id": 7}, "invalid_tensor"),
    ],
    ids=str,
)
def test_what_the_model_does_not_give_is_refused(fields: dict[str, Any], code: str) -> None:
    assert refusal(request(tensor(), **fields)) == code


@pytest.mark.parametrize("size", [-1, 1.5, "6", True, None])
def test_a_binary_size_that_is_none_is_refused(size: object) -> None:
    assert refusal(request(binary(size)), bytes(6)) in ("invalid_option", "invalid_tensor")


def test_inputs_must_be_there_once() -> None:
    assert refusal(request()) == "invalid_tensor"
    assert refusal({}) == "invalid_tensor"
    assert refusal(request(tensor(), tensor())) == "invalid_tensor"


def test_json_that_would_hold_up_others_is_refused_unparsed() -> None:
    with pytest.raises(ApiError) as caught:
        decode(b"[" * (MAX_JSON_BYTES + 1), None, (PIXELS,), OUTPUTS)

    assert caught.value.code == "request_too_large"
    assert "binary" in caught.value.detail


def test_json_of_very_many_lists_is_refused_unparsed() -> None:
    """Parsed, it takes twenty times the memory of its bytes, and nothing else runs meanwhile."""
    with pytest.raises(ApiError, match="131072 lists") as caught:
        decode(b'{"inputs":[' + b"[0],[0]," * 2**16, None, (PIXELS,), OUTPUTS)
    assert caught.value.code == "request_too_large"

    nested = json.dumps({"inputs": [tensor(shape=[2, 224, 224, 3], data=np.zeros((2, 224, 224, 3), int).tolist())]})
    assert decode(nested.encode(), None, (PIXELS,), OUTPUTS).inputs["pixels"].shape == (2, 224, 224, 3)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), _JSON),
    st.binary(max_size=20),
    st.integers(-5, 5),
)
def test_whatever_comes_is_an_answer_or_a_refusal(changes: dict[str, Any], behind: bytes, cut: int) -> None:
    text = json.dumps(request(tensor() | changes)).encode()
    try:
        found = decode(text + behind, str(max(0, len(text) + cut)), (PIXELS, IMAGE), OUTPUTS)
    except ApiError as error:
        assert error.code in ("malformed_request", "invalid_tensor", "invalid_option")
    else:
        assert isinstance(found.inputs.get("pixels"), np.ndarray)
