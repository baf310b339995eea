"""Explorers answer every value of every control from a precomputed frame: no network runs, no error shows."""

import itertools
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image as Picture
from torch import nn

from granq import analysis, explore
from granq.config import QATConfig
from granq.data import DataSpec
from granq.qat import train
from granq.quantizer import fake_quantize

SPEC = DataSpec("digits", 3, 8, (0.3,) * 3, (0.4,) * 3)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def latencies(column: str) -> pd.DataFrame:
    """Two sizes, one of which is measured at one batch only."""
    sizes = [(4, 8, 6, 6), (16, 8, 6, 6), (4, 32, 3, 3)]
    rows = []
    for (n, c, h, w), name in itertools.product(sizes, ("copy", "loop", "release")):
        time = n * c * (1 + len(name))
        values = dict(shape=str((n, c, h, w))) if column == "method" else dict(batch=n, channels=c)
        times = dict(median_ms=time, q25_ms=0.9 * time, q75_ms=1.2 * time, bytes=4 * n * c * h * w)
        rows.append({column: name} | values | times)
    return pd.DataFrame(rows)


def controls_of(explorer: explore.widgets.Widget) -> dict[str, explore.widgets.Widget]:
    """The controls of an explorer by their label."""
    return {c.description: c for c in explorer.children[1].children if not isinstance(c, explore.widgets.Play)}


def values_of(control: explore.widgets.Widget) -> list:
    return [value for _, value in control.options]


def measure_reaction(explorer: explore.widgets.Widget, moves: int = 60, seed: int = 0) -> pd.DataFrame:
    """Milliseconds from a control's new value to the new picture and numbers, over random moves of random controls.

    It is the kernel's share of a reaction, told in notebooks/README.md; moves that change nothing give no row.
    """
    rng, rows, shown = np.random.default_rng(seed), [], [0.0]
    for output in explorer.children[2:4]:  # picture, numbers
        output.observe(lambda _: shown.append(time.perf_counter()), "value")
    every = [(label, c) for label, c in controls_of(explorer).items() if len(c.options) > 1]
    for _ in range(moves):
        label, control = every[rng.integers(len(every))]
        others = [v for v in values_of(control) if v != control.value]
        start, control.value = time.perf_counter(), others[rng.integers(len(others))]
        if shown[-1] > start:
            rows.append({"control": label, "reaction_ms": 1000 * (shown[-1] - start)})
    return pd.DataFrame(rows)


@pytest.fixture
def explorers(tiny: nn.Module) -> dict[str, explore.widgets.Widget]:
    histograms = analysis.measure_channel_histograms(
        tiny, {"synthetic": images(), "real": -images()}, ["conv2"], (2, 3)
    )
    errors = [
        analysis.measure_layer_error(tiny, [images()], ["release", "strict"], 2, per_channel=c) for c in (False, True)
    ]
    return {
        "distortion": explore.distortion_microscope(histograms),
        "scales": explore.scale_explorer(analysis.measure_scale_maps(tiny, images(), ["conv1", "conv2"], 3)),
        "errors": explore.layer_error_explorer(pd.concat(errors, ignore_index=True)),
        "speed": explore.speed_lab(latencies("method")),
        "scaling": explore.speed_lab(latencies("execution")),
    }


NAMES = ("distortion", "scales", "errors", "speed", "scaling")


@pytest.mark.parametrize("name", NAMES)
def test_every_value_draws_without_a_network(name: str, explorers: dict, monkeypatch) -> None:
    explorer = explorers[name]
    _, _, picture, numbers, errors = explorer.children
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("a callback ran a network"))
    seen = {(picture.value, numbers.value)}
    for control in controls_of(explorer).values():
        for value in values_of(control):
            control.value = value
            assert not errors.outputs, errors.outputs
            assert numbers.value.startswith("<table>") and "nan" not in numbers.value
            seen.add((picture.value, numbers.value))
    assert len(seen) >= len(controls_of(explorer))  # controls change what is shown


@pytest.mark.parametrize("name", NAMES)
def test_controls_are_labeled_and_wait_for_release(name: str, explorers: dict) -> None:
    for label, control in controls_of(explorers[name]).items():
        assert label and control.layout.width
        assert not getattr(control, "continuous_update", False)


def test_picture_keeps_its_size(explorers: dict, tmp_path: Path) -> None:
    for explorer in explorers.values():
        picture = explorer.children[2]
        for control in controls_of(explorer).values():
            control.value = values_of(control)[-1]
            (tmp_path / "picture.png").write_bytes(picture.value)
            with Picture.open(tmp_path / "picture.png") as drawn:
                assert tuple(f"{side}px" for side in drawn.size) == (picture.layout.width, picture.layout.height)


