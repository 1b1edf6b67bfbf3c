"""Every network of the paper (arXiv 1512.03385): Table 1 for ImageNet, section 4.2 and Table 6 for CIFAR.

    ImageNet                                     CIFAR, depth 6n + 2
      7x7, 64, stride 2           112 x 112        3x3, 16                    32 x 32
      3x3 max pooling, stride 2    56 x  56
      blocks of  64 (x 4)          56 x  56        n blocks of 16             32 x 32
      blocks of 128 (x 4)          28 x  28        n blocks of 32, stride 2   16 x 16
      blocks of 256 (x 4)          14 x  14        n blocks of 64, stride 2    8 x  8
      blocks of 512 (x 4)           7 x   7
      global average pooling, linear               global average pooling, linear

(x 4): what a bottleneck block gives. Every convolution is followed by batch normalisation, before the activation.
A plain network is the same without the shortcuts. State dicts have torchvision's names and shapes, so its weights, and
whatever was fine-tuned from them, load and save unchanged.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A: subsample and append zero channels. B: 1x1 projections where the shape changes. C: projections everywhere.
Shortcut = Literal["A", "B", "C", "plain"]
# Where a bottleneck that halves the size does it: the paper in its first 1x1 (v1), torchvision in the 3x3 (v1.5).
Stride = Literal["v1", "v1.5"]

# Table 1: blocks per stage.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4  # a bottleneck gives four times the filters of its 3x3 convolution


class SubsampleAndPad(nn.Module):
    """Option A: subsample by the stride and append zero channels. It has no parameters."""

    def __init__(self, in_filters: int, out_filters: int, stride: int) -> None:
        super().__init__()
        self.in_filters, self.out_filters, self.stride = in_filters, out_filters, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_filters - self.in_filters))

    def as_convolution(self) -> nn.Conv2d:
        """The same by 1x1 kernels: each of the first filters takes its channel as it is, the new ones take none."""
        convolution = conv(self.in_filters, self.out_filters, 1, self.stride)
        with torch.no_grad():
            convolution.weight.copy_(torch.eye(self.out_filters, self.in_filters)[:, :, None, None])
        return convolution


def projection(in_filters: int, out_filters: int, stride: int) -> nn.Sequential:
    """Options B and C: a 1x1 convolution and its batch normalisation."""
    return nn.Sequential(conv(in_filters, out_filters, 1, stride), nn.BatchNorm2d(out_filters))


def conv(in_filters: int, out_filters: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (or divides it by the stride); batch norm has the bias."""
    return nn.Conv2d(in_filters, out_filters, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (Figure 5, left). `downsample` is the shortcut; None in a plain network."""

    def __init__(self, in_filters: int, filters: int, stride: int, shortcut: Shortcut, _stride_at: Stride) -> None:
        super().__init__()
        self.conv1 = conv(in_filters, filters, 3, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = _shortcut(in_filters, filters, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual if self.downsample is None else residual + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 to fewer filters, 3x3, 1x1 to four times as many (Figure 5, right)."""

    def __init__(self, in_filters: int, filters: int, stride: int, shortcut: Shortcut, stride_at: Stride) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_at == "v1" else (1, stride)
        self.conv1 = conv(in_filters, filters, 1, first)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3, second)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv3 = conv(filters, EXPANSION * filters, 1)
        self.bn3 = nn.BatchNorm2d(EXPANSION * filters)
        self.downsample = _shortcut(in_filters, EXPANSION * filters, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual if self.downsample is None else residual + self.downsample(x))


