"""What a quantized model really quantizes: one row per layer, measured on its weights and on its activations."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from granq import convert
from granq.convert import ActQuantizer, Quantizer, WeightQuantizer
from granq.errors import UserError
from granq.hooks import eval_mode, watch
from granq.measure import running
from granq.packed import PackedWeight
from granq.plain import LAYERS
from granq.quantizer import min_max

QUANTIZED_DB = 60.0  #: above this SQNR nothing is quantized: 8 bits give about 50 dB, untouched values 150
_SCALE_BITS = 64  # a float32 scale and a 32-bit zero point per group
_KINDS = (*LAYERS, nn.modules.conv._ConvNd)
Measured = tuple[int, int, float, bool]  #: what a quantizer did: values per scale, levels, SQNR (dB), does it round


@torch.no_grad()
def audit(model: nn.Module, example: Tensor) -> pd.DataFrame:
    """Measure every convolution, linear layer and other tensor of weights of ``model``, and other matrix products.

    Args:
        model: a model from ``quantize_model``, or any other (whose layers then count as not quantized). It stays as it
            is; tracked ranges that are still unset are those of ``example``.
        example: images (N, 3, H, W), on which activations are measured and multiply-accumulates counted.

    Columns of the layer: layer, type, weight_shape, weights (count), macs (per image, over all calls), weight_share and
    macs_share (of all, 0 to 1), low_bit (weight and input are quantized), status ("", or: grouped, depthwise,
    transposed: not quantized, shared with <name>, not reached (not called, though its weight may be read), not a layer:
    not quantized, for weights and for the products of attention).

    Of its weight: weight_granularity ("" if full precision), scales (how many), weight_bits (nominal, 0 if full
    precision), levels (distinct values in the worst group, zero spread aside), weight_sqnr_db (infinite if untouched),
    weight_quantized (as measured: a scale for one value rounds nothing), bits_per_weight.

    Of its input: input_quantized (the place of the graph that quantizes it, "" if full precision), values_per_scale,
    act_bits, act_levels, act_sqnr_db, act_quantized (likewise), bits_per_activation. Bits per weight and activation are
    **true** ones: codes, and a 32-bit scale and zero point per group, unless it is a static one of activations; 32 if
    not quantized.
    """
    if not any(isinstance(module, _KINDS) for module in model.modules()):
        raise UserError(f"{type(model).__name__} has no convolution or linear layer to audit")
    if (weight := next(model.parameters())).dtype.itemsize < 4:  # so few values do not tell where they come from
        raise UserError(f"the audit needs float32, got {weight.dtype}: pass model.float()")
    if not (example := example.to(weight.device)).isfinite().all():  # NaN comes from nowhere
        raise UserError("the example holds values that are not finite")
    if any(place.tracked and not place.seen for place in convert.activation_places(model).values()):
        model = copy.deepcopy(model)  # the ranges of the original stay unset
        convert.calibrate(model, [example])
    with eval_mode(model):
        frame = pd.DataFrame(_rows(model, _forward(model, example), _multiply_adds(model, example)))
    frame["macs"] //= len(example)
    frame["weight_share"] = frame.weights / max(frame.weights.sum(), 1)
    frame["macs_share"] = frame.macs / max(frame.macs.sum(), 1)
    return frame


def summarize_audit(frame: pd.DataFrame) -> dict[str, Any]:
    """Return what ``audit`` found in numbers and in a sentence.

    Percentages weights_low_bit, macs_low_bit, weights_not_quantized, macs_not_quantized; true bits per weight and per
    activation (mean over the operands of all multiply-adds); layers, layers_input_quantized (counts).
    """
    weights = 100 * frame.weight_share[frame.weight_quantized].sum()
    bits = sorted(set(frame.weight_bits[frame.weight_bits > 0])) or ["low"]
    wide = frame.low_bit & (frame.act_bits > frame.act_bits[frame.low_bit].min())  # an image with bits of its own
    own = len(bits) > 1 or frame.act_bits[frame.low_bit].nunique() > 2  # each layer has its own
    mixed = own and frame.low_bit.any()
    wide &= not mixed
    macs = 100 * frame.macs_share[frame.low_bit & ~wide].sum()
    true = float((frame.bits_per_weight * frame.weight_share).sum())
    text = "" if (frame.weight_bits + frame.act_bits).any() else "no quantizer of granq is in it, others are not seen; "
    text += f"a weight takes {true:.1f} true bits; {weights:.1f} % of weights and the operands of {macs:.1f} % of MACs "
    text += f"really have {'/'.join(map(str, bits))} bits"
    if mixed:
        low = frame[frame.low_bit]
        average = (np.average(low.weight_bits, weights=low.weights), np.average(low.act_bits, weights=low.macs))
        text += ", on average {:.2f} and {:.2f}".format(*average)
    if wide.any():
        text += f", {100 * frame.macs_share[wide].sum():.1f} % on inputs of {frame.act_bits[wide].max()} bits"
    off = frame[~frame.low_bit & (frame.macs > 0)].sort_values("macs_share", ascending=False, kind="stable")
    kinds = ("outside of layers", "on weights in full precision", "on inputs in full precision")
    what = np.select([off.weights == 0, off.act_quantized, off.weight_quantized], kinds, "on both in full precision")
    for i, (kind, rows) in enumerate(off.groupby(what, sort=False)):
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        text += f"{', ' if i else '; not quantized: '}{100 * rows.macs_share.sum():.1f} % of MACs {kind}"
        text += f" ({rows.layer.iloc[0]}{more})"
    if uncalled := int(((frame.macs == 0) & (frame.weights > 0)).sum()):
        text += f"; {uncalled} tensors of weights belong to no layer that is called"
    return {
        "weights_low_bit": float(weights),
        "macs_low_bit": float(macs),
        "weights_not_quantized": float(100 * frame.weight_share[~frame.weight_quantized].sum()),
        "macs_not_quantized": float(100 * off.macs_share.sum()),
        "true_bits_per_weight": true,
        "true_bits_per_activation": float((frame.bits_per_activation * frame.macs_share).sum()),
        "layers": int((~frame.type.isin(["products", "Parameter"])).sum()),
        "layers_input_quantized": int(frame.act_quantized.sum()),
        "summary": text,
    }


def _measure(quantizer: Quantizer, x: Tensor, value: Tensor) -> Measured:
    """Compare what enters and what leaves a quantizer: (N, C, H, W), (N, F) or a weight."""
    groups = min_max(x, quantizer.granularity)[0]
    kept = [dim for dim, size in enumerate(groups.shape) if size > 1]
    order = [*range(len(kept))]
    before, after = (t.movedim(kept, order).reshape(groups.numel(), -1).cpu() for t in (x, value))
    ordered = np.sort(after.numpy(), 1)  # several times as fast as torch's; up to 10^-4 of their range values are equal
    step = 1e-4 * np.maximum(ordered[:, -1:] - ordered[:, :1], 1e-30)
    levels = 1 + int((np.diff(ordered, axis=1) > step).sum(1).max())
    count, spread = before.shape[1], before - before.amin(1, keepdim=True)  # an offset of all is no signal
    if levels <= 2**quantizer.bits + 1 < count:  # on a grid, even if a dead channel left nothing to round
        really = True
    elif spread.any():
        really = running.sqnr_db(spread, spread + after - before) < QUANTIZED_DB
    else:  # a single value under its own scale is not rounded; a tracked range also serves other images
        really = count > 1 or getattr(quantizer, "tracked", False)
    return count, levels, running.sqnr_db(before, after), really


def _forward(model: nn.Module, images: Tensor) -> dict[nn.Module, tuple[ActQuantizer, Measured] | None]:
    """Return for every layer that is reached the place whose values it reads; ``None`` if a call of it reads others.

    Of several places it is the one with most bits.
    """
    places: dict[ActQuantizer, Measured] = {}
    grids: dict[ActQuantizer, np.ndarray] = {}
    inputs: dict[nn.Module, list[list[ActQuantizer]]] = {}

    def visit(name: str, x: Tensor, output: Tensor) -> None:
        module = model.get_submodule(name)
        if isinstance(module, ActQuantizer):
            places[module] = _measure(module, module.groups(x), module.groups(output))
            grids[module] = np.append(grids.pop(module, ()), np.unique(output.cpu()))
        else:
            inputs.setdefault(module, []).append(_origins(x, grids))

    def widest(calls: list[list[ActQuantizer]]) -> tuple[ActQuantizer, Measured] | None:
        found = [(place, places[place]) for call in calls for place in call]
        return max(found, key=lambda one: (not one[1][-1], one[0].bits)) if all(calls) else None

    names = [n for n, m in model.named_modules() if isinstance(m, (*_KINDS, ActQuantizer))]  # of two names the first
    running.run(model, [images], "audit", names, visit)
    return {layer: widest(calls) for layer, calls in inputs.items()}


def _origins(x: Tensor, grids: dict[ActQuantizer, np.ndarray]) -> list[ActQuantizer]:
    """Return the places that gave all values of ``x``: views, maxima, joins and zero padding, but no averages."""
    left, found = np.unique(x.cpu()), list[ActQuantizer]()
    left = left[left != 0] if left.any() else left
    if not np.isin(left, np.concatenate([left[:0], *grids.values()])).all():
        return found
    while len(left):  # first the place with most of these values, the latest of equals, then the next for the rest
        hits = {place: np.isin(left, grid) for place, grid in reversed(grids.items())}
        found.append(max(hits, key=lambda place: int(hits[place].sum())))
        left = left[~hits[found[-1]]]
    return found


def _multiply_adds(model: nn.Module, images: Tensor) -> Counter[str]:
    """Count the multiply-adds of a forward by the name of the innermost module that computes them."""
    counts, inside = Counter[str](), [""]

    def enter(name: str, *call: Any) -> None:
        counts[inside[-1]] += counter.get_total_flops() // 2 - counts.total()
        inside.append(name)

    def leave(*call: Any) -> None:
        enter("")
        del inside[-2:]

    class Nodes(fx.Interpreter):
        """Give what was traced through the forward of a module back to it."""

        def run_node(self, n: fx.Node) -> Any:
            enter([name for name, _ in [("", None), *n.meta.get("nn_module_stack", {}).values()]][-1])
            value = super().run_node(n)
            leave()
            return value

    names, fast = [name for name, _ in model.named_modules() if name], mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # the counter knows neither it nor fused kernels of attention and of an LSTM
    try:
        fused = mkldnn.flags(enabled=False, allow_tf32=None), cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
        with fused[0], fused[1], fused[2], FlopCounterMode(display=False) as counter:
            with watch(model, names, enter, before=True), watch(model, names, leave):
                (Nodes(model).run if isinstance(model, fx.GraphModule) else model)(images)
            enter("")
    finally:
        mha.set_fastpath_enabled(fast)
    return counts


def _rows(
    model: nn.Module, sources: dict[nn.Module, tuple[ActQuantizer, Measured] | None], macs: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer, then for weights that belong to none, and for products that happen in none."""
    first, names = dict[nn.Module, str](), {place: n for n, place in convert.activation_places(model).items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _KINDS):
            row = _row(name, type(layer).__name__.removeprefix("Parametrized"), layer.weight) | _of_weight(layer)
            if source := sources.get(layer):
                row |= dict(input_quantized=names[source[0]], act_bits=source[0].bits)
                row["values_per_scale"], row["act_levels"], row["act_sqnr_db"], row["act_quantized"] = source[1]
                if row["act_quantized"]:  # a static scale is kept once, whatever the number of images
                    per_value = 0 if source[0].tracked else _SCALE_BITS / row["values_per_scale"]
                    row["bits_per_activation"] = row["act_bits"] + per_value
            row["low_bit"] = row["weight_quantized"] and row["act_quantized"]
            if first.setdefault(layer, name) == name:
                yield row | {"macs": macs[name], "status": _status(layer, layer in sources)}
            else:  # counted under its first name only
                yield row | {"weights": 0, "status": f"shared with {first[layer]}"}
    owners = [m for m in model.modules() if isinstance(m, (*_KINDS, WeightQuantizer, ActQuantizer))]
    known = {id(p) for module in owners for p in module.parameters()}
    rest = [_row(n, "Parameter", p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in known]
    for name in macs:
        if macs[name] and not isinstance(model.get_submodule(name), _KINDS):
            rest.append(_row(name or type(model).__name__, "products", torch.empty(0)) | {"macs": macs[name]})
    yield from (row | {"status": "not a layer: not quantized"} for row in rest)


def _row(name: str, kind: str, weight: Tensor) -> dict[str, Any]:
    """Return a row in full precision."""
    row = dict(layer=name, type=kind, weight_shape="x".join(map(str, weight.shape)), weights=weight.numel(), macs=0)
    row |= dict(weight_granularity="", levels=0, weight_sqnr_db=math.inf, input_quantized="", scales=0)
    row |= dict(bits_per_weight=32.0, bits_per_activation=32.0, weight_bits=0, act_bits=0)
    row |= dict(values_per_scale=0, act_levels=0, act_sqnr_db=math.inf, weight_quantized=False, act_quantized=False)
    return row | dict(low_bit=False, status="")


def _of_weight(layer: Any) -> dict[str, Any]:
    """Return what a row says of a quantized weight; a folded one has its levels in units of the input steps."""
    quantizer, original, weight = convert.weight_quantizer(layer), convert.original_weight(layer), layer.weight
    if quantizer is None:
        return {}
    row = dict(weight_granularity=quantizer.granularity, weight_bits=quantizer.bits)
    row["weight_sqnr_db"] = running.sqnr_db(original, weight)
    step = quantizer.input_step(original)
    values, row["levels"], _, row["weight_quantized"] = _measure(quantizer, original * step, weight * step)
    if isinstance(quantizer, PackedWeight):  # what was quantized is gone: the file says how well
        row |= {"weight_sqnr_db": quantizer.sqnr_db, "weight_quantized": quantizer.grid is not None}
    bits = quantizer.bits + _SCALE_BITS / values if row["weight_quantized"] else 32.0
    return row | dict(scales=weight.numel() // values, bits_per_weight=bits)


def _status(layer: Any, reached: bool) -> str:
    if not reached:
        return "not reached"
    if not isinstance(layer, LAYERS):
        return "transposed: not quantized" if layer.transposed else "not quantized"
    groups = getattr(layer, "groups", 1)
    return "" if groups == 1 else "depthwise" if groups == layer.in_channels else "grouped"
