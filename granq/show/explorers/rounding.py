"""What rounding does to activations, to numbers on a line and to all channels at once; and where scales differ."""

from itertools import product
from typing import Any

import altair as alt
import numpy as np
import torch
from pandas import DataFrame, Series

from granq.measure.running import ACTIVATION_GRANULARITIES as GRANULARITIES
from granq.measure.running import DEAD
from granq.quantizer import fake_quantize_with, qparams_from_range
from granq.show.explorers.base import RED, TEXT, WIDTH, finish, looks, menu, pack, panel, quantized, short, slider
from granq.show.style import GREY, in_words, select, short_layer

HOVER = [alt.Tooltip("x:Q", format=".4f"), alt.Tooltip("code:Q"), alt.Tooltip("value:Q", format=".4f")]


def distortion_microscope(data: DataFrame, bits: int = 3, granularity: str = "per_tensor") -> alt.VConcatChart:
    """Explore ``measure_activation_samples``: one channel of one image under every number of bits and every range.

    It begins with these ``bits``, this ``granularity``, and the narrowest channel that is not constant in any layer.
    """
    spread = data.groupby(["rank", "layer", "source", "image"]).x.agg(np.ptp).groupby("rank").min()
    live, words = spread.index[spread > DEAD], [in_words(name).label for name in GRANULARITIES]
    rows, layers = pack(data.assign(**_reach(data)), ["source", "layer", "rank", "image"], ["x"]), data.layer.unique()
    controls = [
        slider("bits", bits, 2, 8),
        menu("granularity", GRANULARITIES, "one scale", granularity, labels=words),
        menu("layer", layers, labels=[short_layer(name) for name in layers]),
        slider("rank", int(live[0]) if len(live) else 0, 0, int(data["rank"].max()), label="channel, narrowest first"),
        slider("image", 0, 0, int(data.image.max())),
        menu("source", data.source.unique(), "images"),
    ]
    shown = alt.Chart(rows).transform_filter(
        "datum.layer == layer && datum.rank == rank && datum.image == image && datum.source == source"
    )
    low, high = (f"datum[granularity + '_{end}']" for end in ("low", "high"))
    points = quantized(shown.transform_flatten(["x"]), low, high)
    tight, most = alt.Scale(nice=False, zero=False), int(rows.x.map(len).max())
    x = alt.X("x:Q", title="activation", scale=tight)
    count = alt.Y("count()", title="values (log axis)", scale=alt.Scale(type="symlog", domain=[0, most]))
    bins = points.transform_bin(["left", "right"], "x", bin=alt.Bin(maxbins=40))
    bars = bins.mark_bar(color=GREY).encode(alt.X("left:Q", title=None), count, x2="right:Q", tooltip=["count()"])
    landed = points.mark_rule(color=RED, strokeWidth=2).encode(alt.X("value:Q"), count, tooltip=[*HOVER[1:], "count()"])
    # every level there is, also those that no value reaches
    levels = quantized(shown.transform_calculate(x="0"), low, high)
    levels = levels.transform_calculate(code="sequence(-pow(2, bits - 1), pow(2, bits - 1))")
    levels = levels.transform_flatten(["code"]).transform_calculate(value="(datum.code + datum.z) / datum.s")
    levels = levels.transform_filter("datum.value >= datum.reach_low && datum.value <= datum.reach_high")
    ticks = levels.mark_tick(color=TEXT, thickness=1, height=8).encode(x="value:Q", y=alt.value(146), tooltip=HOVER[1:])
    stairs = points.mark_circle(color=RED, size=30, opacity=1).encode(x, alt.Y("value:Q", scale=tight), tooltip=HOVER)
    exact = points.mark_line(color=GREY).encode(x, alt.Y("x:Q", title="after rounding"))
    still = shown.mark_point(opacity=0, aria=False)  # the axes stay when bits change
    fixed = [still.encode(x=end, y=end) for end in ("reach_low:Q", "reach_high:Q")]
    panels = _quality(points), panel(150, bars, landed, ticks), panel(220, exact, *fixed, stairs)
    chart = alt.vconcat(*panels, spacing=8).resolve_scale(x="shared")
    told = "Histogram of one channel with the quantization levels on it; below it, values before and after rounding."
    return finish(chart, "What do few bits do to one channel?", told, *controls)


