"""What the executions of a quantized convolution cost: predictions next to times."""

from typing import Any

import altair as alt
from pandas import DataFrame

from granq.show.explorers.base import RED, TEXT, finish, menu, short

TEN = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-9"  # Vega's log axis also labels 2, 3, 5 ...
PANELS = {
    "median_ms": "measured: ms, median and quartiles", "counted": "predicted: multiplications by scales",
    "peak_mb": "measured: peak memory (MB)", "bytes": "predicted: bytes moved",
}  # fmt: skip


def speed_lab(data: DataFrame) -> alt.ConcatChart:
    """Explore ``measure_latency_scaling``: times of one measured shape next to what counting predicts.

    Pale dots are the other shapes that were measured; there is nothing in between.
    """
    shapes = [f"{c} channels, batch {n}, {s}×{s} pixels" for c, n, s in data[["channels", "batch", "size"]].to_numpy()]
    numbers = ["median_ms", "q25_ms", "q75_ms", "scale_multiplications", "bytes", "peak_mb"]
    rows = short(data[["execution", *numbers]], numbers).assign(
        shape=shapes, counted=data.scale_multiplications.clip(1)
    )
    order = data.execution.unique().tolist()
    looks = alt.Scale(domain=order, range=[RED if name == "pre-scaled" else TEXT for name in order])
    colors, hover = alt.Color("execution:N", scale=looks, legend=None), ["execution:N", "shape:N", *numbers]

    def panel(field: str, title: str) -> Any:
        said = "format(datum.value, '~s')" if title.startswith("predicted") else "datum.value"
        zero = "datum.value == 1 ? '0' : " if field == "counted" else ""  # a logarithm knows no zero: it stands at 1
        axis = alt.Axis(labelExpr=f"{TEN} ? {zero}{said} : ''", labelOverlap="greedy", labelSeparation=4, grid=False)
        x = alt.X(f"{field}:Q", title=title, scale=alt.Scale(type="log", nice=False, padding=8), axis=axis)
        side = alt.Axis(labels=title.startswith("measured"), ticks=False, labelLimit=170)
        y = alt.Y("execution:N", title=None, sort=order, axis=side)
        base = alt.Chart(rows).encode(y, colors)
        others = base.mark_circle(size=18, opacity=0.25).encode(x)
        chosen = base.transform_filter("datum.shape == shape")
        dots = chosen.mark_circle(size=70, opacity=1).encode(x, tooltip=hover)
        bars = chosen.mark_rule(strokeWidth=2).encode(x="q25_ms:Q", x2="q75_ms:Q")
        return alt.layer(others, *[bars] * (field == "median_ms"), dots).properties(width=200, height=150)

    told = "Time, memory, multiplications and bytes of every execution of a convolution; red is pre-scaling (GranQ)."
    chart = alt.concat(*(panel(field, title) for field, title in PANELS.items()), columns=2)
    return finish(chart, "Does counting predict the time?", told, menu("shape", dict.fromkeys(shapes)))
