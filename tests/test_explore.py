"""Explorers: what a chart computes is what the library computes, in every state of its controls."""

import itertools
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import vl_convert
from PIL import Image
from torch import nn

import granq
from granq.config import QATConfig
from granq.measure.running import ACTIVATION_GRANULARITIES
from granq.quantizer import fake_quantize_with, qparams_from_range
from granq.runs import train
from granq.show.explorers.base import controls_in_words

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


@pytest.mark.parametrize(("bits", "granularity"), [*zip((2, 3, 5, 8), ACTIVATION_GRANULARITIES, strict=True)])
def test_the_microscope_rounds_like_the_quantizer(samples: pd.DataFrame, granularity: str, bits: int) -> None:
    state = dict(layer="conv2", rank=1, image=2, source="real")
    part = samples[(samples[list(state)] == pd.Series(state)).all(axis=1)]
    shown = marks(granq.distortion_microscope(samples), bits=bits, granularity=granularity, **state)
    low, high = (part[f"{granularity}_{end}"].iloc[0] for end in ("low", "high"))
    right = reference(part.x.to_numpy(), low, high, bits)
    same(rounded_in(shown), right)
    sqnr = 10 * np.log10((right.x**2).sum() / ((right.x - right.value) ** 2).sum())
    line = next(item["text"] for kind, item in shown if kind == "text" and str(item.get("text")).startswith("SQNR"))
    used = f"{right.code.nunique()} of {2**bits} levels in use by {len(part)} values"
    assert line.startswith(f"SQNR {sqnr:.1f} dB, {used}")


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
    states = [dict(bits=b, granularity=g) for b, g in itertools.product((2, 8), ("per_tensor", "per_sample_channel"))]
    assert len({tuple(axes_of(microscope, **state)) for state in states}) == 1
    playground = granq.quantizer_playground(pd.DataFrame({"x": np.arange(0, 2.01, 0.1)}))
    assert len({tuple(axes_of(playground, bits=b, outlier=o)) for b in (2, 8) for o in (2.0, 4.0)}) == 1


def test_every_chart_is_told_to_everybody(charts: dict[str, Any], monkeypatch) -> None:
    """A title, a description, a control for every choice, colors of the page, and two forms in a notebook."""
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("a chart ran a network"))
    for name, chart in charts.items():
        spec = chart.to_dict()
        assert str(spec["title"]).endswith("?") and len(spec["description"]) > 60, name
        assert spec["config"]["background"] == "transparent" and spec["config"]["axis"]["labelColor"] == "currentColor"
        named = [param["bind"]["name"].strip() for param in spec["params"] if "name" in param.get("bind", {})]
        assert named and all(f"{label}: " in controls_in_words(spec) for label in named), name
        bundle, _ = chart._repr_mimebundle_()
        assert set(bundle) == {"application/vnd.vegalite.v5+json", "image/png", "text/plain"}
        assert "/v5." in bundle["application/vnd.vegalite.v5+json"]["$schema"]
        assert len(json.dumps(bundle["application/vnd.vegalite.v5+json"])) < 1_000_000, name


def test_every_choice_draws(charts: dict[str, Any]) -> None:
    """Each control at its last value: something is drawn, and something else than before."""
    same = {("layer_explorer", "pinned")}  # of two schemes: all, or the one and the other
    same |= {("quantizer_playground", name) for name in ("clamped", "minimum", "outlier")}  # tested above
    for name, chart in charts.items():
        first = json.dumps(marks(chart))
        for param in chart.to_dict()["params"]:
            bind = param.get("bind", {"input": ""})
            last = bind["options"][-1] if bind["input"] == "select" else bind.get("max")
            if "value" in param and not isinstance(param["value"], list) and last != param["value"]:
                if (name, param["name"]) not in same:
                    shown = marks(chart, **{param["name"]: last})
                    assert len(shown) > 10 and json.dumps(shown) != first, (name, param["name"])


