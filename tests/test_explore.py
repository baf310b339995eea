"""Explorers: what a chart computes is what the library computes, in every state of its controls."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import vl_convert
from torch import nn

import granq
from granq.config import QATConfig
from granq.measure.running import ACTIVATION_GRANULARITIES
from granq.quantizer import fake_quantize_with, qparams_from_range
from granq.runs import train

RED = "#e42536"


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def marks(chart: Any, **controls: Any) -> list[tuple[str, dict[str, Any]]]:
    """The evaluated marks of a chart with these values of its controls: kind and item, with what a hover says."""
    spec, left = chart.to_dict(), set(controls)
    for param in spec["params"]:
        if param["name"] in controls:
            param["value"] = controls[param["name"]]
            left.remove(param["name"])
    assert not left, left
    spec = json.loads(json.dumps(spec), object_hook=lambda d: {k: v for k, v in d.items() if k != "format"})
    found, todo = [], [vl_convert.vegalite_to_scenegraph(spec)]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            if "marktype" in node and node.get("items"):
                found += [(node["marktype"], item) for item in node["items"]]
            todo += node.values()
        elif isinstance(node, list):
            todo += node
    return found


def told(item: dict[str, Any]) -> dict[str, Any]:
    """What the description of a mark says: numbers where they are numbers."""
    pairs = [part.split(": ", 1) for part in item.get("description", "").replace("\u2212", "-").split("; ")]
    return {pair[0]: float(pair[1].replace(",", "")) for pair in pairs if len(pair) == 2 and _number(pair[1])}


def _number(text: str) -> bool:
    try:
        return bool(text) and float(text.replace(",", "")) is not None
    except ValueError:
        return False


def rounded_in(found: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """The points of the staircase, ordered by x."""
    rows = [told(item) for kind, item in found if kind == "symbol" and item.get("fill") == RED]
    points = pd.DataFrame([row for row in rows if "activation" in row or "after rounding" in row])
    return points[["x", "code", "value"]].sort_values("x")


def reference(x: np.ndarray, low: Any, high: Any, bits: int, clamp: bool = True) -> pd.DataFrame:
    x = torch.from_numpy(np.sort(x).astype(np.float64))
    qparams = qparams_from_range(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), bits)
    codes = granq.quantize(x, *qparams, bits, clamp)
    return pd.DataFrame({"x": x, "code": codes.double(), "value": fake_quantize_with(x, qparams, bits, clamp)})


def same(chart: pd.DataFrame, torch_says: pd.DataFrame) -> None:
    assert len(chart) == len(torch_says)
    np.testing.assert_array_equal(chart.code.to_numpy(), torch_says.code.to_numpy())
    np.testing.assert_allclose(chart.to_numpy(), torch_says.to_numpy(), rtol=1e-9, atol=1e-12)


@pytest.fixture
def samples(tiny: nn.Module) -> pd.DataFrame:
    both = {"synthetic": images(), "real": -images()}
    return granq.measure_activation_samples(tiny, both, ["conv2", "fc"], channels=2, values=16)


def test_samples_are_activations_with_the_ranges_of_their_groups(tiny: nn.Module, samples: pd.DataFrame) -> None:
    x = tiny.relu(tiny.bn1(tiny.conv1(-images()))).detach().numpy()
    rows = samples[(samples.layer == "conv2") & (samples.source == "real")]
    spread = np.ptp(x, (0, 2, 3))
    assert rows.groupby("rank").channel.first().tolist() == [spread.argmin(), spread.argmax()]
    groups = {
        "per_tensor": (0, 1, 2, 3),
        "per_channel": (0, 2, 3),
        "per_sample": (1, 2, 3),
        "per_sample_channel": (2, 3),
    }
    for (image, channel), part in rows.groupby(["image", "channel"]):
        assert len(part) == 16 and np.isin(part.x.to_numpy(), x[image, channel]).all()
        assert (part.x.min(), part.x.max()) == (x[image, channel].min(), x[image, channel].max())
        for name, dims in groups.items():
            for end, extreme in (("low", x.min(dims, keepdims=True)), ("high", x.max(dims, keepdims=True))):
                assert (part[f"{name}_{end}"] == np.broadcast_to(extreme, x.shape)[image, channel, 0, 0]).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES)
def test_the_microscope_rounds_like_the_quantizer(samples: pd.DataFrame, granularity: str, bits: int) -> None:
    state = dict(layer="conv2", rank=1, image=2, source="real")
    part = samples[(samples[list(state)] == pd.Series(state)).all(axis=1)]
    shown = marks(granq.distortion_microscope(samples), bits=bits, granularity=granularity, **state)
    low, high = (part[f"{granularity}_{end}"].iloc[0] for end in ("low", "high"))
    right = reference(part.x.to_numpy(), low, high, bits)
    same(rounded_in(shown), right)
    sqnr = 10 * np.log10((right.x**2).sum() / ((right.x - right.value) ** 2).sum())
    line = next(item["text"] for kind, item in shown if kind == "text" and str(item.get("text")).startswith("SQNR"))
    assert line.startswith(f"SQNR {sqnr:.1f} dB, {right.code.nunique()} of {2**bits} levels in use")


def test_ties_go_to_even_as_in_torch() -> None:
    x = np.array([0.5, 1.5, 4.0, 7.5])  # method.md, section 8: codes -4 -2 0 and 4, above the range without a clamp
    data = pd.DataFrame(dict(x=x, source="real", layer="a", rank=0, image=0, channel=0))
    ends = {f"{g}_{end}": v for g in ACTIVATION_GRANULARITIES for end, v in (("low", 0.5), ("high", 7.5))}
    shown = rounded_in(marks(granq.distortion_microscope(data.assign(**ends)), bits=3))
    assert shown.code.tolist() == [-4, -2, 0, 3]
    same(shown, reference(x, 0.5, 7.5, 3))
    x = np.arange(-8, 8.5, 0.5)  # halves of both signs: with 16 steps of one every second value is a tie
    for clamped in (True, False):
        state = dict(bits=4, minimum=-8.0, maximum=7.0, outlier=7.0, clamped=clamped)
        shown = rounded_in(marks(granq.quantizer_playground(pd.DataFrame({"x": x})), **state))
        same(shown, reference(x, -8.0, 7.0, 4, clamped))


def test_an_outlier_widens_the_range_of_the_playground() -> None:
    x = np.arange(0, 2.01, 0.1)
    state = dict(bits=3, minimum=0.0, maximum=2.0, outlier=4.0, clamped=True)
    same(rounded_in(marks(granq.quantizer_playground(pd.DataFrame({"x": x})), **state)), reference(x, 0.0, 4.0, 3))


def axes_of(chart: Any, **controls: Any) -> list[str]:
    """Every text of an axis."""
    return [str(item.get("text")) for kind, item in marks(chart, **controls) if kind == "text" and "limit" in item]


def test_axes_stay_while_bits_and_ranges_change(samples: pd.DataFrame) -> None:
    microscope = granq.distortion_microscope(samples)
    states = [dict(bits=b, granularity=g) for b, g in itertools.product((2, 4, 8), ACTIVATION_GRANULARITIES)]
    assert len({tuple(axes_of(microscope, **state)) for state in states}) == 1
    playground = granq.quantizer_playground(pd.DataFrame({"x": np.arange(0, 2.01, 0.1)}))
    assert len({tuple(axes_of(playground, bits=b, outlier=o)) for b in (2, 8) for o in (2.0, 4.0)}) == 1


@pytest.fixture
def charts(tiny: nn.Module, samples: pd.DataFrame) -> dict[str, Any]:
    return {
        "microscope": granq.distortion_microscope(samples),
        "playground": granq.quantizer_playground(pd.DataFrame({"x": np.linspace(0, 1, 30)})),
    }


def test_every_chart_is_told_to_everybody(charts: dict[str, Any], tmp_path: Path) -> None:
    """A title, a description, a control for every choice, colors of the page, and two forms in a notebook."""
    for name, chart in charts.items():
        spec = chart.to_dict()
        assert str(spec["title"]).endswith("?") and len(spec["description"]) > 60, name
        assert spec["config"]["background"] == "transparent" and spec["config"]["axis"]["labelColor"] == "currentColor"
        assert any("bind" in param for param in spec["params"]), name
        bundle = chart._repr_mimebundle_()
        assert set(bundle) == {"application/vnd.vegalite.v5+json", "image/png", "text/plain"}
        assert "/v5." in bundle["application/vnd.vegalite.v5+json"]["$schema"]
        assert len(json.dumps(bundle)) < 1_500_000, name  # a megabyte a chart, and its picture


def test_monitor_follows_a_run(tiny: nn.Module, tmp_path: Path) -> None:
    monitor = granq.training_monitor(tmp_path / "run")
    controls, picture, numbers, errors = monitor.children
    quantity, play = controls.children
    assert "no epoch is finished yet" in numbers.value
    before = picture.value
    config = QATConfig(epochs=2, iterations=2, batch_size=4, warmup_epochs=1, image_size=12)  # not that of the data
    train(tiny, config, evaluate=lambda _: 50.0, out=tmp_path / "run")
    quantity.value = "test_top1"
    play.value = 1  # as the browser does every two seconds
    after = picture.value
    assert after != before and not errors.outputs
    assert "<td>2</td>" in numbers.value and "<td>50</td>" in numbers.value
    quantity.value = "bn_loss"
    assert picture.value != after and not errors.outputs
