"""Checks of the exercises: a function for each, which computes the truth anew from the lesson's parameters.

It takes an answer, and returns a hint, or an empty text if the answer is right. Read this file after the exercise.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from lesson import LESSON, convolutions, make_student, train_once
from start_here import every_width, ten_images
from torch import Tensor

import granq
from granq import scaling
from granq.graph import layer_names
from granq.measure.running import DEAD
from granq.quantizer import fake_quantize_with, qparams_from_range
from granq.show.style import short_layer

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


def is_layer(answer: Any, truth: Iterable[str]) -> bool:
    """Say whether the answer is one of these layers, by its full name or by the short one of pictures and tables."""
    return answer in {*truth, *map(short_layer, truth)}


# lesson 00


@exercise("00-1")
def wrong_answers(answer: int) -> str:
    images, labels = ten_images(LESSON["bench"])
    with torch.no_grad():
        _, student = next(every_width(LESSON["bench"], "layerwise"))
        said = student(images).argmax(1)
    return near(answer, int((said != labels).sum()), 0, "Set the slider to 2 and look at the row layerwise only.")


def audit_of(scheme: str, bits: int) -> pd.DataFrame:
    """Return the audit of a student of this lesson's teacher."""
    bench = LESSON["bench"]
    return granq.audit(make_student(bench, scheme, bits, batches=1), next(bench.real(0, 1)))


@exercise("00-2")
def true_width(answer: float) -> str:
    truth = granq.summarize_audit(audit_of("granq", 3))["true_bits_per_weight"]
    return near(
        answer, truth, 0.1, "A 3x3 kernel shares two numbers of 32 bits among nine weights; some layers keep 32 bits."
    )


@exercise("00-3")
def left_alone(answer: Collection[str]) -> str:
    rows = audit_of("granq", 2)
    truth = set(rows.layer[~rows.weight_quantized])
    return "" if set(answer) == truth else f"There are {len(truth)}. What is the range of a kernel of one number?"


# lesson 01


@exercise("01-1")
def symmetric_codes(answer: int) -> str:
    x = torch.linspace(0, 3, 1000)
    codes = torch.round(x * (2**1 - 1) / x.abs().max())
    return near(answer, len(codes.unique()), 0, "With two bits the largest code is 1, and nothing is negative.")


@exercise("01-2")
def cut_pays(answer: int) -> str:
    values = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    cut = values.clamp(*torch.quantile(values, torch.tensor([0.005, 0.995])))

    def error(kept: torch.Tensor, bits: int) -> float:
        return (granq.fake_quantize(kept, bits) - values).square().mean().item()

    truth = max(bits for bits in range(2, 9) if error(cut, bits) < error(values, bits))
    return near(
        answer,
        truth,
        0,
        "Compare both errors at every width from 2 to 8. Where the step is fine, only the cut is left.",
    )


@exercise("01-3")
def kernel_width(answer: float) -> str:
    return near(
        answer, (16 * 9 * 3 + 16 * 2 * 32) / (16 * 9), 0.02, "16 steps, 16 zero points, and 144 codes of 3 bits."
    )


# lesson 02


def gap_of_channels() -> pd.DataFrame:
    """Return the distances of generated from real images in this lesson's teacher."""
    bench = LESSON["bench"]
    return granq.measure_synthetic_gap(bench.teacher, bench.synthetic(), bench.real())


@exercise("02-1")
def farthest_layer(answer: str) -> str:
    truth = gap_of_channels().groupby("layer", sort=False).ks_distance.median().idxmax()
    return "" if is_layer(answer, [truth]) else "Keep 'synthetic against real', and take the median of ks_distance."


@exercise("02-2")
def wrong_variance(answer: float) -> str:
    gap = gap_of_channels().query("variance_real > 0")
    ratio = gap.variance_synthetic / gap.variance_real
    return near(
        answer, ((ratio >= 2) | (ratio <= 0.5)).mean(), 0.01, "Divide the variances; count 2 and more, 0.5 and less."
    )