def test_scales_are_those_of_the_quantizer_and_the_widest_spread_comes_first(tiny: nn.Module) -> None:
    maps = granq.measure_weight_scales(tiny, ["conv1", "conv2", "fc"], 3)
    weight = tiny.conv2.weight.detach().numpy()
    steps = np.ptp(weight, (2, 3)) / 7
    for name, right in (("per_kernel", steps), ("per_out_channel", np.ptp(weight, (1, 2, 3))[:, None] / 7 + 0 * steps)):
        rows = maps[(maps.layer == "conv2") & (maps.granularity == name)]
        np.testing.assert_allclose(rows.pivot(index="filter", columns="channel", values="scale"), right, rtol=1e-6)
    ratios = {layer: np.ptp(getattr(tiny, layer).weight.detach().numpy(), (2, 3)) for layer in ("conv1", "conv2")}
    widest = max(ratios, key=lambda layer: (ratios[layer].max(1) / ratios[layer].min(1)).max())
    chart = granq.scale_explorer(maps)
    values = {param["name"]: param.get("value") for param in chart.to_dict()["params"]}
    ratio = ratios[widest].max(1) / ratios[widest].min(1)
    assert (values["layer"], values["row"]) == (widest, ratio.argmax())
    cells = [told(item) for kind, item in marks(chart, layer="conv2") if kind == "rect" and "filter" in told(item)]
    shown = {(cell["filter"], cell["channel"]): cell["step"] for cell in cells[::-1]}
    assert len(cells) == 2 * 16 and all(np.isclose(step, steps[int(o), int(i)], rtol=1e-3) or
        np.isclose(step, np.ptp(weight[int(o)]) / 7, rtol=1e-3) for (o, i), step in shown.items())  # fmt: skip


def test_layers_are_ranked_by_the_chosen_scheme(tiny: nn.Module) -> None:
    """The layers' order by rank is the order of the chosen scheme's errors, for every metric; hover names the worst."""
    data = granq.measure_layer_error(tiny, [images()], ["granq", "strict"], 2, per_channel=True)
    chart, inside = granq.layer_explorer(data), data[data.channel.notna() & (data["mode"] == "local")]
    rows = data[data.channel.isna() & (data["mode"] == "local") & (data.scheme == "strict")].set_index("layer")
    for metric, worst_first in (("mse", False), ("sqnr_db", True)):
        found = marks(chart, metric=metric, scheme="strict", pinned="strict", order="rank")
        points = [
            text for kind, item in found if "worst: " in (text := item.get("description", "")) and kind == "symbol"
        ]
        places = {re.search(r"layer: (\w+)", text)[1]: float(re.search(r"place: (\d+)", text)[1]) for text in points}
        assert sorted(places, key=places.get) == rows[metric].sort_values(ascending=worst_first).index.tolist()
        for text in points:
            layer, worst = re.search(r"layer: (\w+)", text)[1], int(re.search(r"worst: (\d+)", text)[1])
            own = inside[(inside.layer == layer) & (inside.scheme == "strict")].set_index("channel").sqnr_db
            assert worst == own.idxmin()
    # of two widths the first; rows that are in another order keep their layers' places and names together
    wide = granq.measure_layer_error(tiny, [images()], ["granq"], 8, per_channel=True)
    spec = granq.layer_explorer(pd.concat([data, wide])).to_dict()
    assert spec["datasets"] == chart.to_dict()["datasets"]
    layers, per_channel = [*data.layer.unique()], data.channel.notna()
    turned = granq.layer_explorer(pd.concat([data[per_channel], data[~per_channel][::-1]])).to_dict()
    names = str(turned["vconcat"][0]["layer"][0]["encoding"]["x"]["axis"]["labelExpr"])
    assert re.findall("|".join(layers), names) == layers[::-1]
    kl = granq.layer_explorer(data.assign(kl=0.1)).to_dict()
    assert all("metric == 'kl'" in panel["title"]["text"]["expr"] for panel in kl["vconcat"])


