"""The CIFAR residual networks, as in section 4.2 and Table 6 of the paper (arXiv 1512.03385).

    image (n, 3, 32, 32)
      3x3 convolution, 16 filters              (n, 16, 32, 32)
      n basic blocks of 16 filters             (n, 16, 32, 32)
      n basic blocks of 32 filters, stride 2   (n, 32, 16, 16)
      n basic blocks of 64 filters, stride 2   (n, 64,  8,  8)
      global average pooling, linear           (n, classes)

That is 6n + 2 weighted layers. Every convolution is followed by batch normalisation, before the activation.
Names inside the state dict follow torchvision's ResNet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE_FILTERS = (16, 32, 64)

# Table 6, in millions. The exact counts are in tests/training/test_model.py.
PAPER_PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}


class ShortcutA(nn.Module):
    """Option A: subsample by the stride and append zero channels. It has no parameters."""

    def __init__(self, in_filters: int, out_filters: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_filters = out_filters - in_filters

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_filters))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (Figure 5, left)."""

    def __init__(self, in_filters: int, out_filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_filters, out_filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_filters)
        self.conv2 = nn.Conv2d(out_filters, out_filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_filters)
        changes_shape = stride != 1 or in_filters != out_filters
        self.shortcut = ShortcutA(in_filters, out_filters, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) with option A shortcuts.

    Takes normalised images, float (n, 3, h, w), h and w of at least 4; returns logits, float (n, classes).
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, STAGE_FILTERS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_FILTERS[0])
        self.layer1 = _stage(blocks, STAGE_FILTERS[0], STAGE_FILTERS[0], stride=1)
        self.layer2 = _stage(blocks, STAGE_FILTERS[0], STAGE_FILTERS[1], stride=2)
        self.layer3 = _stage(blocks, STAGE_FILTERS[1], STAGE_FILTERS[2], stride=2)
        self.fc = nn.Linear(STAGE_FILTERS[2], classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (n, 16, h, w)
        x = self.layer1(x)  # (n, 16, h, w)
        x = self.layer2(x)  # (n, 32, h/2, w/2)
        x = self.layer3(x)  # (n, 64, h/4, w/4)
        x = x.mean(dim=(2, 3))  # (n, 64)
        return self.fc(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is typed Any


def parameter_count(model: nn.Module) -> int:
    """Learned values, batch-norm statistics not counted, as the paper counts them."""
    return sum(p.numel() for p in model.parameters())


def _stage(blocks: int, in_filters: int, out_filters: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_filters, out_filters, stride)
    return nn.Sequential(first, *(BasicBlock(out_filters, out_filters, 1) for _ in range(blocks - 1)))


def _initialise(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852), the paper's reference [13]."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build(depth: int, classes: int) -> nn.Module:
    """The network that a checkpoint's recipe describes."""
    return CifarResNet(depth, classes).to(memory_format=torch.channels_last)
