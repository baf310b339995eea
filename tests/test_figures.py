"""Every plot draws what its frame holds, into the Axes it is given; redrawing gives the same bytes; colors differ."""

import itertools
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from torch import nn

from granq import analysis, figures, registry
from granq.cli import main
from granq.data import DataSpec
from granq.generator import Generator

SPEC = DataSpec("digits", 3, 8, (0.3,) * 3, (0.4,) * 3)
FACTS = dict(preset="quick", seed=0, commit="abc", torch="2", device="cpu", dataset="digits", network="tiny",
             teacher_test_top1=97.5)  # fmt: skip


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def accuracy() -> pd.DataFrame:
    rows = [
        dict(dataset="digits", network="resnet20", scheme=s, bits=b, seed=k, teacher_top1=90.0, ptq_top1=50.0 + k + i,
             last_top1=80.0 + k + i, best_top1=81.0)
        for i, (s, b, k) in enumerate(itertools.product(("layerwise", "release"), ("W2A2", "W3A3"), (0, 1)))
    ]  # fmt: skip
    published = [dict(scheme="GDFQ", bits="W3A3", last_top1=75.1, teacher_top1=93.9, source="AdaDFQ (2023), table 2"),
                 dict(scheme="AKT_x", bits="W3A3", last_top1=72.8, source="AKT & co")]  # fmt: skip
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(published)], ignore_index=True)


