"""Recipe match, our own, on top of ``qat``: the student follows the teacher layer by layer, on refined images.

The generator's part is over when the student's training begins. Images are drawn once and refined toward the teacher's
BatchNorm statistics, half of them from random shapes. The student is compared with the teacher after every BatchNorm.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from granq.config import QATConfig
from granq.convert import ActQuantizer, activation_places, calibrate, layer_quantizers, set_image_range
from granq.devices import own_random_state
from granq.errors import UserError
from granq.fast import channel_var_mean
from granq.generator import batchnorm_inputs, batchnorm_loss, synthesize
from granq.graph import reader
from granq.hooks import eval_mode, watch
from granq.losses import layer_loss, soft_label_loss
from granq.plain import is_plain, module_of, name_of, relu_ceiling
from granq.qat import CALIBRATION, GDFQ, Game, describe_images
from granq.quantizer import at_least_float32
from granq.ranges import LearnedSteps, best_quantile
from granq.schemes import get_scheme

REESTIMATION = 8  # batches from which reestimate_batchnorm takes its statistics
CONSTANT = 1e-10  # variance of a channel over its squared mean, up to which it is but rounding errors
STEP_RATE = 20  # times student_lr for learned steps, whose logarithms move by shares, weights by absolute amounts
NORM_RATE = 4  # times student_lr for the scale and shift of BatchNorm
SPREAD = 0.5  # of contrast and brightness before images are refined; half of it whenever they are drawn
SOFT_LABELS, SOFT_TEMPERATURE = 0.1, 4.0  # weight and temperature of the soft labels
REFINED_LABELS = 0.1  # weight of the labels in refine
#: what leaves the range of a channel as it is
KEEP_RANGES = {*"MaxPool2d max_pool2d Flatten flatten Dropout dropout Identity".split()}
AVERAGES = {*"AdaptiveAvgPool2d adaptive_avg_pool2d AvgPool2d avg_pool2d mean".split()}
SHAPES = 40  # at most, in an image of random_shapes


class Match(GDFQ):
    """Recipe match: in the warm-up as gdfq; then only the student learns, and layers are compared."""

    rates = {LearnedSteps: STEP_RATE, nn.BatchNorm2d: NORM_RATE}

    def __init__(self, config: QATConfig) -> None:
        super().__init__(config)
        self.refined: tuple[Tensor, Tensor] | None = None
        self.ceilings: list[float | None] = []

    def student_loss(self, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return SOFT_LABELS * soft_label_loss(t, s, SOFT_TEMPERATURE)

    def decay(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2  # SGDR, 2017

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr)

    def draw(self, game: Game) -> tuple[Tensor, Tensor]:
        if not self.config.refined_images:
            return super().draw(game)
        if self.refined is None:
            self.refined = refined_images(game)
        images, labels = self.refined
        chosen = torch.randint(0, len(images), (self.config.batch_size,), device=images.device)
        drawn = vary(images[chosen], SPREAD / 2)  # beyond black and white only the teacher would see something
        return drawn.clamp(*game.pixels) if game.pixels else drawn, labels[chosen]

    def prepare(self, game: Game) -> None:
        """Set static ranges without their outermost values, undo the shift of BatchNorm, and make steps learnable."""
        scheme, student = get_scheme(self.config.scheme), game.student
        if scheme.tracked:  # of the teacher's values, to which the re-estimated BatchNorm brings the student's back
            batches = [self.draw(game)[0] for _ in range(CALIBRATION)]
            calibrate(student, batches, None, full_precision=True)
            widen_ranges(student)
            if self.config.image_bits and game.pixels:  # with bits to spare nothing needs to be cut off
                set_image_range(student, *game.pixels)
        images = torch.cat([self.draw(game)[0] for _ in range(REESTIMATION)])
        reestimate_batchnorm(student, game.teacher, images)
        if scheme.clamp:
            learn_steps(student)

    def step(self, game: Game) -> dict[str, Tensor]:
        with torch.no_grad(), game.autocast():
            images, labels = self.draw(game)
            with batchnorm_outputs(game.teacher) as wanted:
                t = at_least_float32(game.teacher(images))
        with batchnorm_outputs(game.student) as got, game.autocast():
            s = at_least_float32(game.student(images))
        self.ceilings = self.ceilings or relu_ceilings(game.student)
        loss = layer_loss(wanted, got, self.ceilings) + self.student_loss(t, s, labels)
        game.update("student", game.student_params, loss)
        return {"student_loss": loss.detach()} | describe_images(images, t, labels)


@torch.no_grad()
def refined_images(game: Game) -> tuple[Tensor, Tensor]:
    """Make the images that a run trains on, with labels. They depend on seed and generator only, also when resumed."""
    c, generator = game.config, copy.deepcopy(game.generator)  # drawing moves the running statistics of its norms
    batches = []
    with own_random_state(game.device):
        torch.manual_seed(c.seed)
        numbers = range(c.refined_images // c.batch_size)
        for number in tqdm(numbers, desc="refining images", unit="batch", leave=False, delay=2):
            if number % 2:
                images = random_shapes(c.batch_size, c.image_size, game.device)
                labels = torch.randint(0, game.classes, (c.batch_size,), device=game.device)
            else:
                with game.autocast():
                    images, labels = synthesize(generator, c.batch_size, game.classes, game.device)
                smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
                images = vary((images + smooth) / 2, SPREAD)  # as smooth as photographs are, in different light
            with game.autocast():
                batches.append((refine(game.teacher, images, labels, pixels=game.pixels), labels))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.enable_grad()
def refine(
    teacher: nn.Module, images: Tensor, labels: Tensor, steps: int = 25, lr: float = 0.03,
    pixels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Move the pixels of generated images toward the teacher's BatchNorm statistics, and toward their labels.

    A generator matches the statistics on average; pixels match them in this batch, as the distilled data of ZeroQ (Cai
    et al., CVPR 2020) and DeepInversion (Yin et al., CVPR 2020). Images are (N, 3, H, W) and stay as they are, labels
    (N,); ``lr`` of Adam is in units of the images. ``pixels``, black and white (1, 3, 1, 1), are what they stay within.
    """
    moved = images.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], lr)
    for _ in range(steps):
        with eval_mode(teacher), batchnorm_inputs(teacher) as norms:
            # a copy: autocast takes a leaf for a weight, and would keep the first step's pixels in its cache
            logits = teacher(moved.clone())
        loss = batchnorm_loss(norms) + REFINED_LABELS * F.cross_entropy(logits, labels)
        (moved.grad,) = torch.autograd.grad(loss, moved)
        optimizer.step()
        if pixels:
            moved.data.clamp_(*pixels)
    return moved.detach()