class ResNet(nn.Module):
    """A residual (or plain) network. Make one with `imagenet` or `cifar`.

    Takes normalised images, float (n, 3, h, w); returns logits, float (n, classes).
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        pool: nn.Module,
        block: type[BasicBlock | Bottleneck],
        blocks: tuple[int, ...],
        *,
        classes: int,
        shortcut: Shortcut,
        stride_at: Stride,
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.maxpool = pool
        expansion = EXPANSION if block is Bottleneck else 1
        in_filters = stem.out_channels
        for stage, count in enumerate(blocks):
            filters = stem.out_channels * 2**stage
            layers = nn.Sequential()
            for i in range(count):
                layers.append(block(in_filters, filters, 2 if stage > 0 and i == 0 else 1, shortcut, stride_at))
                in_filters = expansion * filters
            self.add_module(f"layer{stage + 1}", layers)
        self.fc = nn.Linear(in_filters, classes)
        # Pixels of a side that one place of the last map stands for: 32 for ImageNet, 4 for CIFAR.
        self.stride = stem.stride[0] * (1 if isinstance(pool, nn.Identity) else 2) * 2 ** (len(blocks) - 1)
        self._stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean(dim=(2, 3))  # (n, filters)
        return self.fc(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is typed Any

    def features(self, x: Tensor) -> Tensor:
        """The last map: (n, filters, h / stride, w / stride)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # ImageNet: (n, 64, h/4, w/4); CIFAR: (n, 16, h, w)
        for name in self._stages:
            x = self.get_submodule(name)(x)  # each stage after the first halves h and w and doubles the filters
        return x


class FullyConvolutional(nn.Module):
    """A network at test time, for pictures that may be larger than the `crop` that it was trained on.

    As in the paper's references for it (OverFeat, arXiv 1312.6229; VGG, arXiv 1409.1556), what it says of every window
    of the last map that is as large as a crop's is averaged, before the softmax. The last layer is linear, so that it
    may come last. Of a crop it is the network itself; a smaller picture has no window, and is refused. With the plain
    mean of the map, the error of ResNet-18 and 50 together on 143 photographs (torchvision's weights, `dense`) is
    20.3 % instead of 18.2, and their mean negative log likelihood 0.95 instead of 0.77 (2026-11-26).
    """

    def __init__(self, network: ResNet, crop: int) -> None:
        super().__init__()
        self.network = network
        self.window = math.ceil(crop / network.stride)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.avg_pool2d(self.network.features(x), self.window, stride=1)
        return self.network.fc(windows.mean(dim=(2, 3)))  # type: ignore[no-any-return]  # as above


def imagenet(depth: int, *, classes: int = 1000, shortcut: Shortcut = "B", stride_at: Stride = "v1.5") -> ResNet:
    """ResNet-18, 34, 50, 101 or 152 of Table 1, for pictures of 224 x 224 or any other size."""
    blocks = imagenet_blocks(depth)
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    block = BasicBlock if depth < 50 else Bottleneck
    return ResNet(stem, pool, block, blocks, classes=classes, shortcut=shortcut, stride_at=stride_at)


def cifar(depth: int, *, classes: int = 10, shortcut: Shortcut = "A") -> ResNet:
    """The network of 6n + 2 layers of section 4.2, for pictures of 32 x 32 or any other size."""
    blocks = cifar_blocks(depth)
    return ResNet(conv(3, 16, 3), nn.Identity(), BasicBlock, blocks, classes=classes, shortcut=shortcut, stride_at="v1")


def imagenet_blocks(depth: int) -> tuple[int, ...]:
    """Blocks per stage, of Table 1. Raises ValueError."""
    if depth not in BLOCKS:
        raise ValueError(f"an ImageNet network has one of {list(BLOCKS)} layers, not {depth}")
    return BLOCKS[depth]


def cifar_blocks(depth: int) -> tuple[int, ...]:
    """Blocks per stage of 6n + 2 layers: n. Raises ValueError."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a CIFAR network has 6n + 2 layers (8, 14, 20, 32, ...), not {depth}")
    return ((depth - 2) // 6,) * 3


def parameter_count(model: nn.Module) -> int:
    """Learned values, batch-norm statistics not counted, as the paper counts them."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and the linear layer for one picture of size x size, as the paper counts."""
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += weight.numel() * output.shape[2:].numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return total


def _shortcut(in_filters: int, out_filters: int, stride: int, option: Shortcut) -> nn.Module | None:
    if option == "plain":
        return None
    same = stride == 1 and in_filters == out_filters
    if same and option != "C":
        return nn.Identity()
    if option == "A":
        return SubsampleAndPad(in_filters, out_filters, stride)
    return projection(in_filters, out_filters, stride)


def _initialise(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852), the paper's reference [13]."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
