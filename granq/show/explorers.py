"""Explorers for notebooks: a frame goes in, a widget comes out whose controls choose what of it is drawn.

No control runs a network. Tab and the arrow keys reach all controls.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from granq.errors import UserError
from granq.runs import RunFolder
from granq.show import layers, results
from granq.show.style import STYLE, select, short_layer


def distortion_microscope(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_channel_histograms``: one channel of one image, synthetic next to real; rank 0 is narrowest."""
    plots = [partial(layers.plot_channel_histogram, source=source, legend=False) for source in data.source.unique()]
    numbers = ["source", "channel", "sqnr_db", "step", "levels_in_use", "bits"]
    return _explorer(lambda: data, data[["layer", "rank", "image", "bits", "granularity"]], plots, numbers)


def scale_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_scale_maps``: the steps of a layer, and the widest channels of one image."""
    widest = data.sort_values("scale", ascending=False)
    plots = [lambda _, image, **panel: layers.plot_granularity_maps(data, **panel)]
    return _explorer(lambda: widest, data[["layer", "granularity", "image"]], plots, ["image", "channel", "scale"])


def layer_error_explorer(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_layer_error``, rows of layers and of channels in one frame: all layers, and one inside."""

    def plot_layers(_: pd.DataFrame, layer: str, **panel: Any) -> None:
        layers.plot_layer_error(data, legend=False, **panel)

    choices = {"metric": layers.METRIC_LABELS, "mode": data["mode"], "layer": data.layer[data.channel.notna()]}
    plots: list[Callable[..., Any]] = [plot_layers, layers.plot_channel_error]
    return _explorer(lambda: data.sort_values("sqnr_db"), choices, plots, ["layer", "scheme", "channel"])


def speed_lab(data: pd.DataFrame) -> widgets.VBox:
    """Explore ``measure_latency_scaling``: time, memory and multiplications over channels or batch."""
    choices = {"quantity": results.SCALING_LABELS, "against": ("channels", "batch")}
    return _explorer(lambda: data, choices, [results.plot_scaling_latency], ["execution", "channels", "batch"])


def training_monitor(run: str | Path) -> widgets.VBox:
    """Watch the folder of a run, which need not exist yet, while another process writes it; play rereads it."""

    def read() -> pd.DataFrame:
        if not RunFolder(run).history.is_file():
            raise UserError("no epoch is finished yet")
        return pd.read_csv(RunFolder(run).history)[::-1]  # replaced atomically: never half a file

    def curves(history: pd.DataFrame, reread: int, **panel: Any) -> None:
        results.plot_training_curves(history, legend=False, **panel)

    play = widgets.Play(interval=2000, max=100_000)
    return _explorer(read, {"quantity": results.TRAINING_LABELS}, [curves], ["epoch"], reread=play)


def _explorer(
    read: Callable[[], pd.DataFrame], choices: Mapping[str, Any] | pd.DataFrame, plots: Sequence[Callable[..., Any]],
    numbers: Sequence[str], **controls: widgets.Widget,
) -> widgets.VBox:  # fmt: skip
    """Put controls above what ``plots`` draw with their values, and below it the columns ``numbers`` of those rows."""
    picture = widgets.Image(format="png", layout={"width": "700px", "height": "300px"})
    below = widgets.HTML(layout={"height": "200px", "overflow": "auto"})
    for name, values in choices.items():
        options = [(short_layer(str(value)), value) for value in dict.fromkeys(values)]
        kind = widgets.SelectionSlider if len(options) > 2 else widgets.Dropdown
        controls[str(name)] = kind(options=options, description=name)
        controls[str(name)].continuous_update = False  # a slider draws when it is let go

    def update(**values: Any) -> None:
        figure, buffer = Figure(figsize=(7, 3), layout="constrained"), BytesIO()
        with plt.style.context(STYLE):
            try:
                data = read()
                for ax, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
                    plot(data, ax=ax, **values)
                rows = select(data, **{name: value for name, value in values.items() if name in data})
                table = rows[[*numbers, *(value for value in values.values() if value in data)]].drop_duplicates()
            except UserError as error:
                table = pd.DataFrame({"nothing to show": [str(error)]})
            figure.savefig(buffer, dpi=100)
        picture.value = buffer.getvalue()
        below.value = table.head(6).to_html(index=False, border=0, na_rep="all", float_format="{:.4g}".format)

    errors = widgets.interactive_output(update, controls)  # shows what a callback raises
    box = widgets.HBox([*controls.values()], layout={"flex_flow": "row wrap"})
    return widgets.VBox([box, picture, below, errors])
