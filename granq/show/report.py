"""One page about any network: what quantization does to it, layer by layer, in a file that needs no network."""

import copy
from collections.abc import Iterable
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import torch
import vl_convert
from pandas import DataFrame
from torch import Tensor, nn

from granq.convert import Quantizer, activation_places, check_copy
from granq.data import predictions
from granq.devices import commit, own_random_state, versions
from granq.errors import UserError
from granq.files import save_atomically
from granq.graph import layer_names
from granq.hooks import Batch, images_of, labels_of
from granq.integer import IntegerLayer, integer_model
from granq.match import random_shapes
from granq.measure import running
from granq.measure.activations import measure_activation_samples, measure_ranges
from granq.measure.audit import audit, summarize_audit
from granq.measure.layer_error import measure_layer_error
from granq.measure.sensitivity import measure_sensitivity, prepare
from granq.schemes import Scheme, check_bits, get_scheme
from granq.show.explorers.layers import layer_explorer, network_layout, range_explorer
from granq.show.explorers.rounding import distortion_microscope

BATCH, CHANNELS, MAGNIFIED = 16, 128, 6  # images at once; of each layer the worst channels; layers to look into
COLUMNS = "layer sqnr_db kl bits_per_weight bits_per_activation act_levels macs_share weight_shape status".split()
PAGE = Path(__file__).with_suffix(".html")


