"""One page about any network: what quantization does to it, layer by layer, as a file that needs no network."""

import json
from collections.abc import Iterable, Iterator
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import vl_convert
from pandas import DataFrame
from torch import Tensor, nn

from granq.convert import Quantizer, activation_places
from granq.devices import commit, versions
from granq.errors import UserError
from granq.files import save_atomically
from granq.graph import layer_names
from granq.hooks import Batch, images_of
from granq.integer import IntegerLayer, integer_model
from granq.match import random_shapes
from granq.measure import running
from granq.measure.activations import measure_activation_samples, measure_ranges
from granq.measure.audit import audit, summarize_audit
from granq.measure.layer_error import measure_layer_error
from granq.measure.sensitivity import measure_sensitivity, prepare
from granq.schemes import Scheme, check_bits, get_scheme
from granq.show.explorers.layers import layer_explorer
from granq.show.explorers.network import network_layout
from granq.show.explorers.ranges import range_explorer
from granq.show.explorers.rounding import distortion_microscope

BATCH = 16  # images in memory at once
CHANNELS, MAGNIFIED = 128, 6  # the worst channels of a layer, and the worst layers, are enough for a page
COLUMNS = "layer type weight_shape macs_share weight_bits act_bits bits_per_weight bits_per_activation sqnr_db kl status"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{color-scheme: light dark}}
body {{font: 15px/1.5 sans-serif; max-width: 664px; margin: 1em auto; padding: 0 10px}}
table {{border-collapse: collapse; font-size: 12px}}
td, th {{padding: 1px 8px; text-align: right; white-space: nowrap}}
tr > :first-child {{text-align: left}}
.table {{overflow: auto; max-height: 30em}}
</style><script>{script}</script></head><body><h1>{title}</h1>
{body}</body></html>
"""


def report(
    model: nn.Module, batches: Iterable[Batch] = (), *, out: str | Path, scheme: str | Scheme | nn.Module = "granq",
    bits: int | tuple[int, int] = 3, images: int = 64, image_size: int = 224, facts: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write one HTML page about a network under quantization: charts and all, without anything from a network.

    Args:
        model: the full-precision network, float32. Without a trace (torch.fx) the page lacks what needs one.
        batches: images (N, 3, H, W), or pairs (images, labels); if there are none, ``random_shapes`` of ``image_size``.
        out: the file, which is new.
        scheme: name or scheme; or the quantized network, a student or somebody else's, whose layers have the names of
            those of ``model``.
        bits: width, or (weights, activations); without meaning for a network that is quantized already.
        images: how many at most.
        facts: provenance, told at the end of the page.

    Returns:
        What the page says in numbers: agreement (percent of images), those of ``summarize_audit``, bytes. Raises
        UserError if ``out`` exists, or for an unknown scheme or width.
    """
    out, widths = Path(out), (bits, bits) if isinstance(bits, int) else bits
    if out.exists():
        raise UserError(f"{out} already exists; choose another file")
    name = scheme if isinstance(scheme, str) else type(scheme).__name__
    if not isinstance(scheme, nn.Module):
        scheme, name = get_scheme(scheme), f"{name} W{check_bits(widths[0])}A{check_bits(widths[1])}"
    data, source = list(_batches(batches, images)), "given"
    if not data:
        data, source = list(_batches([_shapes(images, image_size)], images)), "random shapes, seed 0"
    page = _Page(model, data, scheme, name, widths)
    told = {"network": type(model).__name__, "quantized": name} | (facts or {}) | {"images": f"{page.images}, {source}"}
    told |= {"granq": version("granq"), "commit": commit()} | versions(str(next(model.parameters()).device))
    page.write()
    page.add("Where the numbers come from", _table(DataFrame(told.items()), header=False))
    title = escape(f"What quantization does to {told['network']}: {name}")
    text = PAGE.format(title=title, script=vl_convert.javascript_bundle(), body="\n".join(page.parts))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    return page.found | {"bytes": out.stat().st_size}


def _batches(batches: Iterable[Batch], left: int) -> Iterator[Batch]:
    """Yield the first ``left`` images, and their labels, in batches of BATCH."""
    for batch in batches:
        parts = [part[:left].split(BATCH) for part in ([batch] if isinstance(batch, Tensor) else batch)]
        yield from parts[0] if isinstance(batch, Tensor) else zip(*parts, strict=True)
        left -= len(images_of(batch))
        if left <= 0:
            return


def _shapes(images: int, image_size: int) -> Tensor:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return random_shapes(images, image_size)


