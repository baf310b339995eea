"""How a quantized convolution is executed: one value in integers, and what the ways to apply scales cost."""

from typing import Any

import altair as alt
import numpy as np
from pandas import DataFrame

from granq.show.explorers.base import RED, TEXT, WIDTH, finish, menu, pack, panel, short
from granq.show.style import short_layer

TEN = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-9"  # Vega's log axis also labels 2, 3, 5 ...
PANELS = {
    "median_ms": "measured: ms, median and quartiles", "counted": "predicted: multiplications by scales",
    "peak_mb": "measured: peak memory (MB)", "bytes": "predicted: bytes moved",
}  # fmt: skip
LINES = [
    "'sum of all products: ' + format(datum.sum, ',') + ' (int32), of which'",
    "format(datum.sum - datum.zeros, ',') + ' from the codes, ' + format(datum.zeros, ',') + ' from the zero points'",
    "'times rescale ' + format(datum.rescale, '.6~g') + ', plus offset ' + format(datum.offset, '.4~g')",
    "'is ' + format(datum.value, '.6f') + '; the student computes ' + format(datum.student, '.6f')",
    "'the factor in integers: ' + format(datum.multiplier, ',') + ' / 2^' + datum.shift",
    "datum.code === null ? '' : 'after what follows (BatchNorm, sum, ReLU) ' + format(datum.read, '.4~f')",
    "datum.code === null ? '' : 'the next layer reads code ' + datum.free"
    " + (datum.free === datum.code ? '' : ', clamped to ' + datum.code)",
]


def integer_walk(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_integer_walk``: codes in the window, weights, products, their sum, and what becomes of it."""
    mantissa, exponent = np.frexp(data.rescale)
    rows = data.assign(multiplier=(mantissa * 2.0**31).round(), shift=31 - exponent, u=data.q + data.z)
    rows["at"] = "row " + rows.row.astype(str) + ", column " + rows.column.astype(str)
    rows["product"] = rows.u * rows.v
    rows["zeros"] = (rows.z * rows.v).groupby([rows.channel, rows["at"]]).transform("sum")
    lists = ["input_channel", "place", "q", "z", "u", "v", "product"]
    packed = pack(rows.drop(columns=["row", "column", "layer"]), ["channel", "at"], lists)
    chosen = alt.Chart(packed).transform_filter("datum.channel == channel && datum.at == pixel")
    products = chosen.transform_flatten([*lists])

    def table(field: str, title: str) -> Any:
        limit = 1.6 * float(rows[field].abs().max())  # no cell so dark that its number drowns
        axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, grid=False)
        scale = alt.Scale(scheme="redblue", reverse=True, domain=[-limit, limit])
        x = alt.X("input_channel:O", title="input channel" if field == "product" else None, axis=axis)
        y = alt.Y("place:O", title=None, axis=alt.Axis(labels=False, ticks=False))
        base = products.encode(x, y, tooltip=[f"{name}:Q" for name in lists])
        cells = base.mark_rect().encode(alt.Color(f"{field}:Q", legend=None, scale=scale))
        numbers = base.mark_text(color="black", fontSize=9).encode(text=f"{field}:Q")
        return panel(108, cells, *[numbers] * (data.input_channel.nunique() <= 24), title=title)

    text = chosen.transform_calculate(text=" + '\\n' + ".join(map("({})".format, LINES)))
    text = text.mark_text(align="left", fontSize=12, lineBreak="\n", lineHeight=17)
    text = text.encode(text="text:N", x=alt.value(0), y=alt.value(8)).properties(width=WIDTH, height=17 * len(LINES))
    titles = {"u": "integers of the input in the window, u = q + z", "v": "integers of the filter, v"}
    panels = [table(field, title) for field, title in (titles | {"product": "products u · v"}).items()]
    chart = alt.vconcat(*panels, text, spacing=6).resolve_scale(color="independent")
    told = "Integers in the window of one output value, of the filter, their products, the sum and what becomes of it."
    channels = menu("channel", data.channel.unique().tolist(), "output channel")
    title = f"How does {short_layer(data.layer.iloc[0])} add up one value in integers?"
    return finish(chart, title, told, channels, menu("pixel", rows["at"].unique()))


def speed_lab(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_latency_scaling``: times of one measured shape next to what counting predicts.

    Pale dots are the other shapes that were measured; there is nothing in between.
    """
    shapes = [f"{c} channels, batch {n}, {s}×{s} pixels" for c, n, s in data[["channels", "batch", "size"]].to_numpy()]
    numbers = ["median_ms", "q25_ms", "q75_ms", "scale_multiplications", "bytes", "peak_mb"]
    rows = short(data, numbers)[["execution", *numbers]]
    rows = rows.assign(shape=shapes, counted=data.scale_multiplications.clip(1))
    order = data.execution.unique().tolist()
    looks = alt.Scale(domain=order, range=[RED if name == "pre-scaled" else TEXT for name in order])
    colors, hover = alt.Color("execution:N", scale=looks, legend=None), ["execution:N", "shape:N", *numbers]

    def dots(field: str, title: str) -> Any:
        said = "format(datum.value, '~s')" if title.startswith("predicted") else "datum.value"
        zero = "datum.value == 1 ? '0' : " if field == "counted" else ""  # a logarithm knows no zero: it stands at 1
        axis = alt.Axis(labelExpr=f"{TEN} ? {zero}{said} : ''", labelOverlap="greedy", labelSeparation=4, grid=False)
        x = alt.X(f"{field}:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=8), axis=axis)
        y = alt.Y("execution:N", title=None, sort=order, axis=alt.Axis(ticks=False, labelLimit=170))
        base = alt.Chart(rows).encode(y, colors)
        others = base.mark_circle(size=18, opacity=0.4).encode(x)
        chosen = base.transform_filter("datum.shape == shape")
        own = chosen.mark_circle(size=70, opacity=1).encode(x, tooltip=hover)
        bars = chosen.mark_rule(strokeWidth=2).encode(x="q25_ms:Q", x2="q75_ms:Q")
        return panel(96, others, *[bars] * (field == "median_ms"), own, title=title)

    told = "Time, memory, multiplications and bytes of every execution of a convolution; red is pre-scaling (GranQ)."
    chart = alt.vconcat(*(dots(field, title) for field, title in PANELS.items()))
    return finish(chart, "Does counting predict the time?", told, menu("shape", dict.fromkeys(shapes)))
