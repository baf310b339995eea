"""Generators that draw images from noise and a label, and the BatchNorm statistics that guide them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granq.checks import check_image_size, check_images, forward, typed
from granq.distributed import JointBatchNorm2d, joint_var_mean, own_part, world
from granq.quantizer import at_least_float32

LATENT = 100
REFINED_LABELS = 0.1  # weight of the labels in refine
T = TypeVar("T")


def upsample_conv_plain(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest x2, then a 3x3 convolution with padding 1: (N, I, H, W) -> (N, O, 2H, 2W), 9 products per output."""
    return conv(F.interpolate(x, scale_factor=2.0))


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``upsample_conv_plain`` at 4 products per output instead of 9, equal up to the order of the sums.

    Of the nine pixels an output pixel reads only four differ. Adding up the weights of equal pixels leaves one 2x2
    kernel for each of the four phases (even or odd row and column), and these are the 16 taps of one transposed
    convolution of stride 2: the 3x3 kernel summed over every 2x2 window.
    """
    out_channels, in_channels = conv.weight.shape[:2]
    windows = F.conv2d(conv.weight.flip(2, 3).reshape(-1, 1, 3, 3), conv.weight.new_ones(1, 1, 2, 2), padding=1)
    kernel = windows.view(out_channels, in_channels, 4, 4).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


class Generator(nn.Module):
    """GDFQ's CIFAR generator (Xu et al., ECCV 2020): label embedding times noise, two upsampling stages.

    Args:
        classes: number of labels.
        image_size: side of the images in pixels, a multiple of 4.
    """

    upsample = staticmethod(upsample_conv)

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        check_image_size(image_size)
        self.classes, self.size = classes, image_size // 4
        self.embedding = nn.Embedding(classes, LATENT)
        self.linear = nn.Linear(LATENT, 128 * self.size**2)
        self.norm0: nn.Module = JointBatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1: nn.Module = JointBatchNorm2d(128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2: nn.Module = JointBatchNorm2d(64, eps=0.8)
        self.conv3, self.norm3 = nn.Conv2d(64, 3, 3, padding=1), JointBatchNorm2d(3, affine=False)

    def _grid(self, latent: Tensor) -> Tensor:
        x = self.linear(latent).view(-1, 128, self.size, self.size)
        return x.contiguous(memory_format=torch.channels_last)  # everything behind it then runs in this layout

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise (N, 100), labels (N,) -> images (N, 3, size, size), standardized per channel."""
        x = self._grid(self.embedding(labels) * noise)
        x = self.upsample(self.norm0(x), self.conv1)  # (N, 128, size/2, size/2)
        x = self.upsample(F.leaky_relu(self.norm1(x), 0.2), self.conv2)  # (N, 64, size, size)
        x = F.leaky_relu(self.norm2(x), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose weight and bias are looked up per class (Dumoulin et al. 2017)."""

    def __init__(self, classes: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = JointBatchNorm2d(channels, affine=False, eps=eps)
        self.weight, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.weight(labels)[..., None, None] + self.bias(labels)[..., None, None]


class ConditionalGenerator(Generator):
    """The ImageNet generator: the label enters through categorical conditional BatchNorm, not through the noise."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__(classes, image_size)
        del self.embedding
        self.norm0 = ConditionalBatchNorm2d(classes, 128)
        self.norm1 = ConditionalBatchNorm2d(classes, 128, eps=0.8)
        self.norm2 = ConditionalBatchNorm2d(classes, 64, eps=0.8)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise (N, 100), labels (N,) -> images (N, 3, size, size)."""
        x = self._grid(noise)
        x = self.upsample(self.norm0(x, labels), self.conv1)
        x = self.upsample(F.leaky_relu(self.norm1(x, labels), 0.2), self.conv2)
        x = F.leaky_relu(self.norm2(x, labels), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


@typed
def build_generator(classes: int, image_size: int) -> Generator:
    """The generator the paper uses at this size: ``Generator`` up to 64 pixels, ``ConditionalGenerator`` above."""
    if classes < 1:
        raise ValueError(f"a generator needs at least 1 class, got {classes}")
    return (Generator if image_size <= 64 else ConditionalGenerator)(classes, image_size)


@typed
def synthesize(generator: Generator, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw ``count`` images with random labels from the global random state: (count, 3, s, s) in float32, (count,).

    Under torchrun this is the joint batch, of which every process gets its part.
    """
    labels = own_part(torch.randint(0, generator.classes, (count,), device=device))
    noise = own_part(torch.randn(count, LATENT, device=device))
    images = generator(noise, labels)
    return at_least_float32(images), labels


def _check_pictures(images: Tensor) -> None:
    check_images(images)
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images must be (N, 3, H, W) and not empty, got shape {tuple(images.shape)}")


@typed
def vary(images: Tensor, spread: float) -> Tensor:
    """Images in different light: contrast 1 +- ``spread``, brightness and colour shifted; half are flipped.

    A generator's images differ in what they show but little in mean and contrast, of which BatchNorm statistics over a
    batch say nothing. (N, 3, H, W) -> the same; shifts are normal with deviation ``spread`` for the image and 0.4 times
    that for each channel, in units of the images. Draws from the global random state.
    """
    _check_pictures(images)
    if not 0 <= spread <= 1:
        raise ValueError(f"spread must be from 0 to 1, got {spread}")
    one, each = images.new_empty((len(images), 1, 1, 1)), images.new_empty((*images.shape[:2], 1, 1))
    contrast = one.clone().uniform_(1 - spread, 1 + spread)
    shift = one.clone().normal_(0, spread) + each.normal_(0, 0.4 * spread)
    return torch.where(one.uniform_() < 0.5, images.flip(3), images) * contrast + shift


SHAPES = 40  # at most, in an image of random_shapes


@typed
def random_shapes(count: int, image_size: int, device: str = "cpu") -> Tensor:
    """Images of shapes that hide each other, from no data at all: (count, 3, image_size, image_size), standardized.

    Dead leaves (Lee, Mumford and Huang, IJCV 2001): 5 to 40 turned ellipses and rectangles, many small and few large as
    in photographs of any scale, each of one color with a slope of light. Baradad et al. (NeurIPS 2021) train networks
    on such images. Draws from the global random state.

    Raises:
        ValueError: ``count`` or ``image_size`` below 1.
    """
    if count < 1 or image_size < 1:
        raise ValueError(f"count and image_size must be at least 1, got {count} and {image_size}")

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


@typed
def refine(teacher: nn.Module, images: Tensor, labels: Tensor, steps: int = 25, lr: float = 0.03) -> Tensor:
    """Move the pixels of generated images toward the teacher's BatchNorm statistics, and toward their labels.

    A generator matches the statistics on average; pixels are free to match them in this batch, and after a
    few steps of Adam nearly do (the distilled data of ZeroQ, Cai et al., CVPR 2020, and DeepInversion, Yin et al.,
    CVPR 2020).

    Args:
        teacher: network with BatchNorm2d layers, in eval mode.
        images: (N, 3, H, W), not changed. Under torchrun this process's part of the joint batch.
        labels: (N,).
        steps: of Adam.
        lr: in units of the images.
    """
    _check_pictures(images)
    if labels.shape != images.shape[:1] or labels.dtype != torch.long:
        raise ValueError(
            f"labels must be {len(images)} integers, one an image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if steps < 0 or not 0 < lr < math.inf:
        raise ValueError(f"steps must be at least 0 and lr above 0, got {steps} and {lr}")
    pixels = images.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr)
    for _ in range(steps):
        with batchnorm_inputs(teacher) as norms:
            # a copy: autocast takes a leaf for a weight, and would keep the first step's pixels in its cache
            logits = forward(teacher, pixels.clone())
        if not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            raise ValueError(f"labels must be from 0 to {logits.shape[1] - 1}, as the teacher has classes")
        loss = batchnorm_loss(norms) + REFINED_LABELS * F.cross_entropy(logits, labels)
        # of the joint mean, which each process has by its own part: Adam's epsilon would tell the difference
        (pixels.grad,) = torch.autograd.grad(loss / world()[1], pixels)
        optimizer.step()
    return pixels.detach()


@contextmanager
def kept(generator: Generator) -> Iterator[None]:
    """Behind the block ``generator`` is as it was: drawing in training mode moves running statistics."""
    state, training = {k: v.clone() for k, v in generator.state_dict().items()}, generator.training
    try:
        yield
    finally:
        generator.load_state_dict(state)
        generator.train(training)


@contextmanager
def batchnorm_inputs(model: nn.Module) -> Iterator[list[tuple[nn.BatchNorm2d, Tensor]]]:
    """Collect the input of every BatchNorm2d of ``model`` during one forward."""
    with _watched(model, lambda norm, x, output: (norm, x)) as seen:
        yield seen


@contextmanager
def batchnorm_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every BatchNorm2d of ``model`` during one forward: what ``layer_loss`` compares."""
    # copies: a ReLU or a residual sum behind it may work in place
    with _watched(model, lambda norm, x, output: output.clone()) as seen:
        yield seen


@contextmanager
def _watched(model: nn.Module, keep: Callable[[Any, Tensor, Tensor], T]) -> Iterator[list[T]]:
    seen: list[T] = []
    hooks = [
        m.register_forward_hook(
            lambda norm, args, named, output: seen.append(keep(norm, args[0] if args else named["input"], output)),
            with_kwargs=True,
        )
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def batchnorm_loss(inputs: list[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """Mean over layers of MSE(batch mean, running mean) + MSE(batch biased variance, running variance)."""
    terms = []
    for norm, x in inputs:
        if norm.running_mean is None or norm.running_var is None:
            continue  # a BatchNorm without running statistics has nothing to match
        var, mean = joint_var_mean(x)
        terms.append(F.mse_loss(mean, norm.running_mean) + F.mse_loss(var, norm.running_var))
    if not terms:
        raise ValueError("the teacher has no BatchNorm2d layer with running statistics, so there are none to match")
    return torch.stack(terms).mean()
