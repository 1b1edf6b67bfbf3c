"""The paper's numbers, to stand beside ours. Errors in %.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, arXiv 1512.03385.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One published result: of the ImageNet validation set, or of the CIFAR-10 test set."""

    top1: float
    top5: float | None
    source: str


# By network and protocol. `center` of ImageNet is not in the paper: it is in the README of the authors' models.
IMAGENET: dict[tuple[str, str], Row] = {
    ("plain18", "10crop"): Row(27.94, None, "Table 2"),
    ("plain34", "10crop"): Row(28.54, 10.02, "Table 3"),
    ("resnet18a", "10crop"): Row(27.88, None, "Table 2"),
    ("resnet34a", "10crop"): Row(25.03, 7.76, "Table 3"),
    ("resnet34b", "10crop"): Row(24.52, 7.46, "Table 3"),
    ("resnet34c", "10crop"): Row(24.19, 7.40, "Table 3"),
    ("resnet50", "10crop"): Row(22.85, 6.71, "Table 3"),
    ("resnet101", "10crop"): Row(21.75, 6.05, "Table 3"),
    ("resnet152", "10crop"): Row(21.43, 5.71, "Table 3"),
    ("resnet34b", "multiscale"): Row(21.84, 5.71, "Table 4"),
    ("resnet34c", "multiscale"): Row(21.53, 5.60, "Table 4"),
    ("resnet50", "multiscale"): Row(20.74, 5.25, "Table 4"),
    ("resnet101", "multiscale"): Row(19.87, 4.60, "Table 4"),
    ("resnet152", "multiscale"): Row(19.38, 4.49, "Table 4"),
    ("resnet50", "center"): Row(24.7, 7.8, "the authors' README"),
    ("resnet101", "center"): Row(23.6, 7.1, "the authors' README"),
    ("resnet152", "center"): Row(23.0, 6.7, "the authors' README"),
}
CIFAR10: dict[tuple[str, str], Row] = {
    ("resnet20", "center"): Row(8.75, None, "Table 6, test"),
    ("resnet32", "center"): Row(7.51, None, "Table 6, test"),
    ("resnet44", "center"): Row(7.17, None, "Table 6, test"),
    ("resnet56", "center"): Row(6.97, None, "Table 6, test"),
    ("resnet110", "center"): Row(6.43, None, "Table 6, test, best of 5; mean 6.61"),
    ("resnet1202", "center"): Row(7.93, None, "Table 6, test"),
}
TABLES = {("imagenet", 1000): IMAGENET, ("cifar10", 10): CIFAR10}


def row(dataset: str, classes: int, network: str, protocol: str) -> Row | None:
    """What the paper reports for a network under a protocol, if it does.

    `classes`: any folders of pictures are of the data set "imagenet", and only with a thousand may they be ImageNet's
    """
    return TABLES.get((dataset, classes), {}).get((network, protocol))
