"""The layers of a network: which one is guilty, the graph that they form, and how far apart their ranges are."""

import copy
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas import DataFrame
from torch import fx, nn

from granq.graph import SHAPE, trace
from granq.measure.running import DEAD
from granq.plain import LAYERS, module_of
from granq.show.explorers.base import RED, TEXT, finish, layer_axis, looks, menu, pack, panel, pick_layer, short, slider
from granq.show.layers import METRIC_LABELS, SENSITIVITY_LABELS, SQNR_CEILING
from granq.show.style import GREY, select

KEYS, METRICS, LOOSE = ["layer", "scheme", "mode"], [*METRIC_LABELS], alt.Scale(nice=False, zero=False, padding=8)
LABELS = METRIC_LABELS | {"kl": SENSITIVITY_LABELS["kl"] + ", this layer alone"}
ABOVE = f"{LABELS}[metric] + (metric == 'kl' ? '' : ', ' + mode)"  # titles; KL has no mode, and no channels
INSIDE = f"{LABELS}[metric == 'kl' ? 'sqnr_db' : metric] + ', ' + mode"
ROW = 32  # layers next to each other; what is deeper goes on in the next row
ENDS = ["low", "high", "usual_low", "usual_high", "narrowest", "median", "widest", "whole"]


def layer_explorer(data: DataFrame, layout: DataFrame | None = None) -> alt.VConcatChart:
    """Explore ``measure_layer_error(..., per_channel=True)``: all layers, and inside one.

    A click chooses a layer, so does the list. One scheme is compared with another or with all. A column ``kl`` of
    ``measure_sensitivity`` is one metric more, of layers only; with a ``network_layout`` the network is drawn too.
    """
    data = select(data, weight_bits=None, act_bits=None).assign(sqnr_db=lambda d: d.sqnr_db.clip(upper=SQNR_CEILING))
    schemes, metrics = data.scheme.unique().tolist(), [*METRICS, *data.columns.intersection(["kl"])]
    controls = [
        menu("metric", metrics, value="sqnr_db", labels=[LABELS[name] for name in metrics]),
        menu("mode", data["mode"].unique().tolist(), "errors"),
        menu("scheme", schemes, value="granq" if "granq" in schemes else schemes[0]),
        menu("pinned", ["all", *(schemes[1:] and schemes)], "compare with"),
        menu("order", ["depth", "rank"], "layers by", labels=["depth", "error, worst first"]),
    ]
    inside = data[data.channel.notna()].dropna(subset="sqnr_db").sort_values("sqnr_db")
    worst = inside.drop_duplicates(KEYS)[[*KEYS, "channel"]].rename(columns={"channel": "worst"})
    rows = data.loc[data.channel.isna(), KEYS + metrics].merge(worst, how="left")
    first = rows[rows["mode"] == data["mode"].iloc[0]]  # what the menu shows
    pick = pick_layer(data.layer, first.sort_values("sqnr_db").layer.iloc[0])
    colors, marks = looks(schemes, schemes)
    scheme = alt.Color("scheme:N", title=None, scale=colors, legend=alt.Legend(orient="top"))

    def drawn(chart: Any, x: alt.X, height: int, hover: str, title: str, *below: Any) -> Any:
        y = alt.Y("value:Q", title=None, scale=LOOSE)
        shown = chart.transform_filter("datum.scheme == scheme || pinned == 'all' || datum.scheme == pinned")
        shape, told = alt.Shape("scheme:N", title=None, scale=marks), ["layer:N", "scheme:N", hover]
        dots = shown.mark_point(filled=True, size=40, opacity=1, stroke=TEXT, strokeWidth=0.5)
        dots = dots.encode(x, y, scheme, shape, tooltip=[*told, "value:Q"])
        fixed = chart.mark_point(opacity=0, aria=False).encode(x, y)  # the axes stay when schemes are chosen
        wide = alt.condition("datum.scheme == scheme", alt.value(2.5), alt.value(1))
        lines = shown.mark_line().encode(x, y, scheme, strokeWidth=wide)
        return panel(height, fixed, lines, *below, dots, title=alt.expr(title))

    every = _placed(rows)
    x = alt.X("place:Q", title=None, axis=layer_axis(rows.layer, "order == 'depth'"), scale=LOOSE)
    here = every.transform_filter(pick).mark_rule(strokeDash=[3, 3], opacity=0.5).encode(x)
    packed = pack(short(inside[[*KEYS, "channel", *METRICS]], METRICS), KEYS, ["channel", *METRICS])
    own = alt.Chart(packed).transform_filter(pick).transform_flatten(["channel", *METRICS])
    own = _values(own, "(metric == 'kl' ? 'sqnr_db' : metric)")
    own = own.transform_window(rank="row_number()", sort=[alt.SortField("bad")], groupby=["scheme"])
    ranks = alt.X("rank:Q", title="output channels of the chosen layer, worst first", scale=LOOSE,
                  axis=alt.Axis(tickMinStep=1, format="d"))  # fmt: skip
    below = drawn(own, ranks, 140, "channel:Q", INSIDE)
    panels = [drawn(every, x, 190, "worst:Q", ABOVE, here.add_params(pick)), below]
    chart = alt.vconcat(*panels) if layout is None else _under_graph(panels, rows, layout, pick)
    told = "The error of every layer under several schemes, and below it that of the channels of one layer."
    return finish(chart, "Which layer is guilty?", told, *controls)


