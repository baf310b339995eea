"""Checks of the exercises: a function for each, which computes the truth anew from the lesson's parameters.

It takes an answer, and returns a hint, or an empty text if the answer is right. Read this file after the exercise.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import pandas as pd
import torch
from lesson import LESSON, make_student, train_once
from start_here import every_width, ten_images

import granq

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
    return "" if answer == truth else "Keep the rows 'synthetic against real', and take the median of ks_distance."


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
def flattery(answer: float) -> str:
    result = train_once(LESSON["bench"], LESSON["schemes"][0], LESSON["bits"])
    return near(answer, result.best_top1 - result.last_top1, 0.05, "Best epoch on the test images, minus last epoch.")


@exercise("03-2")
def least_loss(answer: float) -> str:
    return near(
        answer, -(5**2) * math.log(100), 0.1, "Minus T squared, times the natural logarithm of the number of classes."
    )


@exercise("03-3")
def moved(answer: float) -> str:
    bench, bits = LESSON["bench"], LESSON["bits"]
    layer, found = next(iter(granq.layer_quantizers(train_once(bench, LESSON["schemes"][-1], bits).student).items()))
    assert found.weight is not None
    steps = 1 / granq.choose_qparams(found.original, bits, found.weight.granularity).scale_inv
    moves = (found.original - bench.teacher.get_submodule(layer).weight).abs()
    return near(
        answer, (moves > steps / 2).float().mean().item(), 0.005, "Compare |after - before| with half of 1 / scale_inv."
    )
