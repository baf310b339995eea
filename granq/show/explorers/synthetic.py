"""Generated images next to real ones, and how far apart they are inside the network."""

import base64
from io import BytesIO
from typing import Any

import altair as alt
from pandas import DataFrame
from PIL import Image

from granq.measure.images import decode_pixels
from granq.show.explorers.base import TEXT, WIDTH, finish, layer_axis, menu, panel, pick_layer, short
from granq.show.style import GREY, ROLES

QUANTITIES = {"ks_distance": "KS distance", "shift": "shift of the mean (in std)", "ratio": "ratio of variances"}
BLUE = ROLES["layerwise"].color  # black and white, as on paper, would change places in a dark theme
NUMBERS = [*QUANTITIES, "mean_real", "mean_synthetic"]


def synthetic_against_real(gap: DataFrame, images: DataFrame) -> alt.VConcatChart:
    """Explore ``measure_synthetic_gap`` with comparisons as ``pair``, and ``measure_images`` of each ``source``.

    A click chooses a layer, so does the list; below are the means of its channels, real and synthetic.
    """
    gap = DataFrame({"pair": "synthetic against real"}, gap.index).assign(**gap)
    images = DataFrame({"source": "synthetic"}, images.index).assign(**images)
    rows, pairs = gap[gap.variance_real > 0], gap.pair.unique().tolist()
    shift = (rows.mean_synthetic - rows.mean_real).abs() / rows.variance_real**0.5
    place = rows.layer.factorize()[0] + 0.82 + 0.36 * rows.pair.factorize()[0]
    rows = rows.assign(shift=shift, ratio=rows.variance_synthetic / rows.variance_real, place=place)
    pick = pick_layer(gap.layer, str(rows.groupby("layer").ks_distance.median().idxmax()))
    every = alt.Chart(short(rows[["layer", "channel", "pair", "place", *NUMBERS]], NUMBERS))
    every = every.transform_calculate(value="datum[quantity]")
    looks = alt.Scale(domain=pairs, range=[BLUE, GREY])
    colors = alt.Color("pair:N", title=None, scale=looks, legend=alt.Legend(orient="top"))
    hover = ["layer:N", "channel:Q", "pair:N", *(f"{name}:Q" for name in NUMBERS)]
    x = alt.X("place:Q", title=None, axis=layer_axis(rows.layer), scale=alt.Scale(nice=False, padding=10))
    dots = every.mark_circle(size=14, opacity=0.7).encode(x, alt.Y("value:Q", title=None), colors, tooltip=hover)
    middle = every.mark_tick(color=TEXT, opacity=1, width=9, thickness=2).encode(x, alt.Y("median(value):Q"))
    said = alt.expr(f"{QUANTITIES}[quantity] + ', channels and their median'")
    distances = panel(150, dots.add_params(pick), middle, title=said)
    own, real = every.transform_filter(pick), alt.X("mean_real:Q", title="mean of a channel of the chosen layer, real")
    compared = alt.Y("mean_real:Q", title="mean, compared", scale=alt.Scale(zero=False))
    equal = own.mark_line(color=TEXT, strokeDash=[3, 3]).encode(real, compared)
    means = own.mark_circle(size=40, opacity=0.8).encode(real, alt.Y("mean_synthetic:Q"), colors, tooltip=hover)
    told = "Generated and real images of each label, and how far apart their activations are in every layer."
    choice = menu("quantity", QUANTITIES, labels=list(QUANTITIES.values()))
    chart = alt.vconcat(_strip(images), distances, panel(140, equal, means))
    return finish(chart, "How far are generated images from real ones?", told, choice)


def _strip(images: DataFrame) -> alt.Chart:
    """Return the first ten labels as columns of pictures, a row for each source."""
    rows = images[images.label < 10].drop_duplicates(["source", "label"])
    rows = rows.assign(picture=[data_url(row) for row in rows.to_dict("records")]).drop(columns="pixels")
    hover = ["source:N", "label:O", "predicted:O", alt.Tooltip("confidence:Q", format=".0%")]
    plain = alt.Axis(labelAngle=0, ticks=False, domain=False, title=None)
    pictures = alt.Chart(rows).mark_image(width=46, height=46).encode(
        alt.X("label:O", axis=plain), alt.Y("source:N", axis=plain), url="picture:N", tooltip=hover)  # fmt: skip
    return pictures.properties(width=WIDTH, height=50 * rows.source.nunique())


def data_url(row: dict[Any, Any]) -> str:
    """Return the image of a row of ``measure_images`` as an address that a chart can draw."""
    buffer, image = BytesIO(), Image.fromarray(decode_pixels(row["pixels"], row["size"]))
    image.resize((64, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
