"""Every plot draws what its frame holds, into the Axes it is given; redrawing gives the same bytes; colors differ."""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyNet
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

from granq.convert import quantize_model
from granq.data import DataSpec
from granq.errors import UserError
from granq.generator import Generator
from granq.measure.activations import (
    measure_activation_distortion,
    measure_channel_scales,
    measure_data_flow,
    measure_scale_maps,
)
from granq.measure.allocation import measure_budgets
from granq.measure.factorial import factorial_cells, measure_granularity_factorial
from granq.measure.images import measure_generated_images, measure_synthetic_gap
from granq.measure.layer_error import measure_layer_error
from granq.measure.sensitivity import measure_sensitivity
from granq.measure.workbench import Workbench, method_name
from granq.show import registry
from granq.show.layers import (
    GAP_LABELS,
    SQNR_CEILING,
    plot_channel_scales,
    plot_granularity_maps,
    plot_layer_error,
    plot_synthetic_gap,
)
from granq.show.registry import FIGURES, make_figures, redraw_figures
from granq.show.results import (
    plot_accuracy_bits,
    plot_granularity_factorial,
    plot_quantizer_latency,
    plot_scaling_latency,
    plot_synthetic_images,
    plot_training_curves,
    plot_true_bits,
    results_table,
)
from granq.show.style import ROLES, short_layer

SPEC = DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
FACTS = dict(budget="quick", seed=0, commit="abc", torch="2", device="cpu", dataset="digits", network="tiny",
             teacher_test_top1=97.5)  # fmt: skip


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def accuracy() -> pd.DataFrame:
    rows = [
        dict(dataset="digits", network="resnet20", scheme=s, bits=b, seed=k, teacher_top1=90.0, ptq_top1=50.0 + k + i,
             last_top1=80.0 + k + i, best_top1=81.0, test_images=400)
        for i, (s, b, k) in enumerate(itertools.product(("layerwise", "granq"), ("W2A2", "W3A3"), (0, 1)))
    ]  # fmt: skip
    published = [dict(scheme="GDFQ", bits="W3A3", last_top1=75.1, teacher_top1=93.9, source="AdaDFQ (2023), table 2"),
                 dict(scheme="AKT_x", bits="W3A3", last_top1=72.8, source="AKT & co")]  # fmt: skip
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(published)], ignore_index=True)