@exercise("02-3")
def recognized(answer: float) -> str:
    bench = LESSON["bench"]
    torch.manual_seed(0)
    generator = granq.build_generator(bench.spec.classes, bench.spec.image_size).train()
    drawn = granq.measure_generated_images(generator, bench.teacher, bench.spec, 2)
    return near(
        answer, 100 * (drawn.label == drawn.predicted).mean(), 0.5, "The mean of label == predicted, times 100."
    )


# lesson 03


@exercise("03-1")
def still_lost(answer: float) -> str:
    bench = LESSON["bench"]
    last = train_once(bench, LESSON["schemes"][0], LESSON["bits"]).last_top1
    return near(answer, bench.top1 - last, 0.1, "The teacher's accuracy, minus that of the last epoch.")


@exercise("03-2")
def least_loss(answer: float) -> str:
    return near(
        answer, -(5**2) * math.log(100), 0.1, "Minus T squared, times the natural logarithm of the number of classes."
    )


@exercise("03-3")
def changed_codes(answer: float) -> str:
    bench, scheme, bits = LESSON["bench"], LESSON["schemes"][-1], LESSON["bits"]

    def codes(model: torch.nn.Module) -> torch.Tensor:
        layers = [(found.original, found.weight) for found in granq.layer_quantizers(model).values() if found.weight]
        grids = [(w, granq.choose_qparams(w, bits, quantizer.granularity)) for w, quantizer in layers]
        shared = [(w, grid) for w, grid in grids if grid.scale_inv.numel() < w.numel()]
        return torch.cat([granq.quantize(w, *grid, bits).flatten() for w, grid in shared])

    before = codes(granq.quantize_model(bench.teacher, scheme, bits, bits))
    truth = (codes(train_once(bench, scheme, bits).student) != before).float().mean().item()
    return near(answer, truth, 0.001, "Count the codes that differ, and divide by all weights that share a range.")


# lesson 04


def mean_sqnr(images: Iterable[Tensor]) -> pd.DataFrame:
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
def enough_bits(answer: float) -> str:
    sqnr = mean_sqnr(LESSON["bench"].real())
    wanted = sqnr.loc["per_sample_channel", min(LESSON["widths"])]
    enough = sqnr.loc["per_tensor"].ge(wanted).idxmax()
    return near(answer, enough, 0, "Read the row per_tensor until it reaches the first number of per_sample_channel.")


@exercise("04-2")
def single_levels(answer: float) -> str:
    bench, bits = LESSON["bench"], min(LESSON["widths"])
    channels = granq.measure_activation_samples(bench.teacher, {"real": next(bench.real(0, 6))}, bench.layers(3))
    x, low, high = (torch.tensor(channels[key].values) for key in ("x", "per_tensor_low", "per_tensor_high"))
    rounded = pd.Series(fake_quantize_with(x, qparams_from_range(low, high, bits), bits).numpy())
    levels = rounded.groupby([channels.layer, channels.image, channels["rank"]]).nunique()
    return near(
        answer, (levels <= 2).mean(), 0.02, "Keep the rows whose source is real; a group is one layer, image and rank."
    )


@exercise("04-3")
def generated_gain(answer: float) -> str:
    sqnr = mean_sqnr(LESSON["bench"].synthetic())[LESSON["widths"]]
    gain = (sqnr.loc["per_sample_channel"] - sqnr.loc["per_tensor"]).mean()
    return near(answer, gain, 0.2, "The mean over layers and widths, of per_sample_channel minus per_tensor.")


# lesson 05


def live_scales() -> pd.DataFrame:
    """Return the steps of channels on real images in front of convolutions, without channels of zeros."""
    bench, bits = LESSON["bench"], LESSON["bits"]
    frame = granq.measure_channel_scales(bench.teacher, bench.real(), "per_sample_channel", "real", bits=bits)
    return frame[(frame.scale > DEAD) & frame.layer.isin(convolutions(bench))]


@exercise("05-1")
def widest_layer(answer: str) -> str:
    scales = live_scales()  # layers that read the same tensor share their channels
    widest = {*scales.layer[scales.scale == scales.scale.max()]}
    return "" if is_layer(answer, widest) else "Its name, as in the column layer."


@exercise("05-2")
def bits_for_one_scale(answer: float) -> str:
    steps = live_scales().groupby("layer").scale
    return near(
        answer, np.log2(steps.max() / steps.median()).mean(), 0.02, "An octave is a bit: log2(widest / median)."
    )


