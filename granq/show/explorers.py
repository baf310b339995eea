"""Explorers for notebooks: each takes a frame and returns a widget whose controls choose what of it is drawn.

No control runs a network; only the monitor draws images when an epoch arrives. All controls are core ipywidgets, so
Tab, the arrow keys and the mouse reach them.
"""

from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from granq.data import DataSpec
from granq.errors import UserError
from granq.measure.images import measure_generated_images
from granq.measure.running import ACTIVATION_GRANULARITIES, DEAD
from granq.runs import RunFolder, load_generator
from granq.show.distortion import plot_channel_histogram
from granq.show.layer_error import METRIC_LABELS, plot_channel_error, plot_layer_error
from granq.show.scales import live
from granq.show.style import STYLE, granularity_role, plain_log, role, select, short_layer
from granq.show.training import TRAINING_LABELS, plot_synthetic_images, plot_training_curves

_LABELS = {"local": "clean (local)", "accumulated": "quantized (accumulated)"}
_LABELS |= {name: granularity_role(name).label for name in ACTIVATION_GRANULARITIES}
_CONTROLS = {"rank": "channel, narrow to wide", "granularity": "one scale", "worst": "layer, 1 = worst",
             "mode": "input", "quantity": "curve"}  # fmt: skip
_LABELS |= METRIC_LABELS | {name: label.replace("\n", " ") for name, label in TRAINING_LABELS.items()}


