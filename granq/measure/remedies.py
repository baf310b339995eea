"""What to do about the layers that cost most: remedies, tried and not guessed, and how many bits each should get."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from granq.convert import layer_quantizers
from granq.errors import UserError, one_of
from granq.hooks import Batch
from granq.measure import running
from granq.measure.sensitivity import Side, compare, full_precision, measure_sensitivity, prepare
from granq.schemes import Scheme, get_scheme

QUANTILE = 0.999  #: of the remedy for static ranges
_FINER = {"per_tensor": "per_channel", "per_channel": "per_sample_channel", "per_sample": "per_sample_channel"}
_FINER_WEIGHTS = {"per_tensor": "per_out_channel", "per_out_channel": "per_kernel"}
BUDGETS = ("average", "bit_operations")


def measure_remedies(
    model: nn.Module, batches: Sequence[Batch], scheme: str | Scheme, bits: int, layers: int | Sequence[str] = 3, *,
    calibration: Sequence[Batch] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Try remedies on one layer at a time: where it is quantized alone, and where the whole network is.

    Args:
        model, batches, scheme, calibration: see ``measure_sensitivity``.
        bits: of weights and activations.
        layers: names, or how many: those with the largest KL when quantized alone.

    Returns:
        Columns layer, remedy ("none", a finer granularity, a range at the quantile 0.999 for static ranges, one or two
        more bits, "left out"), where (alone, whole), kl and the other metrics of ``measure_sensitivity``, recovered
        (share of the KL without remedy that is gone), with labels gained (points of top-1), and of the layer's full-
        precision input and weight in the first batch: channel_ratio (range of the widest channel to the median one),
        input_range and largest_weight (in standard deviations), levels (in use in a channel of an image), depthwise.
    """
    scheme, plain = get_scheme(scheme), full_precision(model)
    warm = batches[:1] if calibration is None else calibration
    if isinstance(layers, int):
        alone = measure_sensitivity(model, batches, scheme, bits, kinds=["alone"], parts=["both"], calibration=warm)
        layers = alone.nlargest(layers, "kl").layer.tolist()
    student, clean, frames = prepare(model, scheme, (bits, bits), warm), Side(plain, None), []
    for remedy, other, widths, quantile in _remedies(scheme, bits):
        cure = prepare(model, other, widths, warm, quantile)
        for where, rest in {"alone": clean, "whole": Side(student, student)}.items():
            own = clean if remedy == "left out" else Side(cure, cure)
            frame = compare(model, batches, student, rest, own, layers, remedy)[:-1]
            frames.append(frame.assign(remedy=remedy, where=where))
    table = pd.concat(frames, ignore_index=True)
    before = table[["layer", "where"]].merge(table[table.remedy == "none"], on=["layer", "where"])
    table["recovered"] = 1 - table.kl / before.kl
    if "top1" in table:
        table["gained"] = table.top1 - before.top1
    return pd.DataFrame({"layer": layers}).merge(table).merge(_causes(model, student, batches[0], layers))


def _remedies(scheme: Scheme, bits: int) -> Iterator[tuple[str, Scheme, tuple[int, int], float]]:
    """Yield name, scheme, widths and quantile of every remedy."""
    same = (bits, bits)
    yield from [(name, scheme, same, 1.0) for name in ("none", "left out")]
    if finer := _FINER_WEIGHTS.get(scheme.weights or ""):
        yield f"weights {finer}", scheme.model_copy(update=dict(weights=finer, fold=False)), same, 1.0
    if finer := _FINER.get(scheme.activations or ""):
        static = scheme.tracked and finer == "per_channel"
        changes = dict(activations=finer, tracked=static, fold=scheme.fold and static)
        yield f"activations {finer}", scheme.model_copy(update=changes), same, 1.0
    if scheme.tracked:
        yield f"range at quantile {QUANTILE}", scheme, same, QUANTILE
    for more in range(bits + 1, min(bits + 2, 8) + 1):
        yield f"weights {more} bits", scheme, (more, bits), 1.0
        yield f"activations {more} bits", scheme, (bits, more), 1.0


