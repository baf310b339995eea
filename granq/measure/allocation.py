"""How many bits should each layer get? The widths with the smallest sum of losses within a budget."""

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from granq.errors import UserError, one_of

BUDGETS = ("average", "bit_operations")


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
    options = weights.merge(acts[["layer", "bits", "kl"]], on="layer", suffixes=("", "_act"))
    bits, act_bits, macs = options.bits, options.bits_act, options.macs
    if kind == "average":
        shares = ((bits, options.weights), (act_bits, macs.where(act_bits > 0, 0)))
        costs = [width * share / max(share[~options.layer.duplicated()].sum(), 1) for width, share in shares]
    else:
        costs = [bits * act_bits.replace(0, 32) * macs]
    by_layer = [cost.groupby(options.layer) for cost in costs]
    low, high = max(cost.min().sum() for cost in by_layer), max(cost.max().sum() for cost in by_layer)
    if not low * (1 - 1e-9) <= budget <= high * (1 + 1e-9):
        raise UserError(f"a budget of {budget:g} is not within what the table's bits can give, {low:g} to {high:g}")
    once = [options.layer == name for name in options.layer.unique()]
    limits = [LinearConstraint(np.array(once, float), 1, 1), LinearConstraint(np.array(costs), ub=budget)]
    for _, readers in options[act_bits > 0].groupby(["place", "bits_act"]):
        first, *others = ((options.layer == name) & (act_bits == readers.bits_act.iloc[0]) for name in {*readers.layer})
        limits += [LinearConstraint(first.astype(float) - other, 0, 0) for other in others]
    loss = options.kl + options.kl_act
    best = milp(loss, integrality=1, bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0})
    chosen = options[best.x > 0.5].set_index("layer")
    return {name: (int(chosen.bits[name]), int(chosen.bits_act[name])) for name in options.layer.unique()}