def _reach(data: DataFrame) -> dict[str, Any]:
    """Return the ends that values of a channel have before and after every rounding, so that axes do not move."""
    columns = {name: torch.from_numpy(data[name].to_numpy(copy=True)) for name in data.filter(regex="^x$|_(low|high)$")}
    values = [x := columns["x"]]
    for name, bits in product(GRANULARITIES, range(2, 9)):
        qparams = qparams_from_range(columns[f"{name}_low"], columns[f"{name}_high"], bits)
        values.append(fake_quantize_with(x, qparams, bits))
    every, keys = torch.stack(values).numpy(), [data[key] for key in ("source", "layer", "rank")]
    lowest, highest = (Series(ends, data.index).groupby(keys) for ends in (every.min(0), every.max(0)))
    return {"reach_low": lowest.transform("min"), "reach_high": highest.transform("max")}


def _quality(points: Any) -> Any:
    """Return a line of text: SQNR, levels in use and step of what is shown."""
    said = (
        "'SQNR ' + (datum.noise > 0 ? format(10 * log(datum.signal / datum.noise) / LN10, '.1f') + ' dB' : 'infinite')"
        " + ', ' + datum.used + ' of ' + pow(2, bits) + ' levels in use by ' + datum.n + ' values'"
        " + ', step ' + format(1 / datum.s, '.3~g')"
    )
    points = points.transform_calculate(noise="pow(datum.x - datum.value, 2)", signal="pow(datum.x, 2)")
    sums = dict(noise="sum(noise)", signal="sum(signal)", used="distinct(code)", s="max(s)", n="count()")
    text = points.transform_aggregate(**sums).transform_calculate(text=said).mark_text(align="left", fontSize=12)
    return text.encode(text="text:N", x=alt.value(-36), y=alt.value(6)).properties(width=WIDTH, height=12)


def quantizer_playground(data: DataFrame) -> alt.VConcatChart:
    """Explore rounding on a number line: the numbers in column ``x``, and a range, an outlier and bits to drag.

    The range reaches from minimum to maximum, and to the outlier if that lies outside.
    """
    least, most = float(np.floor(data.x.min())), float(np.ceil(data.x.max()))
    width, far = most - least, most + (most - least)
    controls = [
        slider("bits", 3, 2, 8),
        slider("minimum", least, least, least + width / 2, width / 64),
        slider("maximum", most, most - width / 2 + width / 64, most, width / 64),
        slider("outlier", most, least, far, width / 64),
        alt.param("clamped", value=True, bind=alt.binding_checkbox(name="clamp ")),
    ]
    low, high = "min(minimum, outlier)", "max(maximum, outlier)"
    points = quantized(alt.Chart(data[["x"]]), low, high, "clamped")
    points = points.transform_calculate(error="datum.value - datum.x", one="1", zero="0")
    axis = alt.Scale(domain=[least - width / 8, far], nice=False)
    x = alt.X("x:Q", title=None, scale=axis, axis=alt.Axis(labels=False, ticks=False, grid=False))
    line = points.mark_rule(color=GREY, clip=True).encode(x, x2="value:Q", y=alt.value(12), y2=alt.value(70))
    starts = points.mark_tick(color=TEXT, height=10, thickness=1).encode(x, y=alt.value(8), tooltip=HOVER)
    level = {"x": alt.X("value:Q", scale=axis), "y": alt.value(72)}
    ends = points.mark_circle(color=RED, size=40, opacity=1, clip=True).encode(**level, tooltip=HOVER)
    text = points.transform_aggregate(groupby=["code", "value"]).mark_text(dy=16)
    codes = text.encode(**level, text=alt.condition("bits < 5", "code:Q", alt.value("")))
    far_off = alt.Chart(DataFrame({"at": [0]})).transform_calculate(x="outlier")
    far_off = far_off.mark_point(shape="diamond", filled=True, size=90, color=TEXT).encode(x, y=alt.value(8))

    def curve(field: str, other: str, title: str, domain: list[float], across: alt.X = x) -> list[Any]:
        y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(domain=domain, nice=False), axis=alt.Axis(tickCount=3))
        dots = points.mark_circle(color=RED, size=25, opacity=1, clip=True).encode(across, y, tooltip=HOVER)
        return [points.mark_line(color=GREY, clip=True).encode(across, alt.Y(f"{other}:Q")), dots]

    margin, named = width / 4, x.axis(alt.Axis(tickCount=10)).title("number")
    panels = [
        panel(95, line, starts, ends, codes, far_off),
        panel(110, *curve("value", "x", "after rounding", [least - margin, most + margin])),
        panel(60, *curve("error", "zero", "error", [-margin, margin])),
        panel(60, *curve("one", "zero", "gradient", [-0.2, 1.2], named)),
    ]
    told = "Numbers joined to the levels they are rounded to; below it the values after rounding, errors, gradients."
    return finish(alt.vconcat(*panels, spacing=10), "Which numbers can a few bits tell apart?", told, *controls)


