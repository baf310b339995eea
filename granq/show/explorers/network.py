"""A network as a graph: its layers from left to right by depth, and where their outputs meet."""

import copy
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas import DataFrame
from torch import fx, nn

from granq.graph import SHAPE, trace
from granq.plain import LAYERS, module_of
from granq.show.explorers.base import GREY, RED, TEXT, WIDTH

ROW = 32  # layers next to each other; what is deeper goes on in the next row


def network_layout(model: nn.Module) -> DataFrame:
    """Place every call of a layer, and every sum or join of several outputs, at its depth: the longest path to it.

    What lies on the longest path of all is in one line; of the rest, one is below the other.

    Returns:
        One row per point: kind ("layer", "join", "image", or "edge" for a point of a curve), layer (the name of the
        layer or of the graph's node; of an edge both ends), x (place in its row), y. Raises UserError if the forward
        cannot be traced.
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
    return _in_rows(pd.concat(frames, ignore_index=True))


def _curve(x: float, y: float, name: str, x2: float, y2: float, name2: str) -> DataFrame:
    """Return points of an edge; it goes around what lies between its ends."""
    t = np.linspace(0, 1, 4 * int(x2 - x) + 1)
    arc = np.sqrt(x2 - x - 1) * 4 * t * (1 - t) * (1 if y == 0 else -1) if y == y2 else 0
    points = {"x": x + (x2 - x) * t, "y": y + (y2 - y) * t + arc}
    return DataFrame({"kind": "edge", "layer": f"{name} to {name2}"} | points)


def _in_rows(frame: DataFrame) -> DataFrame:
    """Break a long network into rows."""
    row = (frame.x + 0.5) // ROW
    apart = frame.y.max() - frame.y.min() + 1
    return frame.assign(x=frame.x - row * ROW, y=frame.y - row * apart, row=row)


def network_panel(every: Any, layout: DataFrame, tooltip: list[Any]) -> Any:
    """Return the graph with its layers in red, the worse the stronger.

    ``every`` is a chart with a row for each layer and place: columns layer, x, y and ``bad``, lowest for the worst.
    """
    plain: dict[str, Any] = {"axis": None, "scale": alt.Scale(nice=False, zero=False, padding=12)}
    x, y = alt.X("x:Q", **plain), alt.Y("y:Q", **plain)
    edges = alt.Chart(layout[layout.kind == "edge"].round(2)).mark_line(color=GREY, strokeWidth=1.5)
    edges = edges.encode(x, y, detail=["layer:N", "row:O"])
    joins = alt.Chart(layout[layout.kind.isin(["join", "image"])])
    joins = joins.mark_point(filled=True, color=TEXT, size=25, opacity=1)
    shapes = alt.Scale(domain=["join", "image"], range=["cross", "square"])
    joins = joins.encode(x, y, alt.Shape("kind:N", legend=None, scale=shapes), tooltip=["kind:N", "layer:N"])
    strength = alt.FillOpacity("bad:Q", legend=None, scale=alt.Scale(range=[1, 0.05], zero=False, nice=False))
    layers = every.mark_circle(fill=RED, stroke=TEXT, strokeWidth=1, size=90, cursor="pointer")
    layers = layers.encode(x, y, strength, tooltip=tooltip)
    height = 24 * float(np.ptp(layout.y)) + 30
    return alt.layer(edges, joins, layers).resolve_scale(shape="independent").properties(width=WIDTH, height=height)