def _under_graph(panels: list[Any], rows: DataFrame, layout: DataFrame, pick: alt.Parameter) -> alt.VConcatChart:
    """Draw the network above the panels, its layers in red, the worse the stronger; a click on one chooses too."""
    plain: dict[str, Any] = {"axis": None, "scale": alt.Scale(nice=False, zero=False, padding=12)}
    x, y = alt.X("x:Q", **plain), alt.Y("y:Q", **plain)
    edges = alt.Chart(layout[layout.kind == "edge"].round(2)).mark_line(color=GREY, strokeWidth=1.5)
    edges = edges.encode(x, y, detail=["layer:N", "row:O"])
    joins = alt.Chart(layout[layout.kind.isin(["join", "image"])])
    joins = joins.mark_point(filled=True, color=TEXT, size=25, opacity=1)
    shapes = alt.Scale(domain=["join", "image"], range=["cross", "square"])
    joins = joins.encode(x, y, alt.Shape("kind:N", legend=None, scale=shapes), tooltip=["kind:N", "layer:N"])
    layers = _values(alt.Chart(rows.merge(layout[layout.kind == "layer"]))).transform_filter("datum.scheme == scheme")
    layers = layers.properties(name="network")
    layers = layers.mark_circle(fill=RED, stroke=TEXT, strokeWidth=1, size=90, cursor="pointer")
    strength = alt.FillOpacity("bad:Q", legend=None, scale=alt.Scale(range=[1, 0.05], zero=False, nice=False))
    layers = layers.encode(x, y, strength, tooltip=["layer:N", "worst:Q", "value:Q"])
    graph = panel(24 * float(np.ptp(layout.y)) + 30, edges, joins, layers).resolve_scale(shape="independent")
    chart: Any = alt.vconcat(graph, *panels)
    next(param for param in chart.params if param.name == pick.name).views.append(chart.vconcat[0].layer[-1].name)
    return chart


def _values(chart: alt.Chart, metric: str = "metric") -> alt.Chart:
    """Keep the chosen mode; add the chosen metric as ``value``, and ``bad``, which is lowest for the worst."""
    chart = chart.transform_filter("datum.mode == mode").transform_calculate(value=f"datum[{metric}]")
    small = f"indexof(['mse', 'kl'], {metric}) >= 0"
    return chart.transform_calculate(bad=f"{small} ? -log(max(datum.value, 1e-9)) : datum.value")


def _placed(rows: DataFrame) -> alt.Chart:
    """Add the place of every layer: its depth, or its rank within the chosen scheme, for all schemes."""
    every = _values(alt.Chart(rows.assign(depth=rows.layer.factorize()[0] + 1)))
    every = every.transform_calculate(own="datum.scheme == scheme ? datum.bad : null")
    every = every.transform_joinaggregate(key="max(own)", groupby=["layer"])
    every = every.transform_window(rank="dense_rank()", sort=[alt.SortField("key"), alt.SortField("depth")])
    return every.transform_calculate(place="order == 'depth' ? datum.depth : datum.rank")


