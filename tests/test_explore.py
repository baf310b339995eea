"""Explorers answer every value of every control from a precomputed frame: no network runs, no error shows."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image as Picture
from torch import nn

from granq.config import QATConfig
from granq.data import DataSpec
from granq.measure.activations import measure_channel_histograms, measure_scale_maps
from granq.measure.layer_error import measure_layer_error
from granq.quantizer import fake_quantize
from granq.runs import train
from granq.show import explorers as show

SPEC = DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def latencies() -> pd.DataFrame:
    """Three sizes, and the executions of a benchmark."""
    rows = []
    for (n, c), name in itertools.product([(4, 8), (16, 8), (4, 32)], ("loop", "pre-scaled", "folded")):
        time, count = n * c * (1 + len(name)), n * c * (name != "folded")
        values = dict(execution=name, batch=n, channels=c, peak_mb=time, scale_multiplications=count)
        rows.append(values | dict(median_ms=time, q25_ms=0.9 * time, q75_ms=1.2 * time))
    return pd.DataFrame(rows)


def controls_of(explorer: Any) -> dict[str, Any]:
    """The controls of an explorer by their label."""
    return {c.description: c for c in explorer.children[0].children if not isinstance(c, show.widgets.Play)}


def values_of(control: Any) -> list:
    return [value for _, value in control.options]


@pytest.fixture
def explorers(tiny: nn.Module) -> dict[str, Any]:
    both = {"synthetic": images(), "real": -images()}
    errors = [measure_layer_error(tiny, [images()], ["granq", "strict"], 2, per_channel=c) for c in (False, True)]
    return {
        "distortion": show.distortion_microscope(measure_channel_histograms(tiny, both, ["conv2"], (2, 3))),
        "scales": show.scale_explorer(measure_scale_maps(tiny, images(), ["conv1", "conv2"], 3)),
        "errors": show.layer_error_explorer(pd.concat(errors, ignore_index=True)),
        "speed": show.speed_lab(latencies()),
    }


@pytest.mark.parametrize("name", ("distortion", "scales", "errors", "speed"))
def test_every_value_draws_without_a_network(name: str, explorers: dict, tmp_path: Path, monkeypatch) -> None:
    explorer = explorers[name]
    _, picture, numbers, errors = explorer.children
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("a callback ran a network"))
    seen = {(picture.value, numbers.value)}
    for label, control in controls_of(explorer).items():
        assert label and not getattr(control, "continuous_update", False)
        for value in values_of(control):
            control.value = value
            assert not errors.outputs, errors.outputs
            assert numbers.value.startswith("<table") and "NaN" not in numbers.value
            seen.add((picture.value, numbers.value))
        (tmp_path / "picture.png").write_bytes(picture.value)
        with Picture.open(tmp_path / "picture.png") as drawn:  # the page does not jump
            assert tuple(f"{side}px" for side in drawn.size) == (picture.layout.width, picture.layout.height)
    assert len(seen) >= len(controls_of(explorer))  # controls change what is shown


def test_numbers_under_the_pictures_are_true(tiny: nn.Module) -> None:
    """Levels in use are counted on the values, not on the bins; the widest channels of an image come first."""
    frame = measure_channel_histograms(tiny, {"real": images()}, ["conv2"], (8,), channels=1)
    explorer = show.distortion_microscope(frame)
    controls_of(explorer)["granularity"].value = "per_sample_channel"
    x = tiny.relu(tiny.bn1(tiny.conv1(images()))).detach()
    levels = fake_quantize(x, 8)[0, frame.channel.iloc[0]].unique().numel()
    assert levels > 32 and f"<td>{levels}</td>" in explorer.children[2].value
    maps = measure_scale_maps(tiny, images(), "conv2", 3)
    explorer = show.scale_explorer(maps)
    controls_of(explorer)["granularity"].value = "per_sample_channel"
    controls_of(explorer)["image"].value = 1
    rows = maps[(maps.granularity == "per_sample_channel") & (maps.image == 1)]
    worst = rows.loc[rows.scale.idxmax()]
    first = re.findall("<td>(.*?)</td>", explorer.children[2].value)[:3]
    assert first == ["1", str(worst.channel), f"{worst.scale:.4g}"]


def test_histograms_of_channels(tiny: nn.Module) -> None:
    frame = measure_channel_histograms(tiny, {"real": images()}, ["conv2"], (3,), channels=2)
    keys = ["layer", "image", "rank", "granularity", "bits", "source"]
    groups = frame.groupby(keys)
    assert (groups["count"].sum() == 64).all() and (groups.count_quantized.sum() == 64).all()  # 8 x 8 pixels
    assert frame[frame.count_quantized > 0].groupby(keys).size().max() <= 8  # at most 2^3 levels
    fine = frame[frame.granularity == "per_sample_channel"]
    reached = fine.groupby(keys).lowest.first() + 7 * fine.groupby(keys).step.first()
    tops = fine[fine["count"] > 0].groupby(keys).bin_right.max()
    assert np.allclose(reached, tops, atol=0.1 * tops.max())  # its own range spans all levels


def test_monitor_follows_a_run(tiny: nn.Module, tmp_path: Path) -> None:
    monitor = show.training_monitor(tmp_path / "run")
    controls, picture, numbers, errors = monitor.children
    play = next(control for control in controls.children if isinstance(control, show.widgets.Play))
    assert "no epoch is finished yet" in numbers.value
    before = picture.value
    config = QATConfig(epochs=2, iterations=2, batch_size=4, warmup_epochs=1, image_size=12)  # not that of the data
    train(tiny, config, evaluate=lambda _: 50.0, out=tmp_path / "run")
    controls_of(monitor)["quantity"].value = "test_top1"
    play.value = 1  # as the browser does every two seconds
    after = picture.value
    assert after != before and not errors.outputs
    assert "<td>2</td>" in numbers.value and "<td>50</td>" in numbers.value
    controls_of(monitor)["quantity"].value = "bn_loss"
    assert picture.value != after and not errors.outputs


def test_explorers_of_layers_that_are_called_by_numbers():
    """A CSV gives back 0 for the layer "0"."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 3)).eval()
    error = pd.concat([
        measure_layer_error(model, [images()], ["granq"], 3, per_channel=by_channel) for by_channel in (False, True)
    ]).astype({"layer": int})  # fmt: skip
    maps = measure_scale_maps(model, images(), ["0", "2"], 3).astype({"layer": int})
    for explorer in (show.layer_error_explorer(error), show.scale_explorer(maps)):
        for control in controls_of(explorer).values():
            for _, value in control.options:
                control.value = value
                assert not explorer.children[-1].outputs and "nothing to show" not in explorer.children[2].value
