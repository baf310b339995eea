"""What a student gets before it is trained, none of it by gradients: ranges, steps, BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from granq.checks import check_batches, forward, typed
from granq.convert import LearnedSteps, activation_places, bypassed, freeze_ranges, frozen_ranges, image_place
from granq.distributed import joint_var_mean


@torch.no_grad()
def calibrate(
    model: nn.Module, images: Iterable[Tensor], quantile: float = 1.0, *, full_precision: bool = False
) -> None:
    """Track activation ranges over batches of images, then freeze them. Nothing to do for dynamic schemes.

    Args:
        model: of ``quantize_model``.
        images: batches (N, 3, H, W).
        quantile: above 0.5 to 1. Below 1 a range ends where this share of a batch's positive values is below it (and of
            its negative ones above it), instead of at the extremes; what is outside is clamped.
        full_precision: track what the network holds without quantization. Before ``reestimate_batchnorm``, which brings
            activations back to it, these are the ranges that will be needed.
    """
    check_batches(images)
    if not 0.5 < quantile <= 1:
        raise ValueError(f"quantile must be above 0.5 and at most 1, got {quantile}")
    places = [place for place in activation_places(model).values() if place.tracked]
    if any(place.learned for place in places):
        raise ValueError("the steps of this model are learned: they no longer follow ranges")
    before = [(place.running_min, place.running_max, place.frozen) for place in places]
    for place in places:
        place.quantile, place.frozen = quantile, False
        if quantile < 1:  # what was tracked before were extremes
            place.running_min = place.running_max = place.running_min.new_empty(0)
    try:
        with bypassed(model, full_precision):
            for batch in images:
                forward(model, batch)
        if not all(place.seen for place in places):
            raise ValueError("no images to calibrate on")
        freeze_ranges(model)
    except BaseException:
        for place, was in zip(places, before, strict=True):
            place.running_min, place.running_max, place.frozen = was
        raise
    finally:
        for place in places:
            place.quantile = 1.0


@typed
def set_image_range(model: nn.Module, low: Tensor, high: Tensor) -> None:
    """Set the static range of the image, which is known without any: pixels end at black and white.

    Args:
        model: of ``quantize_model``, calibrated.
        low: lowest value of each channel, (1, C, 1, 1), such as ``data.pixel_bounds`` gives.
        high: the highest.

    Raises:
        ValueError: other shapes, or the scheme has no static range for the image.
    """
    place = image_place(model)
    if place.learned is not None or not place.seen:
        raise ValueError("the image has no calibrated static range in this model, such as scheme foldable gives it")
    if place.granularity == "per_tensor":
        low, high = low.amin().view(1, 1, 1, 1), high.amax().view(1, 1, 1, 1)
    if not low.shape == high.shape == place.running_min.shape:
        shapes = (tuple(bound.shape) for bound in (place.running_min, low, high))
        raise ValueError("low and high of the image are {}, got {} and {}".format(*shapes))
    place.running_min, place.running_max = low.to(place.running_min), high.to(place.running_max)


@torch.no_grad()
@typed
def reestimate_batchnorm(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Move the student's BatchNorm statistics by as much as quantization moved those of ``images``.

    Quantized weights and inputs shift the mean and scale the variance of every channel. In one forward, layer after
    layer, a BatchNorm gets the teacher's running mean plus the difference, and its running variance times the ratio,
    of what student and teacher see on the same images: what sets these apart from real images cancels. The ratio is
    kept between 1/4 and 4. The mean is the empirical bias correction of Nagel et al. (ICCV 2019, section 4.2). A
    BatchNorm that is called several times stays as it is: it would need statistics for each call.

    Args:
        student: quantized copy of ``teacher``; its running statistics are replaced.
        teacher: the full-precision network, in eval mode.
        images: one batch (N, 3, H, W), such as generated ones; a few hundred.
    """
    norms = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats}
    if missing := norms.keys() - dict(student.named_modules()).keys():
        raise ValueError(f"student is no copy of teacher: it has no module {sorted(missing)[0]!r}")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # variance and mean in the teacher, of every call

    def follow(name: str, norm: nn.BatchNorm2d, x: Tensor) -> None:
        if len(seen[name]) > 1:
            return
        var, mean = joint_var_mean(x)
        ((old_var, old_mean),) = seen[name]
        running_var, running_mean = cast(Tensor, norms[name].running_var), cast(Tensor, norms[name].running_mean)
        cast(Tensor, norm.running_mean).copy_(running_mean + mean - old_mean)
        cast(Tensor, norm.running_var).copy_(running_var * (var / old_var.clamp_min(1e-12)).clamp(0.25, 4))

    with ExitStack() as hooks, frozen_ranges(student):
        for name, norm in norms.items():
            watch = norm.register_forward_pre_hook(
                lambda _, x, n=name: seen.setdefault(n, []).append(joint_var_mean(x[0]))
            )
            own = cast(nn.BatchNorm2d, student.get_submodule(name))
            hooks.callback(watch.remove)
            hooks.callback(own.register_forward_pre_hook(lambda m, x, n=name: follow(n, m, x[0])).remove)
        forward(teacher, images)
        student(images)


@torch.no_grad()
@typed
def learn_steps(model: nn.Module) -> list[nn.Parameter]:
    """Make the steps of weights and of static activation ranges parameters of ``model``, from what they are now on.

    Learned step size quantization (Esser et al., ICLR 2020), with the gradient of ``quantizer.fake_quantize_learned``.
    Dynamic ranges stay those of each image.

    Returns:
        The logarithms of the steps: for an optimizer with a rate of their own.

    Raises:
        ValueError: the scheme does not clamp its codes (``release``), so its steps bound nothing.
        RuntimeError: static ranges were not calibrated yet.
    """
    learned = []
    for layer in [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]:
        weights = cast(Any, layer.parametrizations).weight
        learned.append((weights[0], weights[0].folded_qparams(weights.original)))
    learned += [(place, place.qparams()) for place in activation_places(model).values() if place.tracked]
    if not learned or not all(quantizer.clamp for quantizer, _ in learned):
        raise ValueError("steps are learned where codes are clamped to their range, which this scheme does not do")
    for quantizer, qparams in learned:
        quantizer.learned = LearnedSteps(*qparams)
    return [quantizer.learned.log_step for quantizer, _ in learned]