def report(
    model: nn.Module, batches: Iterable[Batch] = (), *, out: str | Path, scheme: str | Scheme | nn.Module = "granq",
    bits: int | tuple[int, int] = 3, images: int = 64, image_size: int = 224, facts: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write one HTML page about a network under quantization, charts and all.

    Args:
        model: the full-precision network. What needs a trace is left out, and the page says so, if there is none.
        batches: images (N, 3, H, W), with labels for accuracies; or none: ``random_shapes`` of ``image_size``.
        out: the file, which is new.
        scheme: name or scheme; or the quantized network, a student or somebody else's, whose layers have the names of
            those of ``model``.
        bits: width, or (weights, activations); without meaning for a network that is quantized already.
        images: how many at most, the first ones.
        facts: provenance, at the end of the page; ``network`` and ``quantized`` also name both in its title.

    Returns what the page says in numbers: images, agreement and accuracies (percent of them), ``summarize_audit``,
    bytes. Raises UserError if ``out`` exists, or for an unknown scheme or width.
    """
    out, widths = Path(out), (bits, bits) if isinstance(bits, int) else bits
    if out.exists():
        raise UserError(f"{out} already exists; choose another file")
    name: Any = scheme if isinstance(scheme, str) else type(scheme).__name__
    if not isinstance(scheme, nn.Module):
        scheme, name = get_scheme(scheme), f"{name} W{check_bits(widths[0])}A{check_bits(widths[1])}"
    drawn, labels, source = list[Tensor](), list[Tensor](), "images"
    for batch in batches:
        drawn += images_of(batch)[: images - len(drawn)]
        if (given := labels_of(batch)) is not None:
            labels += given[: images - len(labels)]
        if len(drawn) == images:
            break
    if not drawn:
        with own_random_state(str(next(model.parameters()).device)):
            torch.manual_seed(0)
            drawn, source = list(random_shapes(images, image_size)), "random shapes, seed 0"
    data = list(torch.stack(drawn).split(BATCH))
    told = {"network": type(model).__name__, "quantized": name} | (facts or {})
    told |= {"images": f"{len(drawn)} {source}", "granq": version("granq")}
    parts, found = _measure(model, data, labels, scheme, widths, told)
    if isinstance(scheme, Scheme) and scheme.tracked:
        told["static ranges"] = f"a moving average over these images in batches of {BATCH}"
    told |= {"commit": commit()} | versions(str(next(model.parameters()).device))
    parts["facts"] = DataFrame(told.items()).to_html(index=False, header=False, border=0, classes="facts")
    parts |= dict(channels=CHANNELS, script=vl_convert.javascript_bundle())  # type: ignore[call-arg]
    title = escape(f"What quantization does to {told['network']}: {told['quantized']}")
    text = Template(PAGE.read_text(encoding="utf-8")).substitute(parts, title=title)
    save_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    return found | {"bytes": out.stat().st_size}


def _measure(
    model: nn.Module, data: list[Tensor], labels: list[Tensor], scheme: Scheme | nn.Module, widths: tuple[int, int],
    told: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Return the parts of the page and its numbers."""
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UserError("the network is quantized already: give the full-precision one, and this one as scheme")
    try:
        logits = _logits(model, data)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the network cannot take images {tuple(data[0].shape)}: {error}") from error
    try:
        layout, missing = network_layout(model), "No"
    except UserError as error:
        layout, missing = None, f"Not known: {escape(str(error))}"
    student: Any = scheme if isinstance(scheme, nn.Module) else None
    if isinstance(scheme, Scheme) and layout is not None:
        student = prepare(model, scheme, widths, data)
        check_copy(student, model, data[0][:2])
    ours = student is not None and any(isinstance(module, Quantizer) for module in student.modules())
    frame = audit(student if ours else model, data[0])
    found: dict[str, Any] = {"images": told["images"]} | (summarize_audit(frame) if ours else {})
    parts = {"layers": missing, "microscope": "No layer does.", "verdict": "Nothing is quantized here"}
    places = [place for place in activation_places(student).values() if place.granularity] if ours else []
    start = (places[-1].bits, places[-1].granularity) if places else (3, "per_tensor")
    parts["ranges"] = _chart(range_explorer(measure_ranges(model, data), start[0]))
    if student is not None:
        parts["verdict"] = f"Here {escape(found['summary'])}" if ours else "Somebody else quantized it, in unknown bits"
        if logits is not None:
            found |= _answers(logits, _logits(student, data), labels)
            said = ". It predicts like the full-precision network on {agreement:.1f} % of " + told["images"]
            said += ". It has {top1:.1f} % of them right, that network {full_precision_top1:.1f} %" * bool(labels)
            parts["verdict"] += said.format(**found)
        rows = _errors(model, data, student, told["quantized"], layout is not None and logits is not None)
        parts["layers"] = _chart(layer_explorer(rows, layout))
        frame = frame.merge(rows[rows.channel.isna() & (rows["mode"] == "local")], "left", "layer")
    convs = [name for name in layer_names(model) if isinstance(model.get_submodule(name), nn.Conv2d)]
    maps = frame[frame.layer.isin(convs) & (frame.macs > frame.weights)]  # several values of each channel
    if len(maps):
        worst = maps.sort_values("sqnr_db") if "sqnr_db" in maps else maps
        samples = measure_activation_samples(model, {"given": data[0][:4]}, [*worst.layer[:MAGNIFIED]], 4)
        parts["microscope"] = _chart(distortion_microscope(samples, *start))
    size, true = frame.weights.sum() * 4e-6, (frame.weights * frame.bits_per_weight).sum() / 8e6
    parts["sizes"] = f"Weights: {size:.2f} MB in float32" + f", {true:.2f} MB as they are here" * ours
    table = frame[[column for column in COLUMNS if column in frame]]
    parts["table"] = table.to_html(index=False, border=0, float_format="{:.3g}".format)
    parts["integers"] = missing if layout is None else _integers(student)
    return parts, found


def _logits(model: nn.Module, data: list[Tensor]) -> Any:
    """Return the output of a classifier (N, K), and ``None`` of other networks."""
    outputs = list[Any]()
    running.run(model, data, "outputs", after=lambda _, output: outputs.append(output))
    classifies = isinstance(outputs[0], Tensor) and outputs[0].dim() == 2 and outputs[0].shape[1] > 1
    return torch.cat(outputs) if classifies else None


def _answers(full: Tensor, own: Tensor, labels: list[Tensor]) -> dict[str, float]:
    """Return in percent how often two networks agree, and how often each is right, from logits (N, K)."""
    kept, mine = predictions(full).cpu(), predictions(own).cpu()
    pairs = {"agreement": (mine, kept)}
    if labels:
        truth = torch.stack(labels).cpu()
        pairs |= {"top1": (mine, truth), "full_precision_top1": (kept, truth)}
    return {key: 100 * (a == b).float().mean().item() for key, (a, b) in pairs.items()}


def _errors(model: nn.Module, data: list[Tensor], student: nn.Module, name: str, with_kl: bool) -> DataFrame:
    """Return errors of layers and of their worst channels, and what each layer alone does to the output."""
    frame = measure_layer_error(model, data, {name: student}, per_channel=True)
    layers, channels = frame[frame.channel.isna()], frame[frame.channel.notna()]
    if with_kl:
        kl = measure_sensitivity(model, data, student, kinds=["alone"], parts=["both"])
        layers = layers.merge(kl[["layer", "kl"]], "left")
    channels = channels.sort_values("sqnr_db").groupby(["layer", "mode"], sort=False).head(CHANNELS)
    return pd.concat([layers, channels], ignore_index=True)


def _integers(student: Any) -> str:
    """Say what becomes of the layers of a foldable student."""
    if not any(place.fold for place in activation_places(student).values()):
        return "Nothing: these scales do not fold, as those of scheme foldable do"
    try:
        twin = integer_model(copy.deepcopy(student).cpu())
    except UserError as error:
        return escape(str(error))
    layers = sum(isinstance(module, IntegerLayer) for module in twin.modules())
    norms, left = (sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (student, twin))
    text = f"{layers} layers compute in integers with sums in int32; {norms - left} of {norms} BatchNorms"
    return f"{text} are part of their rescale. All else stays floating point"


def _chart(chart: Any) -> str:
    spec, name = chart.to_json(indent=None).replace("</", "<\\/"), chart.title.replace(" ", "-").strip("?")
    return f'<div id="{name}"></div><script>vegaEmbed("#{name}", {spec})</script>'