def history() -> pd.DataFrame:
    rows = [
        dict(epoch=e, warmup=e < 2, generator_loss=2.0 / e, student_loss=-e, bn_loss=1 / e, teacher_top1=10.0 * e,
             diversity=1 / e, codes_changed=9.0 / e, test_top1=20.0 * e, scheme=s, seed=k)
        for s, k, e in itertools.product(("granq", "strict"), (0, 1), (1, 2, 3))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    """A small frame for every figure, measured where that is quick."""
    torch.manual_seed(0)
    tiny = TinyNet().eval()
    error = measure_layer_error(tiny, batches(), ["granq", "strict"], 3, per_channel=True)
    gap = measure_synthetic_gap(tiny, batches(), batches(1))
    drawn = measure_generated_images(Generator(3, 8), tiny, SPEC)
    scales = [measure_channel_scales(tiny, batches(), source=s) for s in ("synthetic", "real")]
    made = {
        "method": measure_data_flow(tiny, batches()[0], "conv2", 3),
        "granularity_maps": measure_scale_maps(tiny, batches()[0], "conv2", 3),
        "activation_distortion": measure_activation_distortion(tiny, batches(), ["conv2", "fc"], [3, 4]),
        "channel_scales": pd.concat(scales, ignore_index=True),
        "layer_error": error,
        "sensitivity": measure_sensitivity(tiny, [(x, torch.zeros(4)) for x in batches()], "strict", 2),
        "accuracy_bits": accuracy(),
        "accuracy_true_bits": measure_budgets(tiny, batches(), lambda _: 50.0, schemes=["strict"], choices=(2, 3, 4)),
        "training_curves": history(),
        "paper_run": pd.concat([history()[:3].assign(run=run) for run in ("whole", "frozen")], ignore_index=True),
        "synthetic_images": pd.concat([drawn.assign(epoch=e) for e in (1, 2)], ignore_index=True),
        "synthetic_gap": gap.assign(pair="synthetic against real"),
        "results_table": results_table(accuracy()),
    }
    return {name: f.assign(**{k: v for k, v in FACTS.items() if k not in f}) for name, f in made.items()}


MEASURED_HERE = ("method", "granularity_maps", "activation_distortion", "channel_scales", "layer_error", "sensitivity",
                 "accuracy_bits", "accuracy_true_bits",
                 "training_curves", "paper_run", "synthetic_images", "synthetic_gap", "results_table")  # fmt: skip


@pytest.mark.parametrize("name", MEASURED_HERE)
def test_plots_are_pure(name: str, frames: dict[str, pd.DataFrame]) -> None:
    """The Axes it was given comes back with artists and a y label; frame, style and random state stay as they were."""
    data, style, rng = frames[name], dict(mpl.rcParams), np.random.get_state()[1].copy()
    copy = data.copy(deep=True)
    figure, (ax, other) = plt.subplots(1, 2)
    for row, column in itertools.product(*FIGURES[name].grid(data)):
        ax.clear()
        assert FIGURES[name].plot(data, ax=ax, **row, **column) is ax
        assert ax.has_data() or ax.texts
        assert ax.get_ylabel() or ax.get_title() or ax.get_xlabel()
    assert not other.has_data()
    pd.testing.assert_frame_equal(data, copy)
    assert dict(mpl.rcParams) == style
    assert (np.random.get_state()[1] == rng).all()


def test_current_axes_is_the_default() -> None:
    assert plot_training_curves(history()) is plt.gca()


# one of each kind: map with color bar, rasterized points, curves in panels, images, a table with its text files
@pytest.mark.parametrize(
    "name", ["method", "granularity_maps", "channel_scales", "training_curves", "synthetic_images", "results_table"]
)
def test_redraw_gives_the_same_bytes(name: str, frames: dict[str, pd.DataFrame], tmp_path) -> None:
    frames[name].to_csv(tmp_path / f"{name}.csv", index=False, float_format="%.6g")
    seen = []
    for _ in range(2):
        redraw_figures([name], tmp_path)
        seen.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert seen[0] == seen[1]
    assert {f"{name}.svg", f"{name}.png"} <= seen[0].keys()


def test_artists_hold_the_values(frames: dict[str, pd.DataFrame]) -> None:
    data = frames["layer_error"]
    lines = plot_layer_error(data, mode="local").lines
    whole = data[data.channel.isna() & (data["mode"] == "local")]
    assert len(lines) == 2
    for line, scheme in zip(lines, ("granq", "strict"), strict=True):
        expected = np.minimum(whole[whole.scheme == scheme].sqnr_db, SQNR_CEILING)
        np.testing.assert_allclose(line.get_ydata(), expected)
    plt.figure()
    image = plot_granularity_maps(frames["granularity_maps"], granularity="per_sample_channel").images[0]
    assert image.get_array().shape == (4, 4)
    plt.figure()
    drawn = frames["synthetic_images"]  # without epochs, as the demo and the explorers draw it
    words = [t.get_text() for t in plot_synthetic_images(drawn[drawn.epoch == 1].drop(columns="epoch")).texts]
    assert words == [f"{c:.0%}" for c in drawn.confidence[drawn.epoch == 1]]
    plt.figure()
    ax = plot_accuracy_bits(accuracy())
    points = np.concatenate([c.get_offsets()[:, 1] for c in ax.collections if len(c.get_offsets())])
    assert {75.1, 72.8} <= set(points), "published results are missing"
    assert set(accuracy().ptq_top1.dropna()) <= set(points), "a seed is missing"


def test_latency_factorial_and_true_bits() -> None:
    """The plots of the other rooms' frames, in the columns that their docstrings name."""
    time = dict(median_ms=2.0, q25_ms=1.5, q75_ms=4.0)
    latency = pd.DataFrame([dict(method=m, shape="(2, 3, 4, 4)") | time for m in ("per_sample_channel", "copy")])
    ax = plot_quantizer_latency(latency)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2×3×4×4"]
    bars = [c.lines[2][0].get_segments()[0][:, 1].tolist() for c in ax.containers]
    assert bars == [[1.5, 4.0], [1.5, 4.0]]
    plt.figure()
    grid = [dict(execution=e, channels=c, batch=4, scale_multiplications=c) | time for e in "ab" for c in (8, 16)]
    ax = plot_scaling_latency(pd.DataFrame(grid), quantity="scale_multiplications")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[8, 16], [8, 16]]
    plt.figure()
    names = itertools.product(("full", "per_kernel"), ("full", "per_tensor"), (0, 1))
    cells = [dict(weights=w, activations=a, ranges="dynamic", bits=3, seed=k, top1=50.0 + 2 * k) for w, a, k in names]
    ax = plot_granularity_factorial(pd.DataFrame(cells))
    assert [text.get_text() for text in ax.texts] == ["51.0"] * 4, "seeds are averaged"
    assert ax.collections[0].get_array().tolist() == [[1, 1], [1, 1]], "below the best seed"
    plt.figure()
    bits = [dict(network=n, scheme="granq", weight_bits=3, true_bits_per_weight=9.0, weights_low_bit=2.0) for n in "ab"]
    ax = plot_true_bits(pd.DataFrame(bits))
    assert ax.collections[0].get_offsets().tolist() == [[9.0, 0.0], [9.0, 1.0]]