def vary(images: Tensor, spread: float) -> Tensor:
    """Return images (N, 3, H, W) in different light: contrast 1 +- ``spread``, brightness and colour; half are flipped.

    A generator's images differ little in mean and contrast, of which BatchNorm statistics over a batch say nothing.
    Shifts have the deviation ``spread`` for an image, and 0.4 times that for each channel, in units of the images.
    """
    one, each = images.new_empty((len(images), 1, 1, 1)), images.new_empty((*images.shape[:2], 1, 1))
    contrast = one.clone().uniform_(1 - spread, 1 + spread)
    shift = one.clone().normal_(0, spread) + each.normal_(0, 0.4 * spread)
    return torch.where(one.uniform_() < 0.5, images.flip(3), images) * contrast + shift


def random_shapes(count: int, image_size: int, device: str = "cpu") -> Tensor:
    """Draw images of shapes that hide each other, from no data at all: (count, 3, size, size), standardized.

    Dead leaves (Lee, Mumford and Huang, IJCV 2001): 5 to 40 turned ellipses and rectangles, many small and few large,
    each of one color with a slope of light. Baradad et al. (NeurIPS 2021) train networks on such images.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)

    def normal(spread: float, channels: int = 1) -> Tensor:
        return spread * torch.randn(count, channels, 1, 1, device=device)

    axis = (torch.arange(image_size, device=device) + 0.5) / image_size  # the side is 1
    images = normal(0.6, 3).expand(-1, -1, image_size, image_size)
    shapes = torch.randint(5, SHAPES + 1, (count, 1, 1, 1), device=device)
    for i in range(SHAPES):
        x, y, angle = axis - uniform(-0.125, 1.125), axis[:, None] - uniform(-0.125, 1.125), uniform(0, math.pi)
        along = x * angle.cos() + y * angle.sin()
        across = (y * angle.cos() - x * angle.sin()) / uniform(0.4, 1)
        # round ones and straight ones; the reciprocal of a uniform number has the sizes of dead leaves
        reach = torch.where(uniform(0, 1) < 0.5, along.hypot(across), along.abs().maximum(across.abs()))
        inside = (reach < (0.0625 / uniform(0.05, 1)).clamp_max(0.75)) & (i < shapes)
        images = torch.where(inside, normal(0.9) + normal(0.4, 3) + normal(1.0) * along, images)
    return images


@torch.no_grad()
def widen_ranges(student: fx.GraphModule) -> None:
    """Widen static ranges of channels behind a BatchNorm to what it says of real images, which others need not reach.

    In the teacher's training its outputs had the mean ``bias`` and nearly the deviation ``weight``. A range then holds
    the share ``best_quantile`` of normal values, at 8 bits up to 4.3 deviations (Nagel et al., ICCV 2019, take 6).
    Between BatchNorm and range may be a ReLU and a pooling. Averages stay far inside, which 6 bits or more can bear.
    """
    for node in student.graph.nodes:
        place = module_of(student, node)
        if not isinstance(place, ActQuantizer) or not place.tracked or place.granularity == "per_tensor":
            continue
        source, low, high = node.all_input_nodes[0], -math.inf, math.inf
        kept = KEEP_RANGES | (AVERAGES if place.bits >= 6 else set())
        while (ceiling := relu_ceiling(student, source)) is not None or name_of(student, source) in kept:
            low, high = (low, high) if ceiling is None else (0.0, min(high, ceiling))
            source = source.all_input_nodes[0]
        norm, old = module_of(student, source), place.running_min
        if isinstance(norm, nn.BatchNorm2d) and is_plain(norm) and norm.affine and norm.num_features == old.numel():
            reach = NormalDist().inv_cdf((1 + best_quantile(place.bits)) / 2) * norm.weight.abs()
            if norm.running_var is not None:  # of a dead channel eps leaves less
                reach = reach * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
            place.running_min = old.minimum((norm.bias - reach).clamp(low, high).view_as(old))
            place.running_max = place.running_max.maximum((norm.bias + reach).clamp(low, high).view_as(old))


@torch.no_grad()
def reestimate_batchnorm(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Move the student's BatchNorm statistics by as much as quantization moved those of a few hundred images.

    In one forward, layer after layer, a BatchNorm gets the teacher's running mean plus the difference, and its running
    variance times the ratio (1/4 to 4), of what student and teacher see on the same images (N, 3, H, W): what sets
    these apart from real images cancels. The ratio is 1 where a channel is constant in student or teacher: there is no
    contrast to compare. The mean is the empirical bias correction of Nagel et al. (ICCV 2019). A BatchNorm
    that is called several times stays as it is: it would need statistics for each call.
    """
    norms = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}  # variance and mean, of every call

    def follow(name: str, x: Tensor, _: None) -> None:
        if len(seen[name]) != 1:
            return
        (var, mean), ((old_var, old_mean),) = channel_var_mean(x), seen[name]
        constant = torch.minimum(var - CONSTANT * mean.square(), old_var - CONSTANT * old_mean.square()) <= 1e-12
        ratio = torch.where(constant, 1, (var / old_var).clamp(0.25, 4))
        own, norm = cast(Any, student.get_submodule(name)), cast(Any, norms[name])
        own.running_mean.copy_(norm.running_mean + mean - old_mean)
        own.running_var.copy_(norm.running_var * ratio)

    watching = watch(teacher, norms, lambda name, x, _: seen[name].append(channel_var_mean(x)), before=True)
    with eval_mode(teacher), watching:
        teacher(images)
    with eval_mode(student), watch(student, norms, follow, before=True):
        student(images)


