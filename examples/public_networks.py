"""Networks that others trained and published (docs/reproduction.md), in a file as users of granq have it.

Each function takes ``num_classes`` and returns an untrained network whose state dict has the names of the public file
(without the prefix ``module.`` of DataParallel). ``normalization`` says what each was trained with.
"""

from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

normalization = {
    "resnet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "resnet32": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mobilenet_v1_025": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mobilenet_v2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class ZeroPad(nn.Module):
    """The shortcut without parameters (He et al. 2016, option A): every other pixel, new channels are zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 4, self.channels // 4))


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 and projection:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        elif stride != 1:
            self.shortcut = ZeroPad(outside)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, blocks: int, num_classes: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inside = 16
        for i, width in enumerate((16, 32, 64), 1):
            layers = []
            for j in range(blocks):
                layers.append(Block(inside, width, 2 if i > 1 and j == 0 else 1, projection))
                inside = width
            setattr(self, f"layer{i}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    """CIFAR-10, cifar10_resnet20.th, shortcuts without parameters."""
    return ResNet(3, num_classes, projection=False)


def resnet32(num_classes: int = 100) -> nn.Module:
    """CIFAR-100, cifar100_resnet32.pt, 1x1 shortcuts."""
    return ResNet(5, num_classes, projection=True)


def _conv(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.LeakyReLU(0.1, inplace=True)
    )


def _separable(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside), nn.LeakyReLU(0.1, inplace=True),
    )  # fmt: skip


class MobileNetV1(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            _conv(3, 8, 2), _separable(8, 16, 1), _separable(16, 32, 2),
            _separable(32, 32, 1), _separable(32, 64, 2), _separable(64, 64, 1),
        )  # fmt: skip
        self.stage2 = nn.Sequential(_separable(64, 128, 2), *[_separable(128, 128, 1) for _ in range(5)])
        self.stage3 = nn.Sequential(_separable(128, 256, 2), _separable(256, 256, 1))
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(torch.flatten(self.avg(x), 1))


def mobilenet_v1_025(num_classes: int = 1000) -> nn.Module:
    """ImageNet, imagenet_mobilenet_v1_025.pth, a quarter of MobileNetV1's width, LeakyReLU(0.1)."""
    return MobileNetV1(num_classes)


class PadAfter(nn.Conv2d):
    """A convolution of stride 2 that pads one row below and one column to the right, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """ImageNet, imagenet_mobilenet_v2.pth: torchvision's with TensorFlow's padding, epsilon and weights."""
    net = torchvision.models.mobilenet_v2(num_classes=num_classes, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    for block in list(net.modules()):
        for name, conv in block.named_children():
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                setattr(block, name, PadAfter(
                    conv.in_channels, conv.out_channels, 3, 2, groups=conv.groups, bias=False
                ))  # fmt: skip
    return net
