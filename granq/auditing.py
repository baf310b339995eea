"""What a quantized model really quantizes: one row per layer, measured on its weights and on one forward."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.analysis import layer_calls, sqnr_db, where_float64_is
from granq.checks import forward, needs, typed
from granq.convert import LAYERS, ActQuantizer, Quantizer, WeightQuantizer, activation_places, frozen_ranges
from granq.quantizer import min_max

QUANTIZED_DB = 60.0
"""Above this SQNR a weight is not quantized: 8 bits give about 50 dB, an untouched 1x1 kernel about 150 dB."""

# Behind these a quantized value still lies on its grid; averages, sums and BatchNorm leave it.
_KEEP_GRID = (nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.PixelShuffle, nn.ChannelShuffle)
_KEEP_GRID_METHODS = set("flatten view reshape permute transpose squeeze unsqueeze contiguous chunk split".split())
_KEEP_GRID_FUNCTIONS = {getattr(torch, name) for name in _KEEP_GRID_METHODS if hasattr(torch, name)}
_KEEP_GRID_FUNCTIONS |= {F.max_pool2d, F.dropout, operator.getitem}
_JOINS = {torch.cat, torch.concat, torch.stack}
_SCALE_BITS = 64  # a float32 scale and a 32-bit zero point per group


@typed
def audit(model: nn.Module, example: Tensor) -> pd.DataFrame:
    """One row per convolution and linear layer of ``model`` and per other tensor of weights, none skipped.

    Args:
        model: a model from ``quantize_model``, or any other (whose layers then count as not quantized).
        example: images (N, 3, H, W); one forward counts multiply-accumulates and scales. Tracked ranges that are
            still unset are set by this forward and cleared again; ``model`` stays as it is.

    Returns:
        Columns
            layer, type, weight_shape, weights (count), macs (per image, over all calls),
            weight_granularity ("" if full precision), levels (distinct values in the worst group, zero spread aside),
            weight_sqnr_db (infinite if untouched), input_quantized (place, "" if the input is full precision),
            scales (weight scales of the layer), bits_per_weight and bits_per_activation (**true** bits: codes, and a
            32-bit scale and 32-bit zero point per group; 32 if not quantized), weight_share, macs_share (0 to 1),
            weight_bits and act_bits (nominal, 0 if full precision), low_bit (weights and input both really quantized),
            status ("", or: grouped, depthwise, transposed: not quantized, shared with <name>, not reached (not called,
            though its weight may be read), not a layer: not quantized; of the latter two MACs are not counted).

    Raises:
        ValueError: the model has no convolution or linear layer.
    """
    kinds = (*LAYERS, nn.modules.conv._ConvNd)
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to audit")
    macs: dict[nn.Module, list[int]] = {}  # of every call
    scales: dict[ActQuantizer, float] = {}  # for each value

    def note(name: str, x: Tensor, output: Tensor) -> None:
        module = model.get_submodule(name)
        if isinstance(module, ActQuantizer):
            grouped = module.groups(x)
            scales[module] = min_max(grouped, module.granularity)[0].numel() / max(x.numel(), 1)
        else:
            macs.setdefault(module, []).append(_macs(module, x, output) // max(len(example), 1))

    places = activation_places(model).values()
    unset = [q for q in places if q.tracked and not q.seen]
    once = [n for n, m in model.named_modules() if isinstance(m, (*kinds, ActQuantizer))]  # of two names the first
    try:
        with torch.no_grad(), frozen_ranges(model), layer_calls(model, once, note):
            for quantizer in unset:
                quantizer.frozen = False
            forward(model, example)
            sources = _sources(model)
            first: dict[nn.Module, str] = {}
            rows = [_row(n, m, macs.get(m, []), sources, scales, first) for n, m in found]
            rows += _other_weights(model, found)
    finally:
        for quantizer in unset:
            quantizer.running_min = quantizer.running_max = quantizer.running_min.new_empty(0)
    frame = pd.DataFrame(rows)
    for count, share in (("weights", "weight_share"), ("macs", "macs_share")):
        frame[share] = frame[count] / max(frame[count].sum(), 1)
    return frame


@needs("weights macs weight_sqnr_db weight_share macs_share low_bit weight_bits act_bits bits_per_weight")
def summarize_audit(frame: pd.DataFrame) -> dict[str, Any]:
    """Shares in percent (weights_low_bit, macs_low_bit, weights_not_quantized), layer counts, a summary sentence."""
    quantized = frame.weight_sqnr_db < QUANTIZED_DB
    weights = 100 * frame.weight_share[quantized].sum()
    wide = frame.low_bit & (frame.act_bits > frame.act_bits[frame.low_bit].min())  # an image with bits of its own
    macs = 100 * frame.macs_share[frame.low_bit & ~wide].sum()
    bits = sorted(set(frame.weight_bits[frame.weight_bits > 0])) or ["low"]
    text = f"{weights:.1f} % of weights and {macs:.1f} % of MACs really run at {'/'.join(map(str, bits))} bits"
    if wide.any():
        text += f", {100 * frame.macs_share[wide].sum():.1f} % on inputs of {frame.act_bits[wide].max()} bits"
    if uncalled := int(((frame.macs == 0) & (frame.weights > 0)).sum()):
        text += f"; {uncalled} tensors of weights belong to no layer that is called, and their MACs are not counted"
    return {
        "weights_low_bit": float(weights),
        "macs_low_bit": float(macs),
        "weights_not_quantized": float(100 - weights),
        "true_bits_per_weight": float((frame.bits_per_weight * frame.weight_share).sum()),
        "layers": len(frame),
        "layers_input_quantized": int((frame.input_quantized != "").sum()),
        "summary": text,
    }


def _row(
    name: str,
    layer: Any,  # a convolution or linear layer
    macs: list[int],
    sources: dict[nn.Module, tuple[str, ActQuantizer]],
    scales: dict[ActQuantizer, float],
    first: dict[Any, str],
) -> dict[str, Any]:
    weight = layer.weight.detach()
    counted = first.setdefault(layer, name) == name  # under its first name only
    row = _blank(name, type(layer).__name__.removeprefix("Parametrized"), weight)
    if counted:
        row |= {"weights": weight.numel(), "macs": sum(macs)}
    parametrizations: Any = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else []
    for quantizer in (p for p in parametrizations if isinstance(p, WeightQuantizer)):
        original = parametrizations.original.detach()
        groups = min_max(original, quantizer.granularity)[0].numel()
        # a folded weight has its levels in units of the input steps
        grid = weight if quantizer.source is None else weight * quantizer.input_step(original)
        sqnr = float(sqnr_db(original, weight, tuple(range(weight.dim()))))
        row |= dict(weight_granularity=quantizer.granularity, weight_bits=quantizer.bits, scales=groups)
        row |= dict(levels=_levels(grid, groups), weight_sqnr_db=sqnr)
        if sqnr < QUANTIZED_DB:
            row["bits_per_weight"] = quantizer.bits + _SCALE_BITS * groups / weight.numel()
    if layer in sources:
        row["input_quantized"], source = sources[layer]
        row["act_bits"] = source.bits
        if source in scales:
            row["bits_per_activation"] = source.bits + _SCALE_BITS * scales[source]
    row["low_bit"] = bool(row["weight_sqnr_db"] < QUANTIZED_DB and row["input_quantized"])
    row["status"] = _status(layer, bool(macs)) if counted else f"shared with {first[layer]}"
    return row


def _blank(name: str, kind: str, weight: Tensor) -> dict[str, Any]:
    """A row of weights in full precision."""
    return {
        "layer": name,
        "type": kind,
        "weight_shape": "x".join(map(str, weight.shape)),
        "weights": 0,
        "macs": 0,
        "weight_granularity": "",
        "levels": 0,
        "weight_sqnr_db": float("inf"),
        "input_quantized": "",
        "scales": 0,
        "bits_per_weight": 32.0,
        "bits_per_activation": 32.0,
        "weight_bits": 0,
        "act_bits": 0,
    }


def _status(layer: nn.Module, reached: bool) -> str:
    if not reached:
        return "not reached"
    if not isinstance(layer, LAYERS):
        return "transposed: not quantized" if layer.__class__.__name__.startswith("ConvTr") else "not quantized"
    groups = getattr(layer, "groups", 1)
    return "" if groups == 1 else "depthwise" if groups == layer.in_channels else "grouped"


def _levels(weight: Tensor, groups: int) -> int:
    """Distinct values in the group that has most; equal up to float error, one part in 10^4 of the group's range."""
    rows = where_float64_is(weight.reshape(groups, -1)).double()
    step = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)).clamp_min(1e-30) * 1e-4
    ordered = rows.sort(1).values
    return int(((ordered.diff(dim=1) > step).sum(1) + 1).max())


