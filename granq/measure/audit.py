"""What a quantized model really quantizes: one row per layer, measured on its weights and on one forward."""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from granq import convert
from granq.convert import ActQuantizer, WeightQuantizer
from granq.errors import UserError
from granq.graph import LAYERS, module_of
from granq.hooks import eval_mode
from granq.measure import running
from granq.packed import PackedWeight
from granq.quantizer import min_max

QUANTIZED_DB = 60.0  #: above this SQNR a weight is not quantized: 8 bits give about 50 dB, untouched kernels 150
# After these a quantized value still lies on its grid; averages, sums and BatchNorm leave it.
_KEEP_GRID = (nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.PixelShuffle, nn.ChannelShuffle)
_METHODS = set("flatten view reshape permute transpose squeeze unsqueeze contiguous chunk split".split())
_FUNCTIONS = {getattr(torch, name, None) for name in _METHODS} | {F.max_pool2d, F.dropout, operator.getitem}
_JOINS = {torch.cat, torch.concat, torch.stack}
_SCALE_BITS = 64  # a float32 scale and a 32-bit zero point per group
_KINDS = (*LAYERS, nn.modules.conv._ConvNd)
Place = tuple[str, ActQuantizer]


@torch.no_grad()
def audit(model: nn.Module, example: Tensor) -> pd.DataFrame:
    """Measure every convolution, every linear layer and every other tensor of weights of ``model``, none skipped.

    Args:
        model: a model from ``quantize_model``, or any other (whose layers then count as not quantized). It stays as it
            is; tracked ranges that are still unset are those of ``example``.
        example: images (N, 3, H, W); one forward counts multiply-accumulates and scales.

    Returns:
        Columns layer, type, weight_shape, weights (count), macs (per image, over all calls), weight_granularity ("" if
        full precision), levels (distinct values in the worst group, zero spread aside), weight_sqnr_db (infinite if
        untouched), input_quantized (place, "" if full precision), scales (of the weight), bits_per_weight and
        bits_per_activation (**true** bits: codes, and a 32-bit scale and zero point per group; 32 if not quantized),
        weight_bits and act_bits (nominal, 0 if full precision), low_bit (weights and input both really quantized),
        status ("", or: grouped, depthwise, transposed: not quantized, shared with <name>, not reached (not called,
        though its weight may be read), not a layer: not quantized; of the latter two MACs are not counted),
        weight_share, macs_share (0 to 1).
    """
    names = [n for n, m in model.named_modules() if isinstance(m, (*_KINDS, ActQuantizer))]  # of two names the first
    if not names:
        raise UserError(f"{type(model).__name__} has no convolution or linear layer to audit")
    seen: dict[nn.Module, Any] = {}  # of a layer MACs of all images, of a quantizer scales for each value

    def visit(name: str, x: Tensor, output: Tensor) -> None:
        module: Any = model.get_submodule(name)
        if isinstance(module, ActQuantizer):
            seen[module] = min_max(module.groups(x), module.granularity)[0].numel() / x.numel()
        else:  # every output is a sum over the kernel of its group
            sums = x if getattr(module, "transposed", False) else output
            seen[module] = seen.get(module, 0) + sums.numel() * module.weight[0].numel()

    unset = any(place.tracked and not place.seen for place in convert.activation_places(model).values())
    before = {name: value.clone() for name, value in model.state_dict().items()} if unset else {}
    with eval_mode(model), convert.frozen_ranges(model):
        try:
            if unset:
                convert.calibrate(model, [example])
            images = running.run(model, [example], "audit", names, visit)
            frame = pd.DataFrame(_rows(model, seen, images))
        finally:
            model.load_state_dict(before, strict=False)
    frame["weight_share"] = frame.weights / max(frame.weights.sum(), 1)
    frame["macs_share"] = frame.macs / max(frame.macs.sum(), 1)
    return frame


def summarize_audit(frame: pd.DataFrame) -> dict[str, Any]:
    """Return percentages (weights_low_bit, macs_low_bit, weights_not_quantized), layer counts and a sentence."""
    weights = 100 * frame.weight_share[frame.weight_sqnr_db < QUANTIZED_DB].sum()
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