def method_figure(data: DataFrame) -> alt.HConcatChart:
    """Explore ``measure_data_flow``: rows of x, vectors of minima and maxima, s and z, rows of x_q, for any bits."""
    packed = pack(data[["channel", "pixel", "x", "low", "high"]], ["channel"], ["pixel", "x"])
    values = quantized(alt.Chart(packed).transform_flatten(["pixel", "x"]), "datum.low", "datum.high")
    ends = [float(end) for end in (data.x.min(), data.x.max())]
    tall = max(15 * len(packed), 210)  # the box holds its words
    wide = {"expr": "width ? max(width / 2 - 152, 64) : 128"}  # 304: what stands between the two grids
    across = alt.X("pixel:O", axis=None, scale=alt.Scale(range=[0, wide]))
    channel = alt.Axis(title=None, labelExpr="'channel ' + datum.value", ticks=False, domain=False)

    def grid(field: str, title: str, axis: Any = None) -> alt.Chart:
        colors = alt.Color(f"{field}:Q", scale=alt.Scale(scheme="viridis", domain=ends), legend=None)
        hover = ["channel:O", "pixel:O", *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("x", "code", "value"))]
        cells = values.mark_rect().properties(width=128, height=tall, title=title)
        return cells.encode(across, alt.Y("channel:O", axis=axis), colors, tooltip=hover)

    def vectors(*names: str) -> alt.Chart:
        one = values.transform_aggregate(min="min(low)", max="max(high)", s="max(s)", z="max(z)", groupby=["channel"])
        head = alt.Axis(title=None, orient="top", ticks=False, domain=False, labelAngle=0, labelFontSize=12)
        text = one.transform_fold(names, ["name", "number"]).encode(
            alt.X("name:N", sort=names, axis=head), alt.Y("channel:O", axis=None), alt.Text("number:Q", format=".3~g"),
            tooltip=["channel:O", "name:N", "number:Q"])  # fmt: skip
        shade = RED if "s" in names else TEXT
        return text.mark_text(fontSize=10, color=shade).properties(width=84, height=tall)

    def word(text: str, width: int, **look: Any) -> alt.Chart:
        chart = alt.Chart(DataFrame({"said": [text]})).mark_text(**look).properties(width=width, height=tall)
        return chart.encode(text="said:N", x=alt.value(width / 2), y=alt.value(tall / 2))

    box = word("scale and zero-point calibration", 24, angle=270, fontSize=12)
    box = box.properties(view=alt.ViewBackground(stroke=TEXT, cornerRadius=6))
    parts = [grid("x", "x", channel), vectors("min", "max"), box, vectors("s", "z"), grid("value", "x_q")]
    row = [parts[0], *(chart for part in parts[1:] for chart in (word("→", 12, fontSize=18), part))]
    told = "Channels as rows of x; vectors of minima and maxima; one calibration; vectors s and z; rows of x_q."
    where = f"How are all channels of {short_layer(data.layer.iloc[0])} quantized at once?"
    chart = alt.hconcat(*row, spacing=4).resolve_scale(y="shared", color="independent")
    return finish(chart, where, told, slider("bits", int(data.bits.iloc[0]), 2, 8))


