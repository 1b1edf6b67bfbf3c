"""What is told of engines that could not be built."""

from resnet_ensemble.export.build_report import Row, table
from resnet_ensemble.export.engines import Precision


def without(precision: Precision, note: str) -> Row:
    return Row("resnet20", "onnxruntime", precision, None, note)


def test_an_engine_that_is_not_there_has_its_reason_in_the_table() -> None:
    rows = [without("fp32", "failed: the disk is full"), without("int8", "needs pictures: --calibration DIR")]

    head, *lines = table(rows, chosen=set()).splitlines()

    assert head.split()[:3] == ["member", "backend", "precision"]
    assert [" ".join(line.split()) for line in lines] == [
        "resnet20 onnxruntime fp32 failed: the disk is full",
        "resnet20 onnxruntime int8 needs pictures: --calibration DIR",
    ]


def test_columns_are_aligned() -> None:
    rows = [without("fp32", "a"), without("int8", "b")]

    head, *lines = table(rows, chosen=set()).splitlines()

    assert {line.index(row.note) for line, row in zip(lines, rows, strict=True)} == {head.index("verdict")}