def test_results_table_values() -> None:
    table = results_table(accuracy()).set_index(["bits", "method"])
    row = table.loc["W3A3", "granq"]
    assert (row.top1, row.n, row.kind) == (87.0 - 0.5 + 0.5, 2, "measured")
    assert row["std"] == pytest.approx(2**0.5)
    assert row["drop"] == pytest.approx(90 - row.top1)
    assert row.half_width == pytest.approx(100 * 1.96 * (0.87 * 0.13 / 400) ** 0.5)
    assert table.loc["W3A3", "GDFQ"]["drop"] == pytest.approx(18.8)
    assert np.isnan(table.loc["W3A3", "AKT_x"]["drop"])


def test_accuracies_from_two_teachers_are_not_averaged() -> None:
    rows = accuracy()
    rows.loc[rows.seed == 1, "teacher_top1"] -= 5
    with pytest.raises(UserError, match="runs of one network have different teachers"):
        results_table(rows)
    rows = accuracy().assign(method=lambda data: data.scheme + data.seed.astype(str))
    with pytest.raises(UserError, match="several runs have the same"):
        results_table(rows)


def test_the_table_is_written_as_text(tmp_path: Path) -> None:
    table = results_table(accuracy())
    table.to_csv(tmp_path / "results_table.csv", index=False)
    redraw_figures(["results_table"], tmp_path)
    markdown, latex = ((tmp_path / f"results_table.{end}").read_text() for end in ("md", "tex"))
    assert len(markdown.splitlines()) == len(table) + 2 and "nan" not in markdown + latex
    assert r"AKT\_x" in latex and r"AKT \& co" in latex
    assert latex.count(r"\\") == len(table) + 1


# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color: str, deficiency: str) -> np.ndarray:
    """CIELAB (D65) of a color as it is seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


SCHEMES = ("full precision", "layerwise", "per_channel", "granq", "strict", "foldable")


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colors_differ_for_every_eye(deficiency: str) -> None:
    distances = {
        (a, b): float(np.linalg.norm(lab(ROLES[a].color, deficiency) - lab(ROLES[b].color, deficiency)))
        for a, b in itertools.combinations(SCHEMES, 2)
    }
    assert min(distances.values()) > 12, min(distances, key=lambda k: distances[k])


def test_no_meaning_hangs_on_color_alone() -> None:
    """In grey print some lightnesses are close: every role of one figure has a marker and a dash of its own."""
    for group in (SCHEMES, ("synthetic", "real")):
        looks = [ROLES[name] for name in group]
        assert len({look.marker for look in looks}) == len({str(look.dash) for look in looks}) == len(looks)
        lightness = {name: lab(ROLES[name].color, "none")[0] for name in group}
        assert all(10 < value < 80 for value in lightness.values()), "invisible on paper, or black"
    assert abs(lightness["synthetic"] - lightness["real"]) > 40


def test_bad_input_is_refused_before_anything_is_written(frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    frames["training_curves"].to_csv(tmp_path / "training_curves.csv", index=False)
    assert redraw_figures([], tmp_path) == ["training_curves"]
    frames["training_curves"].drop(columns="budget").to_csv(tmp_path / "quantizer_latency.csv")
    before = sorted(p.name for p in tmp_path.iterdir())
    full, other = (Workbench(budget, data="cifar10", device="cpu", out=tmp_path) for budget in ("full", "quick"))
    for call, sentence in (
        (lambda: make_figures(["nonsense"], full), "unknown figure 'nonsense'; known: method"),
        (lambda: redraw_figures(["layer_error"], tmp_path), "layer_error.csv does not exist"),
        (lambda: redraw_figures([], tmp_path / "nowhere"), "holds no CSV of a figure"),
        (lambda: make_figures(["training_curves"], full), "of another budget"),
        (lambda: make_figures(["training_curves"], other), "another budget, data"),
        (lambda: make_figures(["quantizer_latency"], full), "another budget, data, network or command"),
        (lambda: make_figures(["accuracy_bits"], full), "results_cifar10.csv is missing"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_figures_are_measured_with_their_provenance(tiny: nn.Module, tmp_path: Path, monkeypatch) -> None:
    """One figure from nothing: provenance in the CSV, and a redraw from it that changes nothing."""
    monkeypatch.setattr(Workbench, "_loaded", (tiny, SPEC))
    monkeypatch.setattr(Workbench, "top1", 12.5)
    monkeypatch.setattr(Workbench, "test", [(torch.zeros(3, 8, 8, dtype=torch.uint8) + i, 0) for i in range(40)])
    assert make_figures(["granularity_maps"], Workbench(device="cpu", out=tmp_path)) == ["granularity_maps"]
    data = pd.read_csv(tmp_path / "granularity_maps.csv")
    said = {"dataset", "network", "teacher_test_top1", "budget", "seed", "commit", "torch", "device"}
    assert said <= set(data.columns)
    before = (tmp_path / "granularity_maps.svg").read_bytes()
    redraw_figures(["granularity_maps"], tmp_path)
    assert (tmp_path / "granularity_maps.svg").read_bytes() == before
    another = Workbench(device="cpu", out=tmp_path, network="resnet18")
    with pytest.raises(UserError, match="of another budget, data, network"):
        make_figures(["granularity_maps"], another)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("features.stage2.unit1.body.conv1.conv", "s2.u1.conv1"),
        ("features.stage2.unit1.identity_conv.conv", "s2.u1.skip"),
        ("layer3.0.downsample.0", "l3.0.skip"),
        ("output", "output"),
    ],
)
def test_short_layer_names(name: str, short: str) -> None:
    assert short_layer(name) == short


def test_a_run_that_differs_in_more_than_its_scheme_is_a_method_of_its_own():
    row = {"scheme": "foldable", "recipe": "adadfq", "epochs": 2, "iterations": 60, "warmup_epochs": 0}
    blank = float("nan")  # a table that has no such column
    name = method_name
    assert name(row) == name(row | {"bf16": blank, "image_bits": blank}) == "foldable"
    assert name(row | {"recipe": "gdfq"}) == "foldable + gdfq"
    assert name(row | {"bf16": True}) == "foldable"
    match = row | {"recipe": "match", "bf16": True}
    assert name(match | {"image_bits": 6.0}) == "foldable + match, 120 steps + image 6 bits"
    assert name(match) == "foldable + match, 120 steps"
    assert name(match | {"warmup_epochs": 1}) == "foldable + match, 60 steps"
    assert name(row | {"warmup_epochs": 2, "recipe": "gdfq"}) == "foldable + untrained"
    paper = row | {"preset": "paper", "epochs": 200}
    assert name(paper) == "foldable + paper, 200 epochs"
    assert name(paper | {"recipe": "gdfq"}) == "foldable + gdfq + paper, 200 epochs"
    assert name(match | {"warmup_epochs": 2}) == "foldable + match, untrained"  # its BatchNorm is corrected
    assert name(match | {"generator_epochs": 1}) == name(match)  # it stops after the warm-up in any case


def test_what_another_command_measured_is_left_as_it_is(tmp_path, monkeypatch) -> None:
    """``make_figures`` without names measures what it can, and not again what ``granq bench`` took half an hour for."""
    kept, made, shipped = "quantizer_latency", "true_bits", Path(__file__).parents[1] / "figures"
    joined = "paper_run"
    frame = pd.read_csv(shipped / f"{made}.csv").assign(budget="quick")
    figure = FIGURES[made]._replace(measure=lambda workbench: frame)
    monkeypatch.setattr(registry, "FIGURES", {kept: FIGURES[kept], joined: FIGURES[joined], made: figure})
    frame.to_csv(tmp_path / f"{made}.csv", index=False)
    pd.read_csv(shipped / f"{kept}.csv").to_csv(tmp_path / f"{kept}.csv", index=False)
    own = dict(budget="quick", dataset="digits")
    pd.DataFrame({"run": ["a", "b"], **own}).to_csv(tmp_path / f"{joined}.csv", index=False)
    with pytest.raises(UserError, match="of several runs"):
        make_figures([joined], Workbench(device="cpu", out=tmp_path))
    before = [(tmp_path / f"{name}.csv").read_bytes() for name in (kept, joined)]
    assert make_figures([], Workbench(device="cpu", out=tmp_path)) == [made]
    assert [(tmp_path / f"{name}.csv").read_bytes() for name in (kept, joined)] == before


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged() -> None:
    mixed = pd.concat([accuracy(), accuracy().assign(last_top1=10.0)[:2]], ignore_index=True)
    for draw in (results_table, plot_accuracy_bits):
        with pytest.raises(UserError, match="say in scheme what else tells them apart"):
            draw(mixed)
    other = accuracy()[:1].assign(network="resnet18")
    with pytest.raises(UserError, match="one dataset and network"):
        plot_accuracy_bits(pd.concat([accuracy(), other], ignore_index=True))
    assert len(results_table(pd.concat([accuracy(), other], ignore_index=True))) == len(accuracy()) / 2 + 2
    with pytest.raises(UserError, match="needs measured rows"):
        plot_accuracy_bits(accuracy().dropna(subset="source"))


def test_training_curves_are_one_line_a_run() -> None:
    runs = [history()[:3].drop(columns="seed").assign(bits=b, scheme=s) for s in ("granq", "layerwise") for b in "ab"]
    ax = plot_training_curves(pd.concat(runs, ignore_index=True))
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2, 3]] * 4
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["granq, a", "granq, b", "layerwise, a", "layerwise, b"]
    dashes = [line.get_linestyle() for line in ax.lines]
    assert dashes[0] != dashes[1] and dashes[2] != dashes[3]
    with pytest.raises(ValueError, match="duplicate entries"):
        plot_training_curves(history().drop(columns="seed"))
    twice = [history()[:3].assign(run=run) for run in ("whole", "frozen")]
    ax = plot_training_curves(pd.concat(twice, ignore_index=True), ax=plt.figure().gca())
    assert [line.get_label() for line in ax.lines] == ["granq, whole", "granq, frozen"]
    recipes = [history()[:3].assign(recipe=name) for name in ("match", "adadfq", None)]  # of an older history
    lines = plot_training_curves(pd.concat(recipes), ax=plt.figure().gca()).lines
    assert len(lines) == len({line.get_color() for line in lines}) == 3  # of one scheme: told apart by color, too
    for data, seen in ((history(), ["seed 0", "seed 1"] * 2), (history().assign(test_top1=np.nan), [])):
        ax = plot_training_curves(data.assign(teacher_test_top1=90.0), ax=plt.figure().gca())
        assert [text.get_text() for text in ax.texts] == seen and ax.lines[-1].get_label() == "teacher"
    change = plot_training_curves(history(), quantity="student_loss", ax=plt.figure().gca()).lines
    assert change[0].get_xydata().tolist() == [[2, 0], [3, -1]]  # since the first trained epoch


def test_networks_are_not_averaged_and_names_of_users_can_be_told_apart(tiny: nn.Module) -> None:
    cells = dict(weights="full", activations="full", ranges="none", bits=3)
    two = pd.DataFrame([cells | dict(network=name, top1=top1) for name, top1 in (("a", 90.0), ("b", 50.0))])
    assert plot_granularity_factorial(two, ax=plt.figure().gca()).texts[0].get_text() == "90.0"
    own = {name: quantize_model(tiny, "strict", 3, 3) for name in ("mine", "theirs")}
    ax = plot_layer_error(measure_layer_error(tiny, batches(), own), ax=plt.figure().gca())
    assert ax.get_title() == "accumulated: quantized input" and len({line.get_linestyle() for line in ax.lines}) == 2
    audits = pd.DataFrame(dict(network="a", scheme="strict", weight_bits=3, act_bits=8, true_bits_per_activation=[9]))
    ax = plot_true_bits(audits, quantity="true_bits_per_activation", ax=plt.figure().gca())
    assert ax.lines[0].get_xdata()[0] == 8


def test_pictures_stand_under_their_label(tiny: nn.Module) -> None:
    drawn = measure_generated_images(Generator(3, 8), tiny, SPEC, 1)
    later = pd.concat([drawn.assign(epoch=1), drawn[drawn.label > 0].assign(epoch=2)], ignore_index=True)
    ax = plot_synthetic_images(later, ax=plt.figure().gca())
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [image.get_extent()[0] for image in ax.images] == [-0.47, 0.53, 1.53, 0.53, 1.53]


def test_one_panel_shows_one_layer_granularity_and_width(tiny: nn.Module) -> None:
    maps = measure_scale_maps(tiny, batches()[0], ["conv1", "conv2"], 3)
    assert plot_granularity_maps(maps, layer="conv2").images[0].get_array().shape == (4, 4)
    assert plot_granularity_maps(maps, ax=plt.figure().gca()).images[0].get_array().shape == (4, 3)
    dead = maps[maps.layer == "conv2"].copy()
    dead.loc[dead.channel == 1, "scale"] = 1e-9
    grid = plot_granularity_maps(dead, ax=plt.figure().gca()).images[0].get_array()
    assert grid.mask[:, 1].all() and not grid.mask[:, [0, 2, 3]].any()
    scales = [measure_channel_scales(tiny, batches(), g) for g in ("per_tensor", "per_sample_channel")]
    plt.figure()
    ax = plot_channel_scales(pd.concat(scales, ignore_index=True))
    assert sum(len(dots.get_offsets()) for dots in ax.collections if len(dots.get_offsets()) > 1) == 3 + 4 + 4 + 4
    assert ax.get_title().startswith("one scale per tensor")


def test_what_no_number_can_show_is_left_out_and_nothing_else() -> None:
    gap = pd.DataFrame(dict(layer="a", pair="b", ks_distance=[0.1, 0.9], mean_real=0.0, mean_synthetic=0.0,
                            variance_real=1.0, variance_synthetic=[1.0, 0.0]))  # fmt: skip
    plot_synthetic_gap(gap.drop(columns="pair"), ax=plt.figure().gca())  # as it was measured
    shown = {q: plot_synthetic_gap(gap, quantity=q, ax=plt.figure().gca()) for q in GAP_LABELS}
    points = {q: np.ma.masked_invalid(ax.collections[0].get_offsets())[:, 1].count() for q, ax in shown.items()}
    assert points == {"ks_distance": 2, "mean": 2, "variance": 1}
    folded = pd.DataFrame(
        dict(execution="folded", channels=[8, 16], batch=4, q25_ms=1, q75_ms=2, scale_multiplications=0)
    )
    ax = plot_scaling_latency(folded, quantity="scale_multiplications", ax=plt.figure().gca())
    assert ax.lines[0].get_ydata().tolist() == [0, 0]
    full = pd.DataFrame([dict(weights="full", activations="full", ranges="none", bits=3, top1=90.0)])
    assert plot_granularity_factorial(full, ax=plt.figure().gca()).texts[0].get_text() == "90.0"


def test_many_labels_show_the_first_ten() -> None:
    pixels = "00" * 3 * 16
    frame = pd.DataFrame([dict(label=k, sample=0, pixels=pixels, size=4, confidence=0.5) for k in range(30)])
    ax = plot_synthetic_images(frame)
    assert len(ax.get_xticks()) == 10


def test_panels_without_rows_stay_empty(frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    cells = [dict(weights=w, activations="per_tensor", ranges=r, bits=b, seed=0, top1=50.0)
             for w in ("full", "per_kernel") for b, r in ((2, "dynamic"), (3, "dynamic"), (3, "static"))]  # fmt: skip
    pd.DataFrame(cells).assign(**FACTS).to_csv(tmp_path / "granularity_factorial.csv", index=False)
    black = frames["synthetic_images"].assign(pixels="00" * 3 * 64)
    black.to_csv(tmp_path / "synthetic_images.csv", index=False)
    assert redraw_figures([], tmp_path) == ["granularity_factorial", "synthetic_images"]
    (tmp_path / "layer_error.csv").write_text("layer,scheme,mode\n")
    with pytest.raises(ValueError, match=r"layer_error\.csv has no rows"):
        redraw_figures(["layer_error"], tmp_path)


def test_a_factorial_is_drawn_as_it_is_measured(tiny: nn.Module, tmp_path: Path) -> None:
    labels = torch.zeros(len(batches()[0]), dtype=torch.long)
    measured = measure_granularity_factorial(
        tiny, [(batches()[0], labels)], factorial_cells((2, 3))[::5], lambda seed: batches()
    )
    measured.to_csv(tmp_path / "granularity_factorial.csv", index=False)
    assert redraw_figures(["granularity_factorial"], tmp_path) == ["granularity_factorial"]
    assert FIGURES["granularity_factorial"].grid(measured)[1] == [{"bits": 2}, {"bits": 3}]


def numbered() -> nn.Module:
    """Layers "0", "2" and "4", as those of every ``nn.Sequential`` are called."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()