def _macs(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call: every output is a sum over the kernel of its group."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return x.numel() * weight[0].numel()
    return output.numel() * weight[0].numel()


def _sources(model: nn.Module) -> dict[nn.Module, tuple[str, ActQuantizer]]:
    """The activation place behind whose grid every layer reads; absent are those that read off the grid in a call."""
    if not isinstance(model, fx.GraphModule):
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def grid(value: Any) -> tuple[str, ActQuantizer] | None:
        if not isinstance(value, fx.Node):
            return None
        module = modules.get(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, ActQuantizer):
            return str(value.target).removeprefix("act_quant."), module
        if value.op == "call_function" and value.target in _JOINS:
            return _widest([grid(part) for part in cast(Any, value.args[0])])
        kept = isinstance(module, _KEEP_GRID) or (
            (value.op == "call_function" and value.target in _KEEP_GRID_FUNCTIONS)
            or (value.op == "call_method" and value.target in _KEEP_GRID_METHODS)
        )
        return grid(value.args[0]) if kept and value.args else None

    found: dict[nn.Module, list[tuple[str, ActQuantizer] | None]] = {}
    for node in model.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, LAYERS):
            found.setdefault(layer, []).append(grid(node.args[0] if node.args else node.kwargs.get("input")))
    return {layer: widest for layer, inputs in found.items() if (widest := _widest(inputs))}


def _widest(places: Sequence[tuple[str, ActQuantizer] | None]) -> tuple[str, ActQuantizer] | None:
    """Of several places the one with most bits; none if one of them is off the grid."""
    known = [place for place in places if place]
    return max(known, key=lambda place: place[1].bits) if known and len(known) == len(places) else None


def _other_weights(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> list[dict[str, Any]]:
    """Rows of weights that belong to no convolution or linear layer, such as those of attention and embeddings."""
    scales = [module for module in model.modules() if isinstance(module, Quantizer)]  # their steps, if learned
    known = {id(p) for module in (*(layer for _, layer in layers), *scales) for p in module.parameters()}
    rows = []
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in known:
            row = _blank(name, "Parameter", weight)
            rows.append(row | dict(weights=weight.numel(), low_bit=False, status="not a layer: not quantized"))
    return rows