@exercise("05-3")
def few_batches(answer: float) -> str:
    bench, bits = LESSON["bench"], LESSON["bits"]
    few = islice(bench.synthetic(), 2)
    static = granq.measure_channel_scales(bench.teacher, few, "per_channel", "synthetic", bits=bits)
    both = static.merge(live_scales(), on=["layer", "channel"], suffixes=("", "_own"))
    return near(answer, (both.scale_max_own > both.scale).mean(), 0.01, "Only channels that live on real images count.")


# lesson 06


def local_errors(schemes: Sequence[str]) -> pd.DataFrame:
    """Return local errors on real images: a row per layer, columns (measure, scheme)."""
    bench, bits = LESSON["bench"], LESSON["bits"]
    warm = list(bench.synthetic())
    frame = granq.measure_layer_error(bench.teacher, bench.real(), schemes, bits, modes=["local"], calibration=warm)
    return frame.pivot(index="layer", columns="scheme", values=["mse", "sqnr_db"])


def top1_with(names: Sequence[str]) -> float:
    """Return the accuracy of the student of the lesson with 8 bits in the layers ``names``."""
    bench = LESSON["bench"]
    student = make_student(bench, LESSON["schemes"][0], LESSON["bits"])
    found = granq.layer_quantizers(student)
    for quantizer in (q for name in names for q in (found[name].weight, *found[name].inputs) if q):
        quantizer.bits = 8
    return bench.evaluate(student)


@exercise("06-1")
def largest_error(answer: str) -> str:
    scheme = LESSON["schemes"][0]
    truth = local_errors([scheme]).mse[scheme].idxmax()
    return "" if is_layer(answer, [truth]) else 'Rows of mode "local" and of the first scheme only.'


@exercise("06-2")
def gain_over_strict(answer: str) -> str:
    sqnr = local_errors(["granq", "strict"]).sqnr_db
    gain = sqnr.granq - sqnr.strict  # within a tenth of a decibel two layers are equal
    best = gain.index[gain > gain.max() - 0.1]
    return "" if is_layer(answer, best) else "The largest difference, granq minus strict."


@exercise("06-3")
def better_three(answer: Sequence[str]) -> str:
    bench = LESSON["bench"]
    full = {short_layer(name): name for name in layer_names(bench.teacher)}
    answer = [full.get(name, name) for name in answer]
    if len({*answer}) != 3 or not {*answer} <= {*full.values()}:
        return "Three names of layers, as in the index of `alone`."
    alone = granq.measure_sensitivity(
        bench.teacher, list(bench.sample(0, bench.images)), LESSON["schemes"][0], LESSON["bits"], kinds=["alone"],
        parts=["both"], calibration=list(bench.synthetic()),
    )  # fmt: skip
    mine, rule = top1_with(answer), top1_with(alone.nlargest(3, "kl").layer.tolist())
    return "" if mine > rule else f"Yours gives {mine:.1f} %, the rule gives {rule:.1f} %."


# lesson 07


def count(batch: int, weight: tuple[int, ...], groups: int = 1) -> pd.DataFrame:
    shape, conv = (batch, 32, 16, 16), scaling.Conv(padding=(1, 1), groups=groups)
    return scaling.count_scaling(shape, weight, conv).set_index("execution")


@exercise("07-1")
def depthwise(answer: float) -> str:
    truth = count(4, (32, 1, 3, 3), 32).scale_multiplications["accumulation-time, loop"]
    return near(answer, truth, 0, "Pass scaling.Conv(padding=(1, 1), groups=32) as the third argument.")


@exercise("07-2")
def bytes_of_weights(answer: float) -> str:
    one, two = (count(batch, (32, 32, 3, 3)).bytes["pre-scaled"] for batch in (1, 2))
    return near(answer, 2 * one - two, 0, "Bytes are a + b times the batch. Two batches give a and b.")


@exercise("07-3")
def hundred_times(answer: float) -> str:
    return near(answer, 100, 0, "N images, C channels in and C out, P pixels: N C C P sums, N C P activations.")