def test_layers_that_are_called_by_numbers(tmp_path):
    frames = {
        "layer_error": measure_layer_error(numbered(), batches(), ["granq"], 3),
        "channel_scales": measure_channel_scales(numbered(), batches()),
        "granularity_maps": measure_scale_maps(numbered(), batches()[0], ["0", "2"], 3),
    }
    for name, frame in frames.items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        assert redraw_figures([name], tmp_path) == [name]
    read = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in frames}  # as a reader would: numbers
    assert read["layer_error"].layer.dtype.kind == "i"
    for ax in (
        plot_layer_error(read["layer_error"]),
        plot_channel_scales(read["channel_scales"], ax=plt.figure().gca()),
    ):
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "4"]
    assert short_layer(0) == "0"
    maps = plot_granularity_maps(read["granularity_maps"], layer="2", ax=plt.figure().gca())
    wanted = frames["granularity_maps"].query("layer == '2' and granularity == 'per_sample_channel'").scale
    assert np.allclose(np.sort(maps.images[0].get_array(), None), np.sort(wanted))


def test_a_legend_takes_as_many_lines_as_it_needs(tmp_path, monkeypatch) -> None:
    """Names of runs belong to users; what does not even fit alone is cut off."""
    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    for letters in (1, 20, 400):
        runs = [history().assign(run=f"{k}" * letters, bits="W3A3", generator="goes on") for k in range(4)]
        pd.concat(runs).to_csv(tmp_path / "paper_run.csv", index=False)
        redraw_figures(["paper_run"], str(tmp_path))
    legends = [legend for figure in seen[::2] for legend in figure.legends]
    assert [legend.get_window_extent().width < seen[0].bbox.width for legend in legends] == [True, True, False]
    assert legends[0]._ncols > legends[1]._ncols > legends[2]._ncols == 1


def test_texts_of_a_csv_stay_texts(tmp_path, monkeypatch):
    """Layer "1.10" is not "1.1", class "007" not 7, and class "null" not missing."""
    seen = []
    monkeypatch.setitem(FIGURES, "layer_error", FIGURES["layer_error"]._replace(
        plot=lambda data, **_: seen.append(data), rows={}, columns={}))  # fmt: skip
    pd.DataFrame({"layer": ["1.10", "1.1"], "name": ["007", "null"]}).to_csv(tmp_path / "layer_error.csv", index=False)
    redraw_figures(["layer_error"], tmp_path)
    assert seen[0].layer.tolist() == ["1.10", "1.1"] and seen[0].name.tolist() == ["007", "null"]
