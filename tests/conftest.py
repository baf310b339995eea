"""Seeds, threads and figures are the same for every test."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    plt.close("all")


class TinyNet(nn.Module):
    """Conv, BatchNorm, one ReLU module used twice, F.relu, Linear: 3 places behind ReLU, 4 layers."""

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
