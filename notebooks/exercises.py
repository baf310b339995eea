"""Checks of the exercises: a function for each, which computes the truth anew from the lesson's parameters.

It takes an answer, and returns a hint, or an empty text if the answer is right. Read this file after the exercise.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from lesson import LESSON, make_student
from torch import Tensor

import granq
from granq import scaling
from granq.graph import layer_names
from granq.measure.running import DEAD
from granq.quantizer import fake_quantize_with, qparams_from_range

CHECKS: dict[str, Callable[[Any], str]] = {}


def exercise(name: str) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register the check of exercise ``name``, such as "00-1"."""

    def register(check: Callable[[Any], str]) -> Callable[[Any], str]:
        CHECKS[name] = check
        return check

    return register


def near(answer: Any, truth: float, tolerance: float, hint: str) -> str:
    """Return ``hint`` unless the answer is within ``tolerance`` of the truth."""
    return "" if abs(float(answer) - truth) <= tolerance else hint


# lesson 00


# lesson 04


def _sqnr(images: Iterable[Tensor]) -> pd.DataFrame:
    """Return the mean SQNR over the lesson's layers: a row per granularity, a column per width, 2 to 8 bits."""
    bench = LESSON["bench"]
    frame = granq.measure_activation_distortion(
        bench.teacher, images, bench.layers(3), range(2, 9), ("per_tensor", "per_sample_channel")
    )
    return (
        frame.groupby(["granularity", "layer", "bits"])
        .sqnr_db.first()
        .groupby(["granularity", "bits"])
        .mean()
        .unstack()
    )


@exercise("04-1")
def _(answer: float) -> str:
    sqnr = _sqnr(LESSON["bench"].real())
    wanted = sqnr.loc["per_sample_channel", min(LESSON["widths"])]
    enough = sqnr.loc["per_tensor"].ge(wanted).idxmax()
    return near(answer, enough, 0, "Read the row per_tensor until it reaches the first number of per_sample_channel.")


@exercise("04-2")
def _(answer: float) -> str:
    bench, bits = LESSON["bench"], min(LESSON["widths"])
    channels = granq.measure_activation_samples(bench.teacher, {"real": next(bench.real(0, 6))}, bench.layers(3))
    x, low, high = (torch.tensor(channels[key].values) for key in ("x", "per_tensor_low", "per_tensor_high"))
    rounded = pd.Series(fake_quantize_with(x, qparams_from_range(low, high, bits), bits).numpy())
    levels = rounded.groupby([channels.layer, channels.image, channels["rank"]]).nunique()
    return near(
        answer, (levels <= 1).mean(), 0.02, "Keep the rows whose source is real; a group is one layer, image and rank."
    )


@exercise("04-3")
def _(answer: float) -> str:
    sqnr = _sqnr(LESSON["bench"].synthetic())[LESSON["widths"]]
    gain = (sqnr.loc["per_sample_channel"] - sqnr.loc["per_tensor"]).mean()
    return near(answer, gain, 0.2, "The mean over layers and widths, of per_sample_channel minus per_tensor.")


# lesson 05


def _live_scales() -> pd.DataFrame:
    """Return the steps of channels on real images, without channels of zeros."""
    bench, bits = LESSON["bench"], LESSON["bits"]
    frame = granq.measure_channel_scales(bench.teacher, bench.real(), "per_sample_channel", "real", bits=bits)
    return frame[frame.scale > DEAD]


@exercise("05-1")
def _(answer: str) -> str:
    scales = _live_scales()  # layers that read the same tensor share their channels
    widest = {*scales.layer[scales.scale == scales.scale.max()]}
    return "" if answer in widest else "Its full name, as in the column layer."


@exercise("05-2")
def _(answer: float) -> str:
    steps = _live_scales().groupby("layer").scale
    return near(
        answer, np.log2(steps.max() / steps.median()).mean(), 0.02, "An octave is a bit: log2(widest / median)."
    )