def test_the_speed_lab_offers_what_was_measured_and_red_is_granq(charts: dict[str, Any]) -> None:
    times = pd.read_csv(Path(__file__).parents[1] / "figures/scaling_latency.csv")
    chart = charts["speed_lab"]
    shapes = next(param["bind"]["options"] for param in chart.to_dict()["params"] if param["name"] == "shape")
    assert len(shapes) == len(times[["channels", "batch"]].drop_duplicates())
    red = [item for kind, item in marks(chart) if item.get("fill") == RED or item.get("stroke") == RED]
    assert red and all("pre-scaled" in item["description"] for item in red)
    shown = [told(item) for kind, item in marks(chart, shape=shapes[-1]) if item.get("size") == 70]
    last = times[(times.channels == times.channels.iloc[-1]) & (times.batch == times.batch.iloc[-1])]
    assert {round(x["median_ms"], 6) for x in shown} == {float(f"{v:.4g}") for v in last.median_ms}


def test_the_method_figure_quantizes_like_the_library(tiny: nn.Module, charts: dict[str, Any]) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = tiny.relu(tiny.bn1(tiny.conv1(x))).detach()[:1].double()
    right = granq.fake_quantize(x, 5).flatten(2)[0]
    cells = [told(item) for kind, item in marks(charts["method_figure"], bits=5) if kind == "rect"]
    cells = [cell for cell in cells if "code" in cell]
    assert len(cells) == 2 * right.numel()
    for cell in cells:
        assert np.isclose(cell["value"], right[int(cell["channel"]), int(cell["pixel"])], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_integer_walk_adds_up(tiny: nn.Module, bits: int) -> None:
    """The products of a window are those of torch's own integer convolution, and the value that of the student."""
    student = granq.quantize_model(tiny, "foldable", bits, bits)
    granq.calibrate(student, [images()])
    data = granq.measure_integer_walk(student, images(), "conv2", channels=4, pixels=64)
    twin, seen = granq.integer_model(student), []
    twin.conv2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    twin(images()[:1])
    sums = nn.functional.conv2d(seen[0].int(), twin.conv2.weight.int(), padding=1)[0]
    outputs = data.groupby(["channel", "row", "column"])
    assert outputs.ngroups == sums.numel()
    added = ((data.q + data.z) * data.v).groupby([data.channel, data.row, data.column]).sum()
    assert added.tolist() == sums.flatten().tolist() == outputs["sum"].first().tolist()
    assert np.allclose(outputs.value.first(), outputs.student.first(), atol=1e-5)
    assert data.code.isna().all()  # the mean stands between this layer and the next place
    chosen = dict(channel=2, pixel="row 3, column 4")
    texts = [str(item.get("text")) for kind, item in marks(granq.integer_walk(data), **chosen) if kind == "text"]
    assert any(f"sum of all products: {sums[2, 3, 4]:,} ".replace("-", "\u2212") in text for text in texts)
    mantissa, shift = re.search(r"integers: ([\d,]+) / 2\^(\d+)", " ".join(texts)).groups()
    assert np.isclose(
        int(mantissa.replace(",", "")) / 2 ** int(shift), data.rescale[data.channel == 2].iloc[0], rtol=1e-8
    )


def test_the_integer_walk_ends_with_the_code_that_the_twin_computes(tiny: nn.Module) -> None:
    """Sum, rescale with BatchNorm, ReLU, next grid, clamp."""
    student = granq.quantize_model(tiny, "foldable", 3, 3)
    granq.calibrate(student, [images() / 2])  # a tight range: the clamp has something to do
    data = granq.measure_integer_walk(student, images(), "conv1", channels=4, pixels=64)
    twin, seen = granq.integer_model(student), []
    twin.conv2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    twin(images()[:1])
    (call,) = (node for node in twin.graph.nodes if node.target == "conv2")
    codes = (seen[0] - twin.get_submodule(call.args[0].target).zero_point).flatten()
    outputs = data.groupby(["channel", "row", "column"]).first()
    assert outputs.code.tolist() == codes.tolist()
    assert outputs.free.clip(-4, 3).tolist() == outputs.code.tolist() != outputs.free.tolist()
    (channel, row, column), one = next(i for i in outputs.iterrows() if i[1].free != i[1].code)
    chosen = dict(channel=channel, pixel=f"row {row}, column {column}")
    texts = [str(item.get("text")) for kind, item in marks(granq.integer_walk(data), **chosen) if kind == "text"]
    assert any(f"the next layer reads code {one.free:.0f}, clamped to {one.code:.0f}" in text for text in texts)


def test_real_images_are_measured_like_generated_ones(tiny: nn.Module) -> None:
    spec = granq.DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
    frame = granq.measure_images(images(), torch.tensor([2, 1, 0]), tiny, spec)
    right = tiny(images()).softmax(1)
    assert frame.predicted.tolist() == right.argmax(1).tolist()
    assert np.allclose(frame.confidence, [right[i, 2 - i].item() for i in range(3)])
    pixels = ((images() * 0.4 + 0.3).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert (granq.decode_pixels(frame.pixels[1], 8) == pixels[1]).all()


def test_monitor_follows_a_run(tiny: nn.Module, tmp_path: Path) -> None:
    monitor = granq.training_monitor(tmp_path / "run")
    controls, picture, images, numbers, errors = monitor.children
    quantity, play = controls.children
    assert "no epoch is finished yet" in numbers.value
    before = picture.value
    config = QATConfig(epochs=2, iterations=2, batch_size=4, warmup_epochs=1, image_size=12)  # not that of the data
    train(tiny, config, evaluate=lambda _: 50.0, out=tmp_path / "run")
    quantity.value = "test_top1"
    play.value = 1  # as the browser does every two seconds
    after = picture.value
    assert after != before and not errors.outputs
    assert Image.open(BytesIO(images.value)).size == (3 * 64, 64)  # an image of each label
    assert "<td>2</td>" in numbers.value and "<td>50</td>" in numbers.value
    quantity.value = "bn_loss"
    assert picture.value != after and not errors.outputs


def test_explorers_of_layers_that_are_called_by_numbers() -> None:
    """A CSV gives back 0 for the layer "0"."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 3)).eval()
    batch = torch.randn(2, 3, 8, 8)
    error = granq.measure_layer_error(model, [batch], ["granq"], 3, per_channel=True)
    maps = granq.measure_scale_maps(model, batch, ["0", "2"], 3)
    for explorer, frame in ((granq.layer_explorer, error), (granq.scale_explorer, maps)):
        named, numbered = (explorer(data).to_dict() for data in (frame, frame.astype({"layer": int})))
        values = [[p.get("value") for p in chart["params"]] for chart in (named, numbered)]
        assert values[0] == values[1] and {"0", "2", "4"} & {v for v in values[0] if isinstance(v, str)}
        assert all(isinstance(row["layer"], str) for rows in numbered["datasets"].values() for row in rows)


def test_monitor_shows_a_run_without_a_generator_s_loss(tiny: nn.Module, tmp_path: Path) -> None:
    """Recipe match with a generator that is given has no warm-up."""
    config = QATConfig(recipe="match", epochs=1, iterations=1, batch_size=4, warmup_epochs=0, image_size=8)
    train(tiny, config, evaluate=lambda _: 50.0, out=tmp_path / "run")
    *_, numbers, errors = granq.training_monitor(tmp_path / "run").children
    assert not errors.outputs and "50" in numbers.value


def test_one_scheme_needs_no_list(tiny: nn.Module) -> None:
    images = [torch.randn(4, 3, 8, 8)]
    frame = granq.measure_layer_error(tiny, images, "strict", 3)
    assert frame.equals(granq.measure_layer_error(tiny, images, ["strict"], 3))


def test_a_dead_layer_moves_no_name(tiny: nn.Module) -> None:
    with torch.no_grad():
        tiny.bn1.weight.zero_()
        tiny.bn1.bias.zero_()  # what conv2 and point read is constant
    images = torch.randn(4, 3, 8, 8)
    gap = granq.measure_synthetic_gap(tiny, [images], [-images])
    shown = granq.measure_images(images, torch.zeros(4, dtype=torch.long), tiny)
    spec = granq.synthetic_against_real(gap, shown).to_dict()  # without columns that tell comparisons apart
    assert "conv2" not in json.dumps(spec["vconcat"][1])
    ranges = granq.measure_ranges(tiny, [images])
    shown = marks(granq.range_explorer(ranges), part="activations")
    heights = [item["y"] for kind, item in shown if kind == "symbol" and "layer: conv1" in item.get("description", "")]
    assert heights and None not in heights  # a step of zero has no place on a logarithmic axis, and moves no other
