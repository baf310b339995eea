"""Generators that draw images from noise and a label, and the BatchNorm loss that guides them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granq.errors import UserError
from granq.fast import channel_var_mean, upsample_conv
from granq.hooks import watch
from granq.quantizer import at_least_float32

LATENT = 100


class Generator(nn.Module):
    """GDFQ's CIFAR generator (Xu et al., ECCV 2020): label embedding times noise, two upsampling stages."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        self.classes, self.size = classes, image_size // 4
        self.embedding: nn.Embedding | None = nn.Embedding(classes, LATENT)
        self.linear = nn.Linear(LATENT, 128 * self.size**2)
        self.norm0: nn.Module = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1: nn.Module = nn.BatchNorm2d(128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2: nn.Module = nn.BatchNorm2d(64, eps=0.8)
        self.conv3, self.norm3 = nn.Conv2d(64, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise (N, 100), labels (N,) -> images (N, 3, size, size), standardized per channel."""
        latent, given = (noise, (labels,)) if self.embedding is None else (self.embedding(labels) * noise, ())
        x = self.linear(latent).view(-1, 128, self.size, self.size)
        x = x.contiguous(memory_format=torch.channels_last)  # everything after it then runs in this layout
        x = upsample_conv(self.norm0(x, *given), self.conv1)  # (N, 128, size/2, size/2)
        x = upsample_conv(F.leaky_relu(self.norm1(x, *given), 0.2), self.conv2)  # (N, 64, size, size)
        x = F.leaky_relu(self.norm2(x, *given), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose weight and bias are looked up per class (Dumoulin et al. 2017)."""

    def __init__(self, classes: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, eps=eps)
        self.weight, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.weight(labels)[..., None, None] + self.bias(labels)[..., None, None]


class ConditionalGenerator(Generator):
    """The ImageNet generator: the label enters through categorical conditional BatchNorm, not through the noise."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__(classes, image_size)
        self.embedding = None
        self.norm0 = ConditionalBatchNorm2d(classes, 128)
        self.norm1 = ConditionalBatchNorm2d(classes, 128, eps=0.8)
        self.norm2 = ConditionalBatchNorm2d(classes, 64, eps=0.8)


def build_generator(classes: int, image_size: int) -> Generator:
    """Build the paper's generator: up to 64 pixels ``Generator``, else conditional. Size is a multiple of 4."""
    if image_size % 4:
        raise UserError(f"image_size is a multiple of 4, got {image_size}")
    return (Generator if image_size <= 64 else ConditionalGenerator)(classes, image_size)


def synthesize(generator: Any, count: int, classes: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw images (count, 3, H, W) in float32 and labels (count,) of ``classes``, by default the generator's.

    ``generator`` is any module (noise (N, 100), labels (N,)) -> images. Draws from the global random state.
    """
    labels = torch.randint(0, classes or generator.classes, (count,), device=device)
    return at_least_float32(generator(torch.randn(count, LATENT, device=device), labels)), labels


@contextmanager
def batchnorm_inputs(model: nn.Module) -> Iterator[list[tuple[nn.BatchNorm2d, Tensor]]]:
    """Collect the input (N, C, H, W) of every call of a BatchNorm2d of ``model`` during one forward."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    with watch(model, norms, lambda name, x, _: seen.append((norms[name], x))):
        yield seen


def batchnorm_loss(inputs: list[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """Mean over layers of MSE(batch mean, running mean) + MSE(batch biased variance, running variance)."""
    terms = []
    for norm, x in inputs:
        if norm.running_mean is not None and norm.running_var is not None:
            var, mean = channel_var_mean(x)
            terms.append(F.mse_loss(mean, norm.running_mean) + F.mse_loss(var, norm.running_var))
    if not terms:
        raise UserError("the teacher has no BatchNorm2d layer with running statistics, so there are none to match")
    return torch.stack(terms).mean()