def learn_steps(model: nn.Module) -> list[nn.Parameter]:
    """Make the steps of weights and of static activation ranges parameters, from what they are now on (LSQ).

    Returns the logarithms of the steps. Raises UserError if the scheme does not clamp its codes, so that its steps
    bound nothing, or if ranges were not calibrated yet.
    """
    weights = {q.weight: q.weight.qparams(q.original) for q in layer_quantizers(model).values() if q.weight}
    places = {place: place.qparams() for place in activation_places(model).values() if place.tracked}
    quantizers = [*weights.items(), *places.items()]
    if not all(quantizer.clamp for quantizer, _ in quantizers):
        raise UserError("steps are learned where codes are clamped to their range, which this scheme does not do")
    for quantizer, qparams in quantizers:
        quantizer.learned = LearnedSteps(*qparams)
    return [cast(LearnedSteps, quantizer.learned).log_step for quantizer, _ in quantizers]


@contextmanager
def batchnorm_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of a BatchNorm2d in the graph of a traced model, for ``layer_loss``."""
    norms = {str(n.target) for n in cast(Any, model).graph.nodes if isinstance(module_of(model, n), nn.BatchNorm2d)}
    seen: list[Tensor] = []
    with watch(model, norms, lambda name, x, output: seen.append(output.clone())):  # a ReLU may work in place
        yield seen


def relu_ceilings(model: fx.GraphModule) -> list[float | None]:
    """For every call of a BatchNorm2d, in order: where the ReLU that alone reads it ends (infinity, 6), or ``None``."""
    norms = [node for node in model.graph.nodes if isinstance(module_of(model, node), nn.BatchNorm2d)]
    return [relu_ceiling(model, after) if (after := reader(model, norm)) else None for norm in norms]