def _rows(model: nn.Module, seen: dict[nn.Module, Any], images: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer, and for weights that belong to none, such as those of attention and embeddings."""
    sources, first = _sources(model), dict[nn.Module, str]()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _KINDS):
            row = _layer_row(name, layer, sources.get(layer), seen)
            if first.setdefault(layer, name) == name:
                yield row | {"macs": seen.get(layer, 0) // images, "status": _status(layer, layer in seen)}
            else:  # counted under its first name only
                yield row | {"weights": 0, "status": f"shared with {first[layer]}"}
    owners = [m for m in model.modules() if isinstance(m, (*_KINDS, WeightQuantizer, ActQuantizer))]
    known = {id(p) for module in owners for p in module.parameters()}
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in known:
            yield _row(name, "Parameter", weight) | {"status": "not a layer: not quantized"}


def _row(name: str, kind: str, weight: Tensor) -> dict[str, Any]:
    """Return a row of weights in full precision."""
    row = dict(layer=name, type=kind, weight_shape="x".join(map(str, weight.shape)), weights=weight.numel(), macs=0)
    row |= dict(weight_granularity="", levels=0, weight_sqnr_db=math.inf, input_quantized="", scales=0)
    row |= dict(bits_per_weight=32.0, bits_per_activation=32.0, weight_bits=0, act_bits=0, low_bit=False, status="")
    return row


def _layer_row(name: str, layer: Any, source: Place | None, seen: dict[nn.Module, Any]) -> dict[str, Any]:
    weight, quantizer = layer.weight, convert.weight_quantizer(layer)
    row = _row(name, type(layer).__name__.removeprefix("Parametrized"), weight)
    if quantizer:
        original = convert.original_weight(layer)
        groups = min_max(original, quantizer.granularity)[0].numel()
        sqnr = running.sqnr_db(original, weight, tuple(range(weight.dim()))).item()
        sqnr = quantizer.sqnr_db if isinstance(quantizer, PackedWeight) else sqnr
        row |= dict(weight_granularity=quantizer.granularity, weight_bits=quantizer.bits, scales=groups)
        # a folded weight has its levels in units of the input steps, which are 1 otherwise
        row |= dict(levels=_levels(weight * quantizer.input_step(original), groups), weight_sqnr_db=sqnr)
        if sqnr < QUANTIZED_DB:
            row["bits_per_weight"] = quantizer.bits + _SCALE_BITS * groups / weight.numel()
    if source:
        row["input_quantized"], place = source
        row |= dict(act_bits=place.bits, bits_per_activation=place.bits + _SCALE_BITS * seen[place])
        row["low_bit"] = row["weight_sqnr_db"] < QUANTIZED_DB
    return row


def _levels(weight: Tensor, groups: int) -> int:
    """Count distinct values in the group that has most; equal up to one part in 10^4 of the group's range."""
    rows = running.where_float64_is(weight.reshape(groups, -1)).double()
    step = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)).clamp_min(1e-30) * 1e-4
    return int(((rows.sort(1).values.diff(dim=1) > step).sum(1) + 1).max())


def _status(layer: Any, reached: bool) -> str:
    if not reached:
        return "not reached"
    if not isinstance(layer, LAYERS):
        return "transposed: not quantized" if layer.transposed else "not quantized"
    groups = getattr(layer, "groups", 1)
    return "" if groups == 1 else "depthwise" if groups == layer.in_channels else "grouped"


def _sources(model: nn.Module) -> dict[nn.Module, Place]:
    """Return the place whose grid every layer reads; those that read off the grid in one of their calls are absent."""

    def grid(node: fx.Node) -> Place | None:
        module = module_of(model, node)
        if isinstance(module, ActQuantizer):
            return str(node.target).removeprefix("act_quant."), module
        if node.target in _JOINS:
            return _widest([grid(part) for part in node.all_input_nodes])
        kept = isinstance(module, _KEEP_GRID) or (node.op == "call_method" and node.target in _METHODS)
        return grid(node.all_input_nodes[0]) if kept or node.target in _FUNCTIONS else None

    found: dict[nn.Module, list[Place | None]] = {}
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        layer = module_of(model, node)
        if isinstance(layer, LAYERS):
            found.setdefault(layer, []).append(grid(node.all_input_nodes[0]))
    return {layer: widest for layer, inputs in found.items() if (widest := _widest(inputs))}


def _widest(places: Sequence[Place | None]) -> Place | None:
    """Return the place with most bits; none if one is off the grid."""
    return max(places, key=lambda place: place[1].bits if place else math.inf)
