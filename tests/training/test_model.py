import pytest
import torch
import torchvision
from torch import nn

from resnet_ensemble.training.model import (
    BLOCKS,
    FullyConvolutional,
    ResNet,
    Shortcut,
    SubsampleAndPad,
    cifar,
    imagenet,
    multiply_adds,
    parameter_count,
)

# Weights, biases, and batch norm's scale and shift, with 1000 classes and option B: torchvision's counts.
IMAGENET_PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
# Table 6, in millions, and exactly: option A has none.
CIFAR_PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
CIFAR_EXACT = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
# Table 1, in 1e9; the stride in the 3x3 costs the bottleneck networks a little more.
PAPER_MULTIPLY_ADDS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}


@pytest.mark.parametrize("depth", BLOCKS)
def test_imagenet_parameter_counts_are_torchvisions(depth: int) -> None:
    assert parameter_count(imagenet(depth)) == IMAGENET_PARAMETERS[depth]
    assert parameter_count(imagenet(depth, stride_at="v1")) == IMAGENET_PARAMETERS[depth]


@pytest.mark.parametrize("depth", CIFAR_EXACT)
def test_cifar_parameter_counts_are_those_of_table_6(depth: int) -> None:
    count = parameter_count(cifar(depth))

    assert count == CIFAR_EXACT[depth]
    assert round(count / 1e6, 2 if depth < 100 else 1) == CIFAR_PARAMETERS[depth]


@pytest.mark.parametrize("depth", BLOCKS)
def test_multiply_adds_are_those_of_table_1(depth: int) -> None:
    counted = multiply_adds(imagenet(depth, stride_at="v1").eval(), 224) / 1e9

    assert counted == pytest.approx(PAPER_MULTIPLY_ADDS[depth], abs=0.07)


@pytest.mark.parametrize(("depth", "counted"), [(50, 4.09e9), (101, 7.80e9), (152, 11.51e9)])
def test_the_stride_in_the_3x3_costs_more(depth: int, counted: float) -> None:
    assert multiply_adds(imagenet(depth, stride_at="v1.5").eval(), 224) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_weights_load_and_give_torchvisions_logits(depth: int) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).eval()
    ours = imagenet(depth, classes=7).eval()
    x = torch.randn(2, 3, 65, 97)

    ours.load_state_dict(theirs.state_dict())

    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(("option", "count"), [("A", 21_623_848), ("B", 21_797_672), ("C", 22_716_840)])
def test_shortcut_options_differ_by_their_projections(option: Shortcut, count: int) -> None:
    assert parameter_count(imagenet(34, shortcut=option)) == count


@pytest.mark.parametrize(
    ("depth", "option", "count"),
    [
        (50, "A", 22_780_456),
        (50, "C", 40_128_552),
        (101, "A", 41_772_584),
        (101, "C", 76_981_288),
        (152, "A", 57_416_232),
        (152, "C", 107_335_720),
    ],
)
def test_bottlenecks_have_every_option_and_both_strides(depth: int, option: Shortcut, count: int) -> None:
    """Counted by hand: a projection from f to g filters is f * g weights, and 2 g of its batch normalisation."""
    assert parameter_count(imagenet(depth, shortcut=option, stride_at="v1")) == count
    assert parameter_count(imagenet(depth, shortcut=option, stride_at="v1.5")) == count
    ends = [(64, 256), (256, 512), (512, 1024), (1024, 2048)]
    projections = sum(f * g + 2 * g for f, g in ends)
    others = sum((blocks - 1) * (g * g + 2 * g) for blocks, (_, g) in zip(BLOCKS[depth], ends, strict=True))
    assert count - IMAGENET_PARAMETERS[depth] == {"A": -projections, "C": others}[option]


@pytest.mark.parametrize(
    ("network", "depth"),
    [(imagenet(18), 18), (imagenet(50), 50), (imagenet(152), 152), (cifar(20), 20)],
)
def test_depth_counts_the_weighted_layers_without_projections(network: nn.Module, depth: int) -> None:
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]

    assert len(layers) == depth


