"""Which layer is guilty: the error of every layer under every scheme, and of the channels inside one."""

import altair as alt
import pandas as pd
from pandas import DataFrame

from granq.show.explorers.base import TEXT, WIDTH, color, finish, menu, pack
from granq.show.layers import METRIC_LABELS, SQNR_CEILING
from granq.show.style import short_layer


def layer_explorer(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_layer_error``, rows of layers and of channels in one frame: all layers, and inside one.

    A click chooses a layer, so does the list. One scheme is compared with another or with all.
    """
    layers, schemes = data.layer.unique().tolist(), data.scheme.unique().tolist()
    controls = [
        menu("metric", METRIC_LABELS, labels=list(METRIC_LABELS.values()), value="sqnr_db"),
        menu("mode", data["mode"].unique().tolist(), "errors"),
        menu("scheme", schemes, value="granq" if "granq" in schemes else schemes[0]),
        menu("pinned", ["all", *schemes], "compare with"),
        menu("order", ["depth", "rank"], "layers by", labels=["depth", "error, worst first"]),
    ]
    rows = _with_worst(data.assign(sqnr_db=data.sqnr_db.clip(upper=SQNR_CEILING)))
    names = [short_layer(name) for name in layers]
    bind = alt.binding_select(options=layers, labels=names, name="inside layer ")
    worst = rows.loc[rows.sqnr_db.idxmin(), "layer"]
    pick = alt.selection_point(name="inside", fields=["layer"], bind=bind, on="click", clear=False, value=worst)
    every = alt.Chart(rows).transform_filter("datum.mode == mode").transform_calculate(
        value="datum[metric]", bad="metric == 'mse' ? -datum.mse : datum[metric]", first="datum.scheme == scheme ? 1 : 0")  # fmt: skip
    # the rank is that within the chosen scheme, for all schemes
    own = alt.expr.if_(alt.datum.first, alt.datum.bad, None)
    placed = every.transform_calculate(own=own).transform_joinaggregate(key="max(own)", groupby=["layer"])
    placed = placed.transform_window(rank="dense_rank()", sort=[alt.SortField("key"), alt.SortField("depth")])
    placed = placed.transform_calculate(place="order == 'depth' ? datum.depth : datum.rank")
    ticks = alt.Axis(labelExpr=f"order == 'depth' ? {names}[datum.value - 1] : datum.value", labelAngle=-60, grid=False,
                     values=list(range(1, len(layers) + 1)), labelOverlap=False, labelFontSize=9)  # fmt: skip
    looks = alt.Scale(domain=schemes, range=[color(name) for name in schemes])
    colors = alt.Color("scheme:N", title=None, scale=looks, legend=alt.Legend(orient="top"))
    shapes = alt.Shape("scheme:N", title=None, scale=alt.Scale(domain=schemes))
    number = alt.Tooltip("value:Q", format=".4~g")
    x, y = alt.X("place:Q", title=None, axis=ticks, scale=alt.Scale(nice=False)), alt.Y("value:Q", title=None)
    shown = placed.transform_filter("datum.first || pinned == 'all' || datum.scheme == pinned")
    line = shown.mark_line(strokeWidth=1).encode(x, y, colors)
    dots = shown.mark_point(filled=True, size=50, opacity=1, stroke=TEXT, strokeWidth=0.5).encode(
        x, y, colors, shapes, tooltip=["layer:N", "scheme:N", number, alt.Tooltip("worst:N", title="worst channel")])  # fmt: skip
    here = placed.transform_filter(pick).mark_rule(strokeDash=[3, 3], opacity=0.5).encode(x)
    fixed = placed.mark_point(opacity=0).encode(x, y)  # the axes stay when schemes are chosen
    above = alt.layer(here, fixed, line, dots.add_params(pick)).properties(width=WIDTH, height=190)
    return finish(alt.vconcat(above, _inside(data, pick, colors, number)), "Which layer is guilty?", (
        "Error of every layer under one scheme, next to others, and below it the channels of one layer, worst first. "
        "Controls: metric, errors of a layer alone or accumulated, schemes, order, layer."), *controls)  # fmt: skip


def _with_worst(data: DataFrame) -> DataFrame:
    """Return the rows of layers, each with its depth and the name of its worst channel."""
    inside = data[data.channel.notna()].sort_values("sqnr_db").drop_duplicates(keys := ["layer", "scheme", "mode"])
    worst = inside.channel.map("{:.0f}".format) + " at " + inside.sqnr_db.map("{:.1f} dB".format)
    rows = data[data.channel.isna()].drop(columns="channel").merge(inside[keys].assign(worst=worst), how="left")
    return rows.assign(depth=pd.factorize(rows.layer)[0] + 1)


def _inside(data: DataFrame, pick: alt.Parameter, colors: alt.Color, number: alt.Tooltip) -> alt.LayerChart:
    """Return the channels of the layer that is picked, worst first, one line a scheme."""
    rows = data[data.channel.notna()].replace([float("inf")], SQNR_CEILING).dropna(subset=["sqnr_db"])
    rows = rows.assign(sqnr_db=rows.sqnr_db.clip(upper=SQNR_CEILING))[["layer", "scheme", "mode", "channel", *METRIC_LABELS]]
    for name in METRIC_LABELS:
        rows[name] = rows[name].map("{:.4g}".format).astype(float)
    packed = pack(rows, ["layer", "scheme", "mode"], ["channel", *METRIC_LABELS])
    every = alt.Chart(packed).transform_filter("datum.mode == mode").transform_filter(pick)
    every = every.transform_flatten(["channel", *METRIC_LABELS]).transform_calculate(
        value="datum[metric]", bad="metric == 'mse' ? -datum.mse : datum[metric]")  # fmt: skip
    every = every.transform_window(rank="row_number()", sort=[alt.SortField("bad")], groupby=["scheme"])
    shown = every.transform_filter("datum.scheme == scheme || pinned == 'all' || datum.scheme == pinned")
    x = alt.X("rank:Q", title="output channels of the layer, worst first", scale=alt.Scale(nice=False))
    y, hover = alt.Y("value:Q", title=None), ["layer:N", "scheme:N", "channel:Q", number]
    dots = shown.mark_point(filled=True, size=25, opacity=1).encode(x, y, colors, alt.Shape("scheme:N"), tooltip=hover)
    return alt.layer(every.mark_point(opacity=0).encode(x, y), dots).properties(width=WIDTH, height=150)
