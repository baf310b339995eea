"""Cause and cure: what is wrong with the guiltiest layers, and what each remedy brings, tried and not guessed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from granq.convert import layer_quantizers
from granq.hooks import Batch
from granq.measure import running
from granq.measure.sensitivity import Side, compare, full_precision, measure_sensitivity, prepare
from granq.schemes import Scheme, get_scheme

_FINER = {"per_tensor": "per_channel", "per_channel": "per_sample_channel", "per_sample": "per_sample_channel"}
_FINER_WEIGHTS = {"per_tensor": "per_out_channel", "per_out_channel": "per_kernel"}


def measure_remedies(
    model: nn.Module, batches: Sequence[Batch], scheme: str | Scheme, bits: int, layers: int | Sequence[str] = 3, *,
    calibration: Sequence[Batch] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Try remedies on one layer at a time: where it is quantized alone, and where the whole network is.

    ``layers`` are names, or how many: those with the largest KL when quantized alone. For the rest see
    ``measure_sensitivity``.

    Columns: layer, remedy ("none", a finer granularity, "range cut" by ``ranges.best_quantile`` where it is static, one
    or two more bits, "left out"), where (alone, whole), kl and the other metrics of ``measure_sensitivity``, recovered
    (share of the KL without remedy that is gone), with labels gained (points of top-1), and of the layer's
    full-precision input and weight in the first batch: channel_ratio (range of the widest channel to the median one),
    input_range and largest_weight (in standard deviations), levels (in use in a channel of an image), depthwise.
    """
    scheme, plain = get_scheme(scheme), full_precision(model, batches)
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


def _remedies(scheme: Scheme, bits: int) -> Iterator[tuple[str, Scheme, tuple[int, int], float | None]]:
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
        yield "range cut", scheme, same, None
    for more in range(bits + 1, min(bits + 2, 8) + 1):
        yield f"weights {more} bits", scheme, (more, bits), 1.0
        yield f"activations {more} bits", scheme, (bits, more), 1.0


def _causes(model: nn.Module, student: nn.Module, batch: Batch, names: Sequence[str]) -> pd.DataFrame:
    rows, quantizers = dict[str, dict[str, Any]](), layer_quantizers(student)
    for name, x, _ in running.calls(model, batch, running.checked(model, names)):
        place, weight = quantizers[name].inputs[0], quantizers[name].original
        layer: Any = model.get_submodule(name)
        channels = running.by_channel(x, layer).transpose(0, 1).flatten(1)
        spread = channels.amax(1) - channels.amin(1)
        image = running.by_channel((place(x) if place else x)[:1], layer)  # a row is a group of its own
        image = image if image.dim() == 2 else image[0].flatten(1)
        rows[name] = {
            "channel_ratio": (spread.max() / spread.median()).item(),
            "input_range": ((x.max() - x.min()) / x.std()).item(),
            "largest_weight": (weight.abs().max() / weight.std()).item(),
            "levels": np.mean([len(channel.unique()) for channel in image]),
            "depthwise": getattr(layer, "groups", 1) > 1 and weight.shape[1] == 1,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer").reset_index()