def history() -> pd.DataFrame:
    rows = [
        dict(epoch=e, warmup=e < 2, generator_loss=2.0 / e, student_loss=-e, bn_loss=1 / e, teacher_top1=10.0 * e,
             test_top1=20.0 * e, scheme=s, seed=k)
        for s, k, e in itertools.product(("release", "strict"), (0, 1), (1, 2, 3))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def frames(tiny: nn.Module) -> dict[str, pd.DataFrame]:
    """A small frame for every figure, measured where that is quick."""
    error = [
        analysis.measure_layer_error(tiny, batches(), ["release", "strict"], 3, per_channel=c) for c in (False, True)
    ]
    gap = analysis.measure_synthetic_gap(tiny, batches(), batches(1))
    drawn = analysis.measure_generated_images(Generator(3, 8), tiny, SPEC)
    scales = [analysis.measure_channel_scales(tiny, batches(), source=s) for s in ("synthetic", "real")]
    made = {
        "granularity_maps": analysis.measure_scale_maps(tiny, batches()[0], "conv2", 3),
        "activation_distortion": analysis.measure_activation_distortion(tiny, batches(), ["conv2", "fc"], [3, 4]),
        "channel_scales": pd.concat(scales, ignore_index=True),
        "layer_error": pd.concat(error, ignore_index=True),
        "accuracy_bits": accuracy(),
        "training_curves": history(),
        "synthetic_images": pd.concat([drawn.assign(epoch=e) for e in (1, 2)], ignore_index=True),
        "synthetic_gap": gap.assign(pair="synthetic against real"),
        "results_table": figures.results_table(accuracy()),
    }
    return {name: f.assign(**{k: v for k, v in FACTS.items() if k not in f}) for name, f in made.items()}


MEASURED_HERE = ("granularity_maps", "activation_distortion", "channel_scales", "layer_error", "accuracy_bits",
                 "training_curves", "synthetic_images", "synthetic_gap", "results_table")  # fmt: skip


@pytest.mark.parametrize("name", MEASURED_HERE)
def test_plots_are_pure(name: str, frames: dict[str, pd.DataFrame]) -> None:
    """The Axes it was given comes back with artists and a y label; frame, style and random state stay as they were."""
    data, style, rng = frames[name], dict(mpl.rcParams), np.random.get_state()[1].copy()
    copy = data.copy(deep=True)
    figure, (ax, other) = plt.subplots(1, 2)
    for draw in itertools.chain(*(row for panels in registry.FIGURES[name].panels for row in panels.grid(data))):
        ax.clear()
        assert draw(data, ax=ax) is ax
        assert ax.has_data() or ax.texts
        assert ax.get_ylabel() or ax.get_title() or ax.get_xlabel()
    assert not other.has_data()
    pd.testing.assert_frame_equal(data, copy)
    assert dict(mpl.rcParams) == style
    assert (np.random.get_state()[1] == rng).all()


def test_current_axes_is_the_default() -> None:
    assert figures.plot_training_curves(history()) is plt.gca()


# one of each kind: map with color bar, rasterized points, curves in panels, images, a table with its text files
@pytest.mark.parametrize(
    "name", ["granularity_maps", "channel_scales", "training_curves", "synthetic_images", "results_table"]
)
def test_redraw_gives_the_same_bytes(name: str, frames: dict[str, pd.DataFrame], tmp_path) -> None:
    frames[name].to_csv(tmp_path / f"{name}.csv", index=False, float_format="%.6g")
    seen = []
    for _ in range(2):
        registry.redraw_figures([name], tmp_path)
        seen.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert seen[0] == seen[1]
    assert {f"{name}.svg", f"{name}.png", "README.md"} <= seen[0].keys()
    text = seen[0]["README.md"].decode()
    assert registry.FIGURES[name].alt in text and registry.FIGURES[name].question in text


def test_gallery_keeps_the_text_around_it(frames: dict[str, pd.DataFrame], tmp_path) -> None:
    frames["training_curves"].to_csv(tmp_path / "training_curves.csv", index=False)
    (tmp_path / "README.md").write_text("# Mine\n\nabove\n\n" + "\n".join(registry.GALLERY) + "\n\nbelow\n")
    registry.redraw_figures([], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Mine\n\nabove\n") and text.endswith("\nbelow\n")
    # not teacher_top1, which in a history is the accuracy on synthetic images
    assert "![" in text and "digits, tiny, teacher 97.50 %" in text


def test_artists_hold_the_values(frames: dict[str, pd.DataFrame]) -> None:
    data = frames["layer_error"]
    lines = figures.plot_layer_error(data, mode="local").lines
    whole = data[data.channel.isna() & (data["mode"] == "local")]
    assert len(lines) == 2
    for line, scheme in zip(lines, ("release", "strict"), strict=True):
        expected = np.minimum(whole[whole.scheme == scheme].sqnr_db, figures.SQNR_CEILING)
        np.testing.assert_allclose(line.get_ydata(), expected)
    plt.figure()
    image = figures.plot_granularity_maps(frames["granularity_maps"], granularity="per_sample_channel").images[0]
    assert image.get_array().shape == (4, 4)
    plt.figure()
    drawn = frames["synthetic_images"]  # without epochs, as the demo and the explorers draw it
    words = [t.get_text() for t in figures.plot_synthetic_images(drawn[drawn.epoch == 1].drop(columns="epoch")).texts]
    assert words == [f"{c:.0%}" for c in drawn.confidence[drawn.epoch == 1]]
    plt.figure()
    ax = figures.plot_accuracy_bits(accuracy())
    points = np.concatenate([c.get_offsets()[:, 1] for c in ax.collections if len(c.get_offsets())])
    assert {75.1, 72.8} <= set(points), "published results are missing"
    assert set(accuracy().ptq_top1.dropna()) <= set(points), "a seed is missing"


def test_latency_factorial_and_true_bits() -> None:
    """The plots of the other rooms' frames, in the columns that their docstrings name."""
    time = dict(median_ms=2.0, q25_ms=1.5, q75_ms=4.0)
    latency = pd.DataFrame([dict(method=m, shape="(2, 3, 4, 4)") | time for m in ("per_sample_channel", "copy")])
    ax = figures.plot_quantizer_latency(latency)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2×3×4×4"]
    bars = [c.lines[2][0].get_segments()[0][:, 1].tolist() for c in ax.containers]
    assert bars == [[1.5, 4.0], [1.5, 4.0]]
    plt.figure()
    grid = [dict(execution=e, channels=c, batch=4, scale_multiplications=c) | time for e in "ab" for c in (8, 16)]
    ax = figures.plot_scaling_latency(pd.DataFrame(grid), quantity="scale_multiplications")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[8, 16], [8, 16]]
    plt.figure()
    names = itertools.product(("full", "per_kernel"), ("full", "per_tensor"), (0, 1))
    cells = [dict(weights=w, activations=a, ranges="dynamic", bits=3, seed=k, top1=50.0 + 2 * k) for w, a, k in names]
    ax = figures.plot_granularity_factorial(pd.DataFrame(cells))
    assert [text.get_text() for text in ax.texts] == ["51.0"] * 4, "seeds are averaged"
    assert ax.collections[0].get_array().tolist() == [[1, 1], [1, 1]], "below the best seed"
    plt.figure()
    bits = [dict(network=n, scheme="release", weight_bits=3, bits_per_weight=9.0, quantized_percent=2.0) for n in "ab"]
    ax = figures.plot_true_bits(pd.DataFrame(bits))
    assert ax.collections[0].get_offsets().tolist() == [[9.0, 0.0], [9.0, 1.0]]


def test_results_table_values() -> None:
    table = figures.results_table(accuracy()).set_index(["bits", "method"])
    row = table.loc["W3A3", "release"]
    assert (row.top1, row.n, row.kind) == (87.0 - 0.5 + 0.5, 2, "measured")
    assert row["std"] == pytest.approx(2**0.5)
    assert row["drop"] == pytest.approx(90 - row.top1)
    assert table.loc["W3A3", "GDFQ"]["drop"] == pytest.approx(18.8)
    assert np.isnan(table.loc["W3A3", "AKT_x"]["drop"])


def test_table_text() -> None:
    table = figures.results_table(accuracy())
    markdown, latex = figures.table_text(table, "markdown"), figures.table_text(table, "latex")
    assert len(markdown.splitlines()) == len(table) + 2
    assert r"AKT\_x" in latex and r"AKT \& co" in latex
    assert latex.count(r"\\") == len(table) + 1
    with pytest.raises(ValueError, match="known: markdown, latex"):
        figures.table_text(table, "html")


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


SCHEMES = ("full precision", "layerwise", "per_channel", "release", "strict", "foldable")


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colors_differ_for_every_eye(deficiency: str) -> None:
    distances = {
        (a, b): float(np.linalg.norm(lab(figures.ROLES[a].color, deficiency) - lab(figures.ROLES[b].color, deficiency)))
        for a, b in itertools.combinations(SCHEMES, 2)
    }
    assert min(distances.values()) > 12, min(distances, key=lambda k: distances[k])


def test_no_meaning_hangs_on_color_alone() -> None:
    """In grey print some lightnesses are close: every role of one figure has a marker and a dash of its own."""
    for group in (SCHEMES, ("synthetic", "real")):
        looks = [figures.ROLES[name] for name in group]
        assert len({look.marker for look in looks}) == len({str(look.dash) for look in looks}) == len(looks)
        lightness = {name: lab(figures.ROLES[name].color, "none")[0] for name in group}
        assert all(10 < value < 80 for value in lightness.values()), "invisible on paper, or black"
    assert abs(lightness["synthetic"] - lightness["real"]) > 40


def test_command_draws_from_csv_and_refuses_bad_input(frames: dict[str, pd.DataFrame], tmp_path, capsys) -> None:
    frames["training_curves"].to_csv(tmp_path / "training_curves.csv", index=False)
    assert main(["figures", "--from-csv", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "training_curves.svg").is_file()
    frames["training_curves"].drop(columns="preset", errors="ignore").to_csv(tmp_path / "quantizer_latency.csv")
    before = sorted(p.name for p in tmp_path.iterdir())
    for wrong, sentence in (
        (["nonsense"], "unknown figure 'nonsense'; known: granularity_maps"),
        (["layer_error", "--from-csv"], "layer_error.csv does not exist"),
        (["--preset", "huge"], "unknown preset"),
        (["--teacher", "nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["--run", "nowhere"], "nowhere holds no run"),
        (["training_curves", "--preset", "cifar10"], "measured with another preset"),
        (["quantizer_latency"], "another preset, that of its own command"),
        (["accuracy_bits", "--preset", "cifar10"], "results_cifar10.csv is missing"),
    ):
        assert main(["figures", *wrong, "--out", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_synthetic_images_of_a_setting(tiny: nn.Module, tmp_path, monkeypatch) -> None:
    """Where gradients are off, too, the run is trained; the same images come every time, as many as real ones."""
    monkeypatch.setattr(registry.Setting, "_loaded", (tiny, SPEC, 12.5))
    monkeypatch.setattr(registry.Setting, "test", [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * 40)
    run = dict(epochs=1, iterations=1, warmup_epochs=0, batch_size=4)
    small = registry.Budget(16, 2, (2,), 1, run, (1,))
    monkeypatch.setitem(registry.BUDGETS, "quick", small)
    setting = registry.Setting("quick", device="cpu", out=tmp_path)
    with torch.no_grad():
        first = list(setting.synthetic(batch_size=12))
    assert [len(batch) for batch in first] == [12, 4]
    assert sum(len(batch) for batch in setting.real()) == 16
    assert all(torch.equal(a, b) for a, b in zip(first, setting.synthetic(batch_size=12), strict=True))


def test_command_measures(tiny: nn.Module, tmp_path, monkeypatch) -> None:
    """One figure from nothing: provenance in the CSV, and a redraw from it that changes nothing."""
    monkeypatch.setattr(registry.Setting, "_loaded", (tiny, registry.describe_data("digits"), 12.5))
    assert main(["figures", "granularity_maps", "--out", str(tmp_path), "--device", "cpu"]) == 0
    data = pd.read_csv(tmp_path / "granularity_maps.csv")
    assert {"dataset", "network", "teacher_test_top1", "preset", "seed", "commit", "torch", "device"} <= set(
        data.columns
    )
    before = (tmp_path / "granularity_maps.svg").read_bytes()
    registry.redraw_figures(["granularity_maps"], tmp_path)
    assert (tmp_path / "granularity_maps.svg").read_bytes() == before


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
    assert figures.short_layer(name) == short


def test_a_run_that_differs_in_more_than_its_scheme_is_a_method_of_its_own():
    row = {"scheme": "foldable", "recipe": "adadfq", "epochs": 2, "iterations": 60, "reestimate_batchnorm": False}
    blank = float("nan")  # an older row, whose table had no such column
    name = registry.method_name
    assert name(row) == name(row | {"bf16": blank, "pixel_range": blank}) == "foldable"
    assert name(row | {"reestimate_batchnorm": True, "recipe": "gdfq"}) == "foldable + gdfq + BatchNorm"
    assert name(row | {"bf16": True, "pixel_range": 1.0}) == "foldable + pixel range + bfloat16"
    layers = row | {"recipe": "layers", "reestimate_batchnorm": True, "bf16": True}
    assert name(layers | {"image_bits": 6.0, "pixel_range": 1.0}) == "foldable + layers, 120 steps + image 6 bits"
    assert name(layers) == name(layers | {"random_shapes": True}) == "foldable + layers, 120 steps"
    assert name(layers | {"random_shapes": False}) == "foldable + layers, 120 steps + no random shapes"


def test_what_another_command_measured_is_left_as_it_is(tmp_path, monkeypatch) -> None:
    """``make_figures`` without names measures what it can, and not again what ``granq bench`` took half an hour for."""
    kept, made, shipped = "quantizer_latency", "true_bits", Path(__file__).parents[1] / "figures"
    frame = pd.read_csv(shipped / f"{made}.csv").assign(preset="quick")
    figure = replace(registry.FIGURES[made], measure=lambda setting: frame)
    monkeypatch.setattr(registry, "FIGURES", {kept: registry.FIGURES[kept], made: figure})
    frame.to_csv(tmp_path / f"{made}.csv", index=False)
    pd.read_csv(shipped / f"{kept}.csv").to_csv(tmp_path / f"{kept}.csv", index=False)
    before = (tmp_path / f"{kept}.csv").read_bytes()
    assert registry.make_figures([], registry.Setting("quick", device="cpu", out=tmp_path)) == [made]
    assert (tmp_path / f"{kept}.csv").read_bytes() == before


def test_a_readme_with_one_mark_is_not_written(tmp_path) -> None:
    text = f"# Mine\n\n{registry.GALLERY[0]}\n\nwhat I wrote below\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="nothing tells what to keep"):
        registry.write_gallery(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged() -> None:
    mixed = pd.concat([accuracy(), accuracy().assign(last_top1=10.0)[:2]], ignore_index=True)
    for draw in (figures.results_table, figures.plot_accuracy_bits):
        with pytest.raises(ValueError, match="name what else tells these runs apart"):
            draw(mixed)
    other = accuracy()[:1].assign(network="resnet18")
    with pytest.raises(ValueError, match="several datasets or networks"):
        figures.plot_accuracy_bits(pd.concat([accuracy(), other], ignore_index=True))
    assert len(figures.results_table(pd.concat([accuracy(), other], ignore_index=True))) == len(accuracy()) / 2 + 2
    with pytest.raises(ValueError, match="published results only"):
        figures.plot_accuracy_bits(accuracy().dropna(subset="source"))


def test_training_curves_are_one_line_a_run() -> None:
    runs = [history()[:3].drop(columns="seed").assign(bits=b, scheme=s) for s in ("release", "layerwise") for b in "ab"]
    ax = figures.plot_training_curves(pd.concat(runs, ignore_index=True))
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2, 3]] * 4
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["release (GranQ) a", "release (GranQ) b", "layerwise a", "layerwise b"]
    dashes = [line.get_linestyle() for line in ax.lines]
    assert dashes[0] != dashes[1] and dashes[2] != dashes[3]
    with pytest.raises(ValueError, match="several rows have the same scheme, epoch"):
        figures.plot_training_curves(history().drop(columns="seed"))


def test_one_panel_shows_one_layer_granularity_and_width(tiny: nn.Module) -> None:
    maps = analysis.measure_scale_maps(tiny, batches()[0], ["conv1", "conv2"], 3)
    assert figures.plot_granularity_maps(maps, layer="conv2").images[0].get_array().shape == (4, 4)
    assert figures.plot_granularity_maps(maps, ax=plt.figure().gca()).images[0].get_array().shape == (4, 3)
    dead = maps[maps.layer == "conv2"].copy()
    dead.loc[dead.channel == 1, "scale"] = 1e-9
    grid = figures.plot_granularity_maps(dead, ax=plt.figure().gca()).images[0].get_array()
    assert grid.mask[:, 1].all() and not grid.mask[:, [0, 2, 3]].any()
    with pytest.raises(ValueError, match="every channel is constant"):
        figures.plot_granularity_maps(dead.assign(scale=1e-9))
    scales = [analysis.measure_channel_scales(tiny, batches(), g) for g in ("per_tensor", "per_sample_channel")]
    plt.figure()
    ax = figures.plot_channel_scales(pd.concat(scales, ignore_index=True))
    assert sum(len(dots.get_offsets()) for dots in ax.collections if len(dots.get_offsets()) > 1) == 3 + 4 + 4 + 4
    assert ax.get_title(loc="left") == "one scale per tensor"


def test_what_no_number_can_show_is_left_out_and_nothing_else() -> None:
    gap = pd.DataFrame(dict(layer="a", ks_distance=[0.1, 0.9], mean_real=0.0, mean_synthetic=0.0, variance_real=1.0,
                            variance_synthetic=[1.0, 0.0]))  # fmt: skip
    shown = {q: figures.plot_synthetic_gap(gap, quantity=q, ax=plt.figure().gca()) for q in figures.GAP_LABELS}
    points = {q: len(ax.collections[0].get_offsets()) for q, ax in shown.items()}
    assert points == {"ks_distance": 2, "mean": 2, "variance": 1}
    rows = [dict(layer=n, channel=c, scheme="strict", mode="local", sqnr_db=v)
            for n, vs in dict(conv1=[11.0, 14.0], fc=[np.nan, 23.0]).items() for c, v in enumerate(vs)]  # fmt: skip
    assert figures.plot_channel_error(pd.DataFrame(rows), ax=plt.figure().gca()).get_title().startswith("conv1")
    folded = pd.DataFrame(
        dict(execution="folded", channels=[8, 16], batch=4, q25_ms=1, q75_ms=2, scale_multiplications=0)
    )
    ax = figures.plot_scaling_latency(folded, quantity="scale_multiplications", ax=plt.figure().gca())
    assert ax.lines[0].get_ydata().tolist() == [0, 0]
    full = pd.DataFrame([dict(weights="full", activations="full", ranges="none", bits=3, top1=90.0)])
    assert figures.plot_granularity_factorial(full, ax=plt.figure().gca()).texts[0].get_text() == "90.0"


def test_many_labels_show_the_first_ten() -> None:
    pixels = "00" * 3 * 16
    frame = pd.DataFrame([dict(label=k, sample=0, pixels=pixels, size=4, confidence=0.5) for k in range(30)])
    ax = figures.plot_synthetic_images(frame)
    assert len(ax.get_xticks()) == 10 and "the first 10 of 30 labels" in ax.get_xlabel()


def test_panels_without_rows_stay_empty(frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    cells = [dict(weights=w, activations="per_tensor", ranges="dynamic", bits=b, epochs=e, seed=0, top1=50.0)
             for w in ("full", "per_kernel") for b, e in ((2, 0), (3, 0), (3, 5))]  # fmt: skip
    pd.DataFrame(cells).assign(**FACTS).to_csv(tmp_path / "granularity_factorial.csv", index=False)
    black = frames["synthetic_images"].assign(pixels="00" * 3 * 64)
    black.to_csv(tmp_path / "synthetic_images.csv", index=False)
    assert registry.redraw_figures([], tmp_path) == ["granularity_factorial", "synthetic_images"]
    (tmp_path / "layer_error.csv").write_text("layer,scheme,mode\n")
    with pytest.raises(ValueError, match=r"layer_error\.csv has no rows"):
        registry.redraw_figures(["layer_error"], tmp_path)


def test_the_gallery_says_every_seed_and_device(frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    data = frames["results_table"].assign(device="cpu (one), cpu (two)", seed="0, 1, 2", commit=np.nan)
    data.to_csv(tmp_path / "results_table.csv", index=False)
    registry.redraw_figures(["results_table"], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "seed 0, 1, 2, cpu (one), cpu (two), torch 2" in text and "commit" not in text