def _causes(model: nn.Module, student: nn.Module, batch: Batch, names: Sequence[str]) -> pd.DataFrame:
    rows, quantizers = dict[str, dict[str, Any]](), layer_quantizers(student)
    for name, x, _ in running.calls(model, batch, running.checked(model, names)):
        place, weight = quantizers[name].inputs[0], quantizers[name].original
        channels = running.by_channel(x).transpose(0, 1).flatten(1)
        spread = channels.amax(1) - channels.amin(1)
        image = torch.atleast_2d((place(x) if place else x)[0]).flatten(1)
        rows[name] = {
            "channel_ratio": (spread.max() / spread.median()).item(),
            "input_range": ((x.max() - x.min()) / x.std()).item(),
            "largest_weight": (weight.abs().max() / weight.std()).item(),
            "levels": np.mean([len(channel.unique()) for channel in image]),
            "depthwise": weight.dim() == 4 and weight.shape[1] == 1,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer").reset_index()


def allocate_bits(table: pd.DataFrame, budget: float, kind: str = "average") -> dict[str, tuple[int, int]]:
    """Choose the bits of every layer's weights and activations by integer programming (scipy's ``milp``, exact).

    The loss of a layer is the KL of its weights quantized ``alone`` plus that of its activations: rounding errors
    hardly correlate, and the KL grows with their square, so that it adds up. So it does over layers.

    Args:
        table: of ``measure_sensitivity`` with kind ``alone``, parts ``weights`` and ``activations``; the bits it holds
            are those to choose from.
        budget: at most so many bits, or so many operations an image.
        kind: ``average`` of the nominal bits: of weights by their count, and of activations by the multiply-adds that
            read them, each at most ``budget``. Or ``bit_operations``: bits of weight times bits of activation, summed
            over the multiply-adds; full precision counts 32.

    Returns:
        ``{layer: (weight_bits, act_bits)}``; layers that read one place get one width, and those in front of which no
        quantizer stands get 0, full precision.

    Raises:
        UserError: the table lacks rows, or its bits cannot give the budget.
    """
    one_of("kind of budget", kind, BUDGETS)
    rows = table[table.kind == "alone"].fillna({"place": ""})  # an empty cell of a CSV
    rows = rows.assign(bits=rows.bits.where((rows.part == "weights") | (rows.place != ""), 0))
    weights, acts = (rows[rows.part == part].drop_duplicates(["layer", "bits"]) for part in ("weights", "activations"))
    if weights.empty or {*weights.layer} != {*acts.layer}:
        raise UserError("allocate_bits needs rows 'alone' of every layer, of parts 'weights' and 'activations'")
    if kind == "average":  # of weights and of activations apart, as the losses add up
        chosen = list[pd.Series]()
        for part, size in ((weights.assign(place=""), weights.weights), (acts, acts.macs.where(acts.bits > 0, 0))):
            share = size / max(size[~part.layer.duplicated()].sum(), 1)
            chosen.append(_choose(part.assign(act_bits=part.bits, cost=part.bits * share), budget).bits)
        return {name: (int(chosen[0][name]), int(chosen[1][name])) for name in chosen[0].index}
    pairs = weights.merge(acts[["layer", "bits", "kl"]].set_axis(["layer", "act_bits", "act_kl"], axis=1), on="layer")
    cost = pairs.bits * pairs.act_bits.replace(0, 32) * pairs.macs
    best = _choose(pairs.assign(kl=pairs.kl + pairs.act_kl, cost=cost), budget)
    return {name: (int(best.bits[name]), int(best.act_bits[name])) for name in best.index}


def _choose(options: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Return one row a layer: the smallest sum of ``kl`` whose sum of ``cost`` is within ``budget``."""
    layer, by_layer = options.layer, options.cost.groupby(options.layer)
    low, high = by_layer.min().sum(), by_layer.max().sum()
    if high and not low * (1 - 1e-9) <= budget <= high * (1 + 1e-9):
        raise UserError(f"a budget of {budget:g} is not within what the table's bits can give, {low:g} to {high:g}")
    once = np.array([layer == name for name in layer.unique()], float)
    limits = [LinearConstraint(once, 1, 1), LinearConstraint(options.cost, ub=budget)]
    for _, readers in options[options.place != ""].groupby(["place", "act_bits"]):  # one place, one width
        first, *others = (layer.eq(name) & options.index.isin(readers.index) for name in readers.layer.unique())
        limits += [LinearConstraint(first.astype(float) - other, 0, 0) for other in others]
    best = milp(options.kl, integrality=1, bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0})
    return options[best.x > 0.5].set_index("layer").loc[layer.unique()]