def test_numbers_are_those_of_the_frame(tiny: nn.Module) -> None:
    maps = analysis.measure_scale_maps(tiny, images(), "conv2", 3)
    explorer = explore.scale_explorer(maps)
    controls = controls_of(explorer)
    controls["one scale"].value = "per_sample_channel"
    controls["image"].value = 1
    rows = maps[(maps.granularity == "per_sample_channel") & (maps.image == 1) & (maps.scale > 1e-7)]
    worst = rows.loc[rows.scale.idxmax()]
    assert f"{worst.channel} ({worst.scale:.3g})" in explorer.children[3].value


def test_reaction_is_measured_move_by_move(explorers: dict) -> None:
    frame = measure_reaction(explorers["speed"], moves=12)
    assert 0 < len(frame) <= 12 and (frame.reaction_ms > 0).all()
    assert set(frame.control) <= set(controls_of(explorers["speed"]))


def test_histograms_of_channels(tiny: nn.Module) -> None:
    frame = analysis.measure_channel_histograms(tiny, {"real": images()}, ["conv2"], (3,), channels=2)
    keys = ["layer", "image", "rank", "granularity", "bits", "source"]
    groups = frame.groupby(keys)
    assert (groups["count"].sum() == 64).all() and (groups.count_quantized.sum() == 64).all()  # 8 x 8 pixels
    used = frame[frame.count_quantized > 0].groupby(keys).size()
    assert used.max() <= 8  # at most 2^3 levels
    fine = frame[frame.granularity == "per_sample_channel"].groupby(keys).first()
    reached = fine.lowest + 7 * fine.step
    tops = frame[(frame.granularity == "per_sample_channel") & (frame["count"] > 0)].groupby(keys).bin_right.max()
    assert np.allclose(reached, tops, atol=0.1 * tops.max())  # its own range spans all levels
    with pytest.raises(ValueError, match="no channels"):
        analysis.measure_channel_histograms(tiny, {"real": images()}, ["fc"])


def test_monitor_follows_a_run(tiny: nn.Module, tmp_path: Path) -> None:
    monitor = explore.training_monitor(tmp_path / "run", tiny, SPEC)
    play = monitor.children[1].children[-1]
    assert ">0</td>" in monitor.children[3].value  # epochs
    before = monitor.children[2].value
    config = QATConfig(epochs=2, iterations=2, batch_size=4, warmup_epochs=1, image_size=12)  # not that of the data
    train(tiny, config, evaluate=lambda _: 50.0, out=tmp_path / "run")
    play.value = 1  # as the browser does every two seconds
    controls = controls_of(monitor)
    assert controls["up to epoch"].max == controls["up to epoch"].value == 2
    assert monitor.children[2].value != before and not monitor.children[4].outputs
    after = monitor.children[2].value
    controls["curve"].value = "bn_loss"
    assert monitor.children[2].value != after
    assert "50.00" in monitor.children[3].value


def test_numbers_under_the_pictures_are_true(tiny: nn.Module) -> None:
    """Levels in use are counted on the values, not on the bins; a dead channel is one under every granularity."""
    frame = analysis.measure_channel_histograms(tiny, {"real": images()}, ["conv2"], (8,), channels=1)
    explorer = explore.distortion_microscope(frame)
    controls_of(explorer)["one scale"].value = "per_sample_channel"
    x = tiny.relu(tiny.bn1(tiny.conv1(images()))).detach()
    channel = frame.channel.iloc[0]
    levels = fake_quantize(x, 8)[0, channel].unique().numel()
    assert levels > 32 and f"{levels} of 256" in explorer.children[3].value
    maps = analysis.measure_scale_maps(tiny, images(), "conv2", 3)
    fine = maps.granularity.isin(["per_channel", "per_sample_channel"])
    maps.loc[fine & (maps.channel == 2), "scale"] = 1e-9
    explorer = explore.scale_explorer(maps)
    for granularity in ("per_tensor", "per_sample_channel"):
        controls_of(explorer)["one scale"].value = granularity
        assert re.search(">1</td></tr>", explorer.children[3].value), "one dead channel"
    maps.loc[fine, "scale"] = 1e-9
    explorer = explore.scale_explorer(maps)
    controls_of(explorer)["one scale"].value = "per_channel"
    assert not explorer.children[4].outputs and ">4</td></tr>" in explorer.children[3].value


def test_speed_lab_without_an_execution_at_one_size() -> None:
    frame = latencies("execution")
    explorer = explore.speed_lab(frame[~((frame.execution == "loop") & (frame.channels == 32))])
    controls = controls_of(explorer)
    controls["size of an image"].value = "32 channels"
    for name in ("loop", "release"):
        controls["execution"].value = name
        assert not explorer.children[4].outputs
        assert ("not measured" in explorer.children[3].value) == (name == "loop")