class _Page:
    """What is measured for a page, and its parts as HTML, in order."""

    def __init__(
        self, model: nn.Module, data: list[Batch], scheme: Scheme | nn.Module, name: str, widths: tuple[int, int]
    ) -> None:
        self.model, self.data, self.name, self.widths = model, data, name, widths
        self.parts, self.found, outputs, self.maps = list[str](), dict[str, Any](), list[Any](), dict[str, bool]()
        self.layout: DataFrame | None = None
        self.missing = ""

        def visit(layer: str, x: Tensor, _: Any) -> None:
            self.maps[layer] = x.dim() == 4 and x[0, 0].numel() > 1

        self.images = running.run(
            model, data, "images", layer_names(model), visit, lambda _, output: outputs.append(output)
        )
        self.outputs = outputs if isinstance(outputs[0], Tensor) and outputs[0].dim() == 2 else []  # of a classifier
        try:
            self.layout = network_layout(model)
        except UserError as error:
            self.missing = f"<p>Parts of this page are missing, as they follow the network's graph: {escape(str(error))}.</p>"
        self.student: nn.Module | None = scheme if isinstance(scheme, nn.Module) else None
        if isinstance(scheme, Scheme) and self.layout is not None:
            self.student = prepare(model, scheme, widths, data)

    def add(self, title: str, *texts: str) -> None:
        self.parts.append(f"<section><h2>{title}</h2>{''.join(texts)}</section>")

    def chart(self, chart: Any) -> str:
        """Return a chart as HTML; its data hold no end of the script."""
        spec, name = json.dumps(chart.to_dict()).replace("</", "<\\/"), f"chart{len(self.parts)}"
        return f'<div id="{name}"></div><script>vegaEmbed("#{name}", {spec})</script>'

    def write(self) -> None:
        """Measure, and add part after part."""
        frame = audit(self.student or self.model, images_of(self.data[0])[:2])
        self.add("What is quantized?", self.verdict(frame), self.missing)
        layers = [layer for layer, is_map in self.maps.items() if is_map]
        if self.student is not None:
            errors = self.errors()
            self.add("Layers", "<p>The network from left to right, with its sums and joins; the redder a layer, the worse. "
                     "A click chooses one. Local: of the layer alone. Accumulated: with the errors of all before it. "
                     f"Channels: the worst {CHANNELS}.</p>", self.chart(layer_explorer(errors, self.layout)))  # fmt: skip
            rows = errors[errors.channel.isna() & (errors["mode"] == "local")].sort_values("sqnr_db")
            frame = frame.merge(rows[["layer", "sqnr_db", *errors.columns.intersection(["kl"])]], "left")
            layers = [layer for layer in rows.layer if self.maps.get(layer)]
        self.add("Ranges and steps", self.chart(range_explorer(measure_ranges(self.model, self.data))))
        few = images_of(self.data[0])[:4]
        samples = measure_activation_samples(self.model, {"given": few}, layers[:MAGNIFIED], 4) if layers else DataFrame()
        if len(samples):
            self.add("Under the microscope", f"<p>Activations in front of the {samples.layer.nunique()} worst layers that read "
                     f"maps, of {len(few)} images.</p>", self.chart(distortion_microscope(samples)))  # fmt: skip
        self.add("True bits and sizes", self.sizes(frame), _table(frame[frame.columns.intersection(COLUMNS.split())]))
        if self.layout is not None:
            self.add("What runs in integers?", self.integers())

    def verdict(self, frame: DataFrame) -> str:
        """Say what is quantized, and how much of the output is left."""
        if self.student is None:
            return "<p>Nothing is.</p>"
        self.found |= summarize_audit(frame)
        ours = any(isinstance(module, Quantizer) for module in self.student.modules())
        text = escape(self.found["summary"]) if ours else "Not by granq, which therefore cannot say how many bits it has"
        if self.outputs:
            student: list[Tensor] = []
            running.run(self.student, self.data, "quantized", after=lambda _, output: student.append(output))
            same = torch.cat(self.outputs).argmax(1) == torch.cat(student).argmax(1)
            self.found["agreement"] = 100 * same.double().mean().item()
            text += f". It predicts like the full-precision network on {self.found['agreement']:.1f} % of {len(same)} images"
        return f"<p>{text}.</p>"

    def errors(self) -> DataFrame:
        """Measure layers and their worst channels, and for a classifier what each layer does to the output."""
        students = {self.name: self.student}
        rows, channels = (measure_layer_error(self.model, self.data, students, self.widths, per_channel=c) for c in (False, True))
        if self.outputs and self.layout is not None:
            kl = measure_sensitivity(self.model, self.data, self.student, kinds=["alone"], parts=["both"])
            rows = rows.merge(kl[["layer", "kl"]], "left")
        channels = channels.sort_values("sqnr_db").groupby(["layer", "mode"], sort=False).head(CHANNELS)
        return pd.concat([rows, channels], ignore_index=True)

    def sizes(self, frame: DataFrame) -> str:
        """Say how large the weights are."""
        bits = (frame.weights * frame.bits_per_weight).sum()
        return f"<p>Weights: {frame.weights.sum() * 4 / 1e6:.2f} MB in float32, {bits / 8e6:.2f} MB as they are here, scales included.</p>"

    def integers(self) -> str:
        """Say which layers become integer convolutions: of the student, or of the network under scheme foldable."""
        folds = any(place.fold for place in activation_places(self.student).values())
        student = self.student if folds else prepare(self.model, "foldable", self.widths, self.data)
        start = "" if folds else "Not these scales, which are of single images or of other places. Under <code>foldable</code>: "
        try:
            twin = integer_model(student)
        except UserError as error:
            return f"<p>{start}{escape(str(error))}.</p>"
        layers = sum(isinstance(module, IntegerLayer) for module in twin.modules())
        norms = [sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (student, twin)]
        return (f"<p>{start}all {layers} layers become integer convolutions with sums in int32, and {norms[0] - norms[1]} of {norms[0]} "
                "BatchNorms fold into their rescale. Everything else stays floating point.</p>")  # fmt: skip


def _table(frame: DataFrame, **options: Any) -> str:
    return f'<div class="table">{frame.to_html(index=False, border=0, float_format="{:.3g}".format, **options)}</div>'