@exercise("05-3")
def _(answer: float) -> str:
    bench, bits = LESSON["bench"], LESSON["bits"]
    few = islice(bench.synthetic(), 2)
    static = granq.measure_channel_scales(bench.teacher, few, "per_channel", "synthetic", bits=bits)
    both = static.merge(_live_scales(), on=["layer", "channel"], suffixes=("", "_own"))
    return near(answer, (both.scale_max_own > both.scale).mean(), 0.01, "Only channels that live on real images count.")


# lesson 06


def _local(schemes: Sequence[str]) -> pd.DataFrame:
    """Return local errors on real images: a row per layer, columns (measure, scheme)."""
    bench, bits = LESSON["bench"], LESSON["bits"]
    warm = list(bench.synthetic())
    frame = granq.measure_layer_error(bench.teacher, bench.real(), schemes, bits, modes=["local"], calibration=warm)
    return frame.pivot(index="layer", columns="scheme", values=["mse", "sqnr_db"])


def _with_more_bits(names: Sequence[str]) -> float:
    """Return the accuracy of the student of the lesson with 8 bits in the layers ``names``."""
    bench = LESSON["bench"]
    student = make_student(bench, LESSON["schemes"][0], LESSON["bits"])
    found = granq.layer_quantizers(student)
    for quantizer in (q for name in names for q in (found[name].weight, *found[name].inputs) if q):
        quantizer.bits = 8
    return bench.evaluate(student)


@exercise("06-1")
def _(answer: str) -> str:
    scheme = LESSON["schemes"][0]
    return (
        "" if answer == _local([scheme]).mse[scheme].idxmax() else 'Rows of mode "local" and of the first scheme only.'
    )


@exercise("06-2")
def _(answer: str) -> str:
    sqnr = _local(["granq", "strict"]).sqnr_db
    gain = sqnr.granq - sqnr.strict  # within a tenth of a decibel two layers are equal
    return "" if gain.get(answer, -np.inf) > gain.max() - 0.1 else "The largest difference, granq minus strict."


@exercise("06-3")
def _(answer: Sequence[str]) -> str:
    bench = LESSON["bench"]
    if len({*answer}) != 3 or not {*answer} <= {*layer_names(bench.teacher)}:
        return "Three names of layers, as in the index of `alone`."
    alone = granq.measure_sensitivity(
        bench.teacher, list(bench.sample(0, bench.images)), LESSON["schemes"][0], LESSON["bits"], kinds=["alone"],
        parts=["both"], calibration=list(bench.synthetic()),
    )  # fmt: skip
    mine, rule = _with_more_bits([*answer]), _with_more_bits(alone.nlargest(3, "kl").layer.tolist())
    return "" if mine > rule else f"Yours gives {mine:.1f} %, the rule gives {rule:.1f} %."


# lesson 07


def _count(batch: int, weight: tuple[int, ...], groups: int = 1) -> pd.DataFrame:
    shape, conv = (batch, 32, 16, 16), scaling.Conv(padding=(1, 1), groups=groups)
    return scaling.count_scaling(shape, weight, conv).set_index("execution")


@exercise("07-1")
def _(answer: float) -> str:
    truth = _count(4, (32, 1, 3, 3), 32).scale_multiplications["accumulation-time, loop"]
    return near(answer, truth, 0, "Pass scaling.Conv(padding=(1, 1), groups=32) as the third argument.")


@exercise("07-2")
def _(answer: float) -> str:
    one, two = (_count(batch, (32, 32, 3, 3)).bytes["pre-scaled"] for batch in (1, 2))
    return near(answer, 2 * one - two, 0, "Bytes are a + b times the batch. Two batches give a and b.")


@exercise("07-3")
def _(answer: float) -> str:
    return near(answer, 100, 0, "N images, C channels in and C out, P pixels: N C C P sums, N C P activations.")
