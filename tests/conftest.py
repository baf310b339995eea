"""Seeds, threads and figures are the same for every test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import granq
from granq.data import describe_data
from granq.models import build_network, save_teacher

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, for tests marked browser."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or os.environ.get("CHROMIUM", "")
    assert chromium, "chromium is missing: make browser installs it"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path_factory.getbasetemp() / "cache"))
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


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return same_tensors(a.state_dict(), b.state_dict())


class Bomb:
    """Whoever unpickles it makes the file ``proof``."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.fixture
def tiny() -> nn.Module:
    return TinyNet().eval()


@pytest.fixture(scope="session")
def charts() -> dict[str, Any]:
    """Every explorer by name, of a tiny network."""
    torch.manual_seed(0)
    tiny = TinyNet().eval()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    both, layers = {"synthetic": images, "real": -images}, ["conv2", "fc"]
    errors = granq.measure_layer_error(tiny, [images], ["granq", "strict"], 2, per_channel=True)
    pairs = {"synthetic against real": images, "real against other real": images[:2]}
    gap = [granq.measure_synthetic_gap(tiny, [x], [-images]).assign(pair=pair) for pair, x in pairs.items()]
    spec = granq.DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
    drawn = [granq.measure_images(x, torch.arange(3), tiny, spec).assign(source=name) for name, x in
             {"synthetic": images[:3], "real": -images[:3]}.items()]  # fmt: skip
    student = granq.quantize_model(tiny, "foldable", 3, 3)
    granq.calibrate(student, [images])
    times = pd.read_csv(Path(__file__).parents[1] / "figures/scaling_latency.csv")
    return {
        "distortion_microscope": granq.distortion_microscope(granq.measure_activation_samples(tiny, both, layers)),
        "quantizer_playground": granq.quantizer_playground(pd.DataFrame({"x": np.linspace(0, 2, 21)})),
        "scale_explorer": granq.scale_explorer(granq.measure_scale_maps(tiny, images, layers, 3)),
        "scale_explorer of weights": granq.scale_explorer(granq.measure_weight_scales(tiny, layers, 3)),
        "layer_explorer": granq.layer_explorer(errors),
        "speed_lab": granq.speed_lab(times),
        "synthetic_against_real": granq.synthetic_against_real(pd.concat(gap), pd.concat(drawn)),
        "method_figure": granq.method_figure(granq.measure_data_flow(tiny, images, "conv2", 3)),
        "integer_walk": granq.integer_walk(granq.measure_integer_walk(student, images, "conv1")),
    }


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
