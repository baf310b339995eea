"""How many bits should each layer get? The widths with the smallest sum of losses within a budget."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from granq.convert import calibrate, quantize_model
from granq.errors import UserError, one_of
from granq.measure.audit import audit, summarize_audit
from granq.measure.sensitivity import measure_sensitivity


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
        ``{layer: (weight_bits, act_bits)}``; layers that read one place get one width, and what no quantizer rounds
        gets 0, full precision: ``bits`` of ``quantize_model``. Raises UserError if the table lacks rows, or if its bits
        cannot give the budget.
    """
    one_of("kind of budget", kind, ("average", "bit_operations"))
    if pd.api.types.is_float_dtype(table.layer):  # of "1.1" and "1.10" it made one
        raise UserError("names of layers were read as numbers: read the CSV with dtype={'layer': str}")
    rows = table[table.kind == "alone"].reset_index(drop=True)
    if rows.get("scheme", pd.Series()).nunique() > 1 or not rows.bits.gt(0).all():
        raise UserError("allocate_bits needs a table of one scheme at several widths, not of networks that have theirs")
    rows = rows.fillna({"place": "", "grid": ""}).astype({"layer": str})  # of a CSV
    rows = rows.assign(bits=rows.bits.where(rows.grid.where(rows.part == "weights", rows.place) != "", 0))
    weights, acts = (rows[rows.part == part].drop_duplicates(["layer", "bits"]) for part in ("weights", "activations"))
    if weights.empty or {*weights.layer} != {*acts.layer}:
        raise UserError("allocate_bits needs rows 'alone' of every layer, of parts 'weights' and 'activations'")
    if kind == "average":  # of weights and of activations apart, as the losses add up
        chosen = list[pd.Series]()
        for part, size in ((weights.assign(place=""), weights.weights), (acts, acts.macs)):
            size = size.where(part.bits > 0, 0)
            share = size / max(size[~part.layer.duplicated()].sum(), 1)
            chosen.append(_choose(part.assign(act_bits=part.bits, cost=part.bits * share), budget).bits)
        return {name: (int(chosen[0][name]), int(chosen[1][name])) for name in chosen[0].index}
    pairs = weights.merge(acts[["layer", "bits", "kl"]].set_axis(["layer", "act_bits", "act_kl"], axis=1), on="layer")
    cost = pairs.bits.replace(0, 32) * pairs.act_bits.replace(0, 32) * pairs.macs
    best = _choose(pairs.assign(kl=pairs.kl + pairs.act_kl, cost=cost), budget)
    return {name: (int(best.bits[name]), int(best.act_bits[name])) for name in best.index}


def measure_budgets(
    model: nn.Module, images: Sequence[Tensor], evaluate: Callable[[nn.Module], float], *,
    schemes: Sequence[str] = ("strict", "foldable"), budgets: Sequence[float] = (2.5, 3.0, 4.0),
    choices: Sequence[int] = (2, 3, 4, 5, 6, 8),
) -> pd.DataFrame:  # fmt: skip
    """Measure the accuracy of uniform and of allocated bits, before any training.

    ``images`` are batches without labels, such as generated ones: they alone set ranges and choose among ``choices``.
    ``evaluate`` gives the accuracy in percent. Uniform widths are the whole numbers around the ``budgets``; next to
    them stands ``granq`` at the middle width. Columns: scheme, how (uniform, allocated), average (the budget), top1,
    training ("before training"), and those of ``summarize_audit``.
    """
    rows, both = list[dict[str, Any]](), ["weights", "activations"]
    whole = sorted({side(budget) for budget in budgets for side in (math.floor, math.ceil)})
    runs = list[Any]()
    for scheme in schemes:
        table = measure_sensitivity(model, images, scheme, choices, kinds=["alone"], parts=both, calibration=images)
        runs += [(scheme, "uniform", float(k), None) for k in whole]
        runs += [(scheme, "allocated", budget, allocate_bits(table, budget)) for budget in budgets]
    runs.append(("granq", "uniform", float(whole[len(whole) // 2]), None))
    for scheme, how, average, bits in runs:
        student = quantize_model(model, scheme, int(average), int(average), bits=bits)
        calibrate(student, images)
        known = dict(scheme=scheme, how=how, average=average, top1=evaluate(student), training="before training")
        rows.append(known | summarize_audit(audit(student, images[0][:2])))
    return pd.DataFrame(rows)


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
    loss = options.kl / (options.kl.abs().max() or 1)  # the solver takes 1e-6 for nothing
    best = milp(loss, integrality=1, bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0})
    return options[best.x > 0.5].set_index("layer").loc[layer.unique()]
