"""The integer walk: how one output value of a convolution comes about without floating point."""

from typing import Any

import altair as alt
import numpy as np
from pandas import DataFrame

from granq.show.explorers.base import TEXT, WIDTH, finish, menu, pack
from granq.show.style import short_layer

LINES = [
    "'sum of all products: ' + format(datum.sum, ',') + ' (int32), of which ' + format(datum.zeros, ',')"
    " + ' comes from the zero points of the input'",
    "'times rescale ' + format(datum.rescale, '.6~g') + ', plus offset ' + format(datum.offset, '.4~g')"
    " + ', is ' + format(datum.value, '.6f')",
    "'the student computes ' + format(datum.student, '.6f') + ' in floating point'",
    "'hardware without floats: times ' + format(datum.multiplier, ',') + ', shifted right by ' + datum.shift + ' bits'",
]


def integer_walk(data: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_integer_walk``: codes in the window, weights, products, their sum, and what becomes of it."""
    mantissa, exponent = np.frexp(data.rescale)
    rows = data.assign(multiplier=(mantissa * 2.0**31).round(), shift=31 - exponent)
    rows = rows.assign(u=rows.q + rows.z, product=(rows.q + rows.z) * rows.v)
    rows["at"] = "row " + rows.row.astype(str) + ", column " + rows.column.astype(str)
    lists = ["input_channel", "place", "q", "z", "u", "v", "product"]
    packed = pack(rows.drop(columns=["row", "column", "layer"]), ["channel", "at"], lists)
    chosen = alt.Chart(packed).transform_filter("datum.channel == channel && datum.at == pixel")
    products = chosen.transform_flatten([*lists])

    def panel(field: str, title: str) -> Any:
        limit = 1.6 * float(rows[field].abs().max())  # no cell so dark that its number drowns
        axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, grid=False)
        scale = alt.Scale(scheme="redblue", reverse=True, domain=[-limit, limit])
        x = alt.X("input_channel:O", title="input channel" if field == "product" else None, axis=axis)
        y = alt.Y("place:O", title=None, axis=alt.Axis(labels=False, ticks=False))
        base = products.encode(x, y, tooltip=[f"{name}:Q" for name in lists])
        numbers = base.mark_text(color="black", fontSize=9).encode(text=f"{field}:Q")
        layers = [
            base.mark_rect().encode(alt.Color(f"{field}:Q", legend=None, scale=scale)),
            *[numbers] * (data.input_channel.nunique() <= 24),
        ]
        return alt.layer(*layers).properties(width=WIDTH, height=108, title=alt.Title(title, fontWeight="normal"))

    zeros = products.transform_calculate(zero="datum.z * datum.v").transform_joinaggregate(zeros="sum(zero)")
    one = zeros.transform_window(number="row_number()").transform_filter("datum.number == 1")
    texts = [one.transform_calculate(text=line).mark_text(align="left", fontSize=12, color=TEXT).encode(
        text="text:N", x=alt.value(0), y=alt.value(8 + 17 * i)) for i, line in enumerate(LINES)]  # fmt: skip
    chart = alt.vconcat(
        panel("u", "integers of the input in the window, u = q + z"), panel("v", "integers of the filter, v"),
        panel("product", "products u · v"), alt.layer(*texts).properties(width=WIDTH, height=70), spacing=6,
    ).resolve_scale(color="independent")  # fmt: skip
    told = "Integers in the window of one output value, of the filter, their products, the sum and what becomes of it."
    controls = [
        menu("channel", data.channel.unique().tolist(), "output channel"),
        menu("pixel", rows["at"].unique().tolist()),
    ]
    title = f"How does {short_layer(data.layer.iloc[0])} compute one value without floating point?"
    return finish(chart, title, told, *controls)
