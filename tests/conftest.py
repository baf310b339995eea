"""Seeds, threads and figures are the same for every test."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from granq.data import describe_data
from granq.models import build_network, save_teacher


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    plt.close("all")


class TinyNet(nn.Module):
    """Conv, BatchNorm, one ReLU module used twice, F.relu, Linear: 3 places after a ReLU, 4 layers."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + self.point(x))
        x = nn.functional.relu(x.mean((2, 3)))
        return self.fc(x)


@pytest.fixture
def tiny() -> nn.Module:
    return TinyNet().eval()


@pytest.fixture
def folder(tmp_path):
    """An image folder whose train split cannot be read."""
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "data/test" / label).mkdir(parents=True)
        (tmp_path / "data/train" / label).mkdir(parents=True)
        (tmp_path / "data/train" / label / "0.png").write_text("not an image: whoever reads this fails")
        for i in range(3):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/test" / label / f"{i}.jpg")
    return f"folder:{tmp_path / 'data'}"


@pytest.fixture
def teacher(tmp_path, folder):
    spec = describe_data(folder, "resnet20_cifar10")
    save_teacher(tmp_path / "t.safetensors", build_network("resnet20_cifar10", 2), "resnet20_cifar10", spec, 50.0)
    return tmp_path / "t.safetensors"


@pytest.fixture
def own(tmp_path):
    """A network in a file of one's own, and weights of it for two classes, ``t.pth``, that another program saved."""
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()"
    text = f"def make(num_classes):\n    return nn.Sequential({layers}, nn.Linear(4, num_classes))\n"
    (tmp_path / "net.py").write_text(f"from torch import nn\n\n\n{text}")
    name = f"{tmp_path / 'net.py'}:make"
    torch.save({"net": build_network(name, 2).state_dict()}, tmp_path / "t.pth")
    return name