def scale_explorer(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_scale_maps`` or ``measure_weight_scales``: a map for each granularity, and one row of them.

    It opens where the steps differ most: the layer, and the row of its finest map.
    """
    data = select(data, bits=None)
    one, finest = "filter" if "filter" in data else "image", data.granularity.iloc[-1]
    names = {name: in_words(name).label for name in data.granularity.unique()}
    live = data[data.scale > DEAD].assign(shown=data.granularity.map(names))  # constant channels stay empty
    spread = live[live.granularity == finest].groupby(["layer", one]).scale.agg(lambda v: v.max() / v.min())
    layer, row = spread.idxmax()
    layers = data.layer.unique()
    choice = menu("layer", layers, value=layer, labels=[short_layer(name) for name in layers])
    rows_of = slider("row", int(row), 0, int(data[one].max()), label=one)
    rows = short(live, ["scale"]).drop(columns=["bits", "granularity"])
    step = f"step at {data.bits.iloc[0]} bits"
    packed = pack(rows, ["layer", "shown", one], ["channel", "scale"])
    chosen = alt.Chart(packed).transform_filter("datum.layer == layer").transform_flatten(["channel", "scale"])
    hover = ["shown:N", f"{one}:O", "channel:O", alt.Tooltip("scale:Q", title="step", format=".3~g")]
    shades = alt.Scale(type="log", scheme="viridis")
    colors = alt.Color("scale:Q", title="step", scale=shades, legend=alt.Legend(format=".2~g"))
    axis = alt.Axis(labelOverlap=True, labelAngle=0, labelSeparation=8, ticks=False, grid=False)
    across, down = alt.X("channel:O", title=None, axis=axis), alt.Y(f"{one}:O", axis=axis)

    def grid(name: str) -> Any:
        own = chosen.transform_filter(alt.datum.shown == name)
        mark = own.transform_filter(f"datum.{one} == row").transform_aggregate(groupby=[one])
        mark = mark.mark_point(shape="triangle-left", filled=True, size=60, opacity=1, color=TEXT)
        cells = own.mark_rect().encode(across, down, colors, tooltip=hover)
        return panel(64, cells, mark.encode(down, x=alt.value({"expr": "width + 8"}))).properties(title=name)

    maps = alt.vconcat(*map(grid, names.values()))
    loose: Any = dict(nice=False, padding=6)  # the outermost points are whole
    paints, marks = looks(names, list(names.values()))
    points = chosen.transform_filter(f"datum.{one} == row").mark_point(filled=True, size=30, opacity=1).encode(
        alt.X("channel:Q", title=f"channel of this {one}", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(**loose)),
        alt.Y("scale:Q", title=step, scale=alt.Scale(type="log", **loose), axis=alt.Axis(format="~g", tickCount=5)),
        alt.Color("shown:N", title=None, scale=paints, legend=alt.Legend(orient="top", columns=2, labelLimit=250)),
        alt.Shape("shown:N", title=None, scale=marks), tooltip=hover)  # fmt: skip
    fixed = chosen.mark_point(opacity=0, aria=False).encode(x="channel:Q", y="scale:Q")  # axes stay for every row
    chart = alt.vconcat(maps, panel(150, fixed, points)).resolve_scale(color="independent", shape="independent")
    told = f"Maps of the quantization step of every {one} and channel for each granularity, and the steps of one {one}."
    return finish(chart, f"Which channels share a step, and which {one} needs its own?", told, choice, rows_of)