@pytest.mark.parametrize("plain", [imagenet(34, shortcut="plain"), cifar(20, shortcut="plain")])
def test_a_plain_network_has_the_layers_and_no_shortcut(plain: nn.Module) -> None:
    residual = imagenet(34, shortcut="A") if isinstance(plain.get_submodule("maxpool"), nn.MaxPool2d) else cifar(20)

    assert parameter_count(plain) == parameter_count(residual)
    assert "downsample" not in " ".join(name for name, _ in plain.named_modules())


def test_a_residual_block_of_zero_weights_is_the_identity_and_a_plain_one_is_not() -> None:
    for option, expected in [("A", 3.0), ("plain", 0.0)]:
        block = cifar(8, shortcut=option).layer1[0].eval()
        nn.init.zeros_(block.bn2.weight)

        assert block(torch.full((1, 16, 4, 4), 3.0)).unique().tolist() == [expected]


@pytest.mark.parametrize("depth", [2, 7, 21, 34])
def test_a_cifar_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        cifar(depth)


def test_an_imagenet_depth_that_is_not_in_table_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \[18, 34, 50, 101, 152\] layers, not 20"):
        imagenet(20)


def test_stages_halve_the_size_and_double_the_filters() -> None:
    shapes = []
    network = imagenet(50).eval()
    for stage in range(1, 5):
        network.get_submodule(f"layer{stage}").register_forward_hook(lambda _m, _i, y: shapes.append(tuple(y.shape)))

    network(torch.zeros(1, 3, 224, 224))

    assert shapes == [(1, 256, 56, 56), (1, 512, 28, 28), (1, 1024, 14, 14), (1, 2048, 7, 7)]


def test_option_a_subsamples_and_appends_zero_channels() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)

    y = SubsampleAndPad(2, 5, stride=2)(x)

    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


def test_option_a_as_a_convolution_gives_the_same_bits() -> None:
    shortcut = SubsampleAndPad(16, 32, stride=2)
    x = torch.randn(3, 16, 9, 12, generator=torch.Generator().manual_seed(0))

    assert torch.equal(shortcut.as_convolution()(x), shortcut(x))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_any_number_of_classes_and_any_size(classes: int) -> None:
    assert cifar(8, classes=classes).eval()(torch.zeros(3, 3, 41, 27)).shape == (3, classes)
    assert imagenet(18, classes=classes).eval()(torch.zeros(1, 3, 65, 120)).shape == (1, classes)


@pytest.mark.parametrize(
    ("size", "windows"),
    [
        ((32, 32), (1, 1)),
        ((48, 60), (5, 8)),
        ((80, 32), (13, 1)),
    ],
)
def test_scores_are_averaged_over_the_windows_of_a_larger_picture(
    size: tuple[int, int], windows: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    network = cifar(8).eval()
    x = torch.randn(2, 3, *size)

    with torch.inference_mode():
        found = FullyConvolutional(network, crop=32)(x)
        features = network.features(x)  # (2, 64, h / 4, w / 4)
        heights, widths = (places - count + 1 for places, count in zip(features.shape[2:], windows, strict=True))
        scores = [
            network.fc(features[:, :, top : top + heights, left : left + widths].mean((2, 3)))
            for top in range(windows[0])
            for left in range(windows[1])
        ]

    assert max(heights, widths) <= 8
    torch.testing.assert_close(found, torch.stack(scores).mean(0), atol=1e-5, rtol=1e-5)


def test_a_picture_that_is_smaller_than_a_crop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="too small"):
        FullyConvolutional(cifar(8).eval(), crop=32)(torch.zeros(1, 3, 32, 28))


@pytest.mark.parametrize(("network", "crop", "window"), [(imagenet(18), 224, 7), (imagenet(50), 288, 9)])
def test_a_crop_s_scores_are_the_network_s_own(network: ResNet, crop: int, window: int) -> None:
    dense = FullyConvolutional(network, crop).eval()
    x = torch.randn(1, 3, crop, crop)

    with torch.inference_mode():
        found, scores = dense(x), network.eval()(x)

    # Sums in another order: of scores near 0, which are sums of larger numbers, the error is that of these.
    torch.testing.assert_close(found, scores, atol=1e-5 * scores.abs().max().item(), rtol=1e-5)
    assert dense.window == window


def test_convolutions_start_with_he_s_deviation() -> None:
    weight = imagenet(18).layer4[1].conv2.weight

    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