def network_layout(model: nn.Module) -> DataFrame:
    """Place every call of a layer, and every sum or join of several outputs, at its depth: the longest path to it.

    What lies on the longest path of all is in one line; of the rest, one is below the other. Columns: kind ("layer",
    "join", "image", or "edge" for a point of a curve), layer (the name of the layer or of the graph's node; of an edge
    both ends), x (place in its row), y. Raises UserError if the forward cannot be traced.
    """
    root = copy.deepcopy(model).eval()
    reads, depth, height = dict[fx.Node, list[fx.Node]](), dict[fx.Node, int](), dict[fx.Node, int]()
    edges: list[tuple[fx.Node, fx.Node]] = []
    for node in trace(root).nodes:
        reads[node] = list(dict.fromkeys(shown for value in node.all_input_nodes for shown in reads[value]))
        if (node.args[1] if node.target is getattr else node.target) in SHAPE:  # a size is no path of values
            reads[node] = []
        layer = isinstance(module_of(root, node), LAYERS)
        if node.op != "output" and (layer or not depth or len(reads[node]) > 1):  # of the arguments the first
            depth[node] = 1 + max((depth[source] for source in reads[node]), default=-1)
            edges += [(source, node) for source in reads[node]]
            reads[node] = [node]
    for source, target in reversed(edges):
        height[source] = max(height.get(source, 0), 1 + height.get(target, 0))
    frame = DataFrame(
        {
            "kind": "layer" if isinstance(module_of(root, n), LAYERS) else "join" if d else "image",
            "layer": str(n.target) if n.op == "call_module" else n.name, "x": d, "length": d + height.get(n, 0),
        } for n, d in depth.items()
    )  # fmt: skip
    lane = frame.sort_values("length", ascending=False, kind="stable").groupby("x").cumcount()
    frame["y"] = -lane.astype(float)
    place = {node: (x, y, name) for node, x, y, name in zip(depth, frame.x, frame.y, frame.layer, strict=True)}
    frames = [frame.drop(columns="length"), *(_curve(*place[source], *place[target]) for source, target in edges)]
    frame = pd.concat(frames, ignore_index=True)
    row, apart = (frame.x + 0.5) // ROW, frame.y.max() - frame.y.min() + 1
    return frame.assign(x=frame.x - row * ROW, y=frame.y - row * apart, row=row)


def _curve(x: float, y: float, name: str, x2: float, y2: float, name2: str) -> DataFrame:
    """Return points of an edge; it goes around what lies between its ends."""
    t = np.linspace(0, 1, 4 * int(x2 - x) + 1)
    arc = np.sqrt(x2 - x - 1) * 4 * t * (1 - t) * (1 if y == 0 else -1) if y == y2 else 0
    points = {"x": x + (x2 - x) * t, "y": y + (y2 - y) * t + arc}
    return DataFrame({"kind": "edge", "layer": f"{name} to {name2}"} | points)


def range_explorer(data: DataFrame, bits: int = 3) -> alt.VConcatChart:
    """Explore ``measure_ranges``: the range of every layer, and the steps of its channels, at first at ``bits``."""
    width = data.high - data.low
    groups = data.assign(width=width.where(width > DEAD)).groupby(["part", "layer"], sort=False)  # dead: no step
    rows = groups.agg(
        low=("low", "min"), high=("high", "max"), usual_low=("low", "median"), usual_high=("high", "median"),
        narrowest=("width", "min"), median=("width", "median"), widest=("width", "max"),
    ).reset_index()  # fmt: skip
    rows["place"] = rows.layer.map({name: i for i, name in enumerate(data.layer.unique(), 1)})
    shown: Any = alt.Chart(short(rows.assign(whole=rows.high - rows.low), ENDS)).transform_filter("datum.part == part")
    for name in ENDS[4:]:
        shown = shown.transform_calculate(**{name: f"datum.{name} > 0 ? datum.{name} / (pow(2, bits) - 1) : null"})
    x = alt.X("place:Q", title=None, axis=layer_axis(data.layer), scale=LOOSE)
    shown = shown.encode(x, tooltip=["layer:N", *(f"{name}:Q" for name in ENDS)])
    log = alt.Y("narrowest:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g"))
    point: dict[str, Any] = dict(filled=True, size=35, opacity=1)
    ranges = [
        shown.mark_rule(strokeWidth=2).encode(alt.Y("low:Q", title=None, scale=LOOSE), y2="high:Q"),
        shown.mark_rule(color=RED, strokeWidth=5).encode(y="usual_low:Q", y2="usual_high:Q"),
    ]
    steps = [
        shown.mark_rule(color=GREY, strokeWidth=3).encode(log, y2="widest:Q"),
        shown.mark_point(shape="circle", color=RED, **point).encode(y="median:Q"),
        shown.mark_point(shape="diamond", color=TEXT, **point).encode(y="whole:Q"),
    ]
    said = "steps; red: median; diamond: one for all"
    above = panel(150, *ranges, title="range; in red of the median channel")
    chart = alt.vconcat(above, panel(150, *steps, title=said))
    told = "The range of every layer with that of its median channel, and below it the steps that its channels need."
    parts = menu("part", sorted(data.part.unique()), "ranges of")
    return finish(chart, "How far apart are the ranges?", told, parts, slider("bits", bits, 2, 8))