def distortion_microscope(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_channel_histograms``: one channel of one image, synthetic next to real, levels as ticks."""

    def draw(figure: Figure, **panel: Any) -> pd.DataFrame:
        sources = [part for _, part in select(data, **panel).groupby("source", sort=False)]
        for ax, part in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
            plot_channel_histogram(part, legend=part is sources[-1], ax=ax)
        rows = pd.concat([part.head(1) for part in sources])
        return rows[["source", "channel", "sqnr_db", "step", "levels_in_use", "bits"]]

    return _explorer("distortion microscope", draw, data[["layer", "rank", "image", "bits", "granularity"]])


def scale_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_scale_maps``: the steps of a layer's channels, of one image among all, the widest named."""
    constant = data.groupby(["layer", "channel", "granularity"]).scale.max() <= DEAD
    dead = constant.groupby(["layer", "channel"]).any().groupby("layer").sum()  # per_tensor alone does not tell

    def draw(figure: Figure, layer: str, granularity: str, image: int) -> pd.DataFrame:
        every, look = live(select(data, layer=layer, granularity=granularity)), granularity_role(granularity)
        shown, ax = every[every.image == image], figure.subplots()
        ax.scatter(every.channel, every.scale, s=6, color="#c9c9cd", label="all images")
        ax.scatter(shown.channel, shown.scale, s=9, color=look.color, marker=look.marker, label=f"image {image}")
        ax.set(yscale="log", xlabel="channel", ylabel="step (units of the activation)", title=short_layer(layer))
        plain_log(ax.yaxis)
        ax.legend(ncols=2)
        widest = ", ".join(f"{row.channel} ({row.scale:.3g})" for row in shown.nlargest(5, "scale").itertuples())
        values = {"different scales": shown.scale.nunique(), "median step": shown.scale.median()}
        return pd.DataFrame([values | {"widest channels": widest, "dead channels": dead[layer]}])

    return _explorer("scale explorer", draw, data[["layer", "granularity", "image"]])


def layer_error_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_layer_error``, rows of layers and of channels in one frame: the layers from the worst."""
    inside = data[data.channel.notna()]

    def draw(figure: Figure, metric: str, mode: str, worst: int) -> pd.DataFrame:
        rows, upwards = select(inside, mode=mode), metric != "mse"  # a large error is bad, a large ratio good
        layer = rows.groupby("layer")[metric].mean().sort_values(ascending=upwards).index[worst - 1]
        left, right = figure.subplots(1, 2)
        plot_layer_error(data, metric=metric, mode=mode, legend=False, ax=left)
        left.axvline(list(data.layer.unique()).index(layer), color="black", linewidth=0.6)
        plot_channel_error(data, metric=metric, mode=mode, layer=layer, ax=right)
        channels = select(rows, layer=layer).sort_values(metric, ascending=upwards)
        return channels[["layer", "scheme", "channel", metric]].head(5)

    choices = {"metric": METRIC_LABELS, "mode": data["mode"], "worst": range(1, inside.layer.nunique() + 1)}
    return _explorer("layer error explorer", draw, choices, height=3.2)


def speed_lab(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_latency_quantizer`` or ``..._scaling``: times and counts, next to a copy of the same bytes."""
    if "execution" in data:
        data = data.assign(size=[f"{c} channels, {n} images" for c, n in zip(data.channels, data.batch, strict=True)])
    else:
        data = data.assign(execution=data.method, size=data["shape"])

    def draw(figure: Figure, size: str, execution: str) -> pd.DataFrame:
        rows, ax = select(data, size=size).set_index("execution", drop=False), figure.subplots()
        bars = rows.drop("copy", errors="ignore")
        spread = [bars.median_ms - bars.q25_ms, bars.q75_ms - bars.median_ms]
        colors = [role("granq").color if name == execution else "#c9c9cd" for name in bars.index]
        ax.barh(bars.index, bars.median_ms, color=colors, xerr=spread, capsize=3)
        for floor in rows.median_ms[rows.index == "copy"]:
            ax.axvline(floor, color="black", linestyle=":")
            ax.set_title("dotted: a copy of the same bytes")
        ax.set(xscale="log", xlabel="time (ms), median and quartiles")
        plain_log(ax.xaxis)
        return select(rows, execution=execution).drop(columns=["torch", "device", "method", "size"], errors="ignore")

    return _explorer("speed lab", draw, {"size": data["size"], "execution": data.execution[data.execution != "copy"]})


def training_monitor(
    run: str | Path, teacher: nn.Module | None = None, spec: DataSpec | None = None, interval: float = 2.0
) -> widgets.VBox:
    """Watch the folder of a run while another process writes it: curves, and with a teacher and its data, images.

    Play rereads the folder, which need not exist yet, every ``interval`` seconds.
    """
    folder, drawn = RunFolder(run), dict[int, pd.DataFrame]()
    play = widgets.Play(interval=round(1000 * interval), min=0, max=100_000, tooltip="reread the run folder")

    def draw(figure: Figure, quantity: str, reread: int) -> pd.DataFrame:
        if not folder.history.is_file():
            raise UserError("no epoch is finished yet")
        history = pd.read_csv(folder.history)  # replaced atomically: never half a file
        last = int(history.epoch.max())
        if teacher is not None and spec is not None and last not in drawn:
            drawn[last] = measure_generated_images(load_generator(run).train(), teacher, spec)
        axes = figure.subplots(1, 1 + (last in drawn), squeeze=False)[0]
        plot_training_curves(history, quantity=quantity, legend=False, ax=axes[0])
        if last in drawn:
            plot_synthetic_images(drawn[last], ax=axes[1])
        return history[["epoch", "test_top1", "teacher_top1"]].tail(1)

    return _explorer("training monitor", draw, {"quantity": TRAINING_LABELS, "reread": play})


def _choose(name: str, values: Iterable[Any]) -> widgets.Widget:
    """Return a list of labeled values, or a slider, which draws when it is let go."""
    if isinstance(values, widgets.Widget):
        return values
    options = {_LABELS.get(value) or short_layer(str(value)): value for value in dict.fromkeys(values)}
    kind = widgets.Dropdown if set(options) <= set(_LABELS.values()) else widgets.SelectionSlider
    control = kind(options=[*options.items()], style={"description_width": "140px"}, layout={"width": "375px"})
    control.description, control.continuous_update = _CONTROLS.get(name, name), False
    return control


def _explorer(
    title: str, draw: Callable[..., pd.DataFrame], choices: Mapping[str, Any] | pd.DataFrame, height: float = 2.8
) -> widgets.VBox:
    """Put controls above a picture and its numbers: ``draw(figure, **values)`` draws the one and returns the other."""
    picture = widgets.Image(format="png", layout={"width": "700px", "height": f"{round(100 * height)}px"})
    numbers = widgets.HTML(layout={"height": "120px", "overflow": "auto"})

    def update(**values: Any) -> None:
        figure, buffer = Figure(figsize=(7, height), layout="constrained"), BytesIO()
        with plt.style.context(STYLE):
            try:
                table = draw(figure, **values)
            except UserError as error:
                table = pd.DataFrame({"nothing to show": [str(error)]})
            figure.savefig(buffer, dpi=100)
        picture.value = buffer.getvalue()
        numbers.value = table.to_html(index=False, border=0, float_format="{:.4g}".format)

    controls = {str(name): _choose(str(name), values) for name, values in choices.items()}
    errors = widgets.interactive_output(update, controls)  # shows what a callback raises
    box = widgets.GridBox([*controls.values()], layout={"grid_template_columns": "repeat(2, 385px)"})
    return widgets.VBox([widgets.HTML(f"<b>{title}</b>"), box, picture, numbers, errors])
