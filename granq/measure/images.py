"""Generated images: how far their activations are from those of real images, and what the teacher thinks of them."""

import copy
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from granq.data import DataSpec
from granq.devices import own_random_state
from granq.generator import LATENT, synthesize
from granq.graph import layer_names
from granq.hooks import Batch, eval_mode
from granq.measure import running


def measure_synthetic_gap(
    model: nn.Module, synthetic_batches: Iterable[Batch], real_batches: Iterable[Batch]
) -> pd.DataFrame:
    """Measure how far the activations of synthetic images are from those of real images, per layer and channel.

    The two-sample distance is Kolmogorov and Smirnov's: the largest difference of the two distribution functions,
    0 (equal) to 1 (disjoint), seen at 64 quantiles of the channel in the **first real batch**. Columns: layer, channel,
    mean_synthetic, mean_real, variance_synthetic, variance_real, ks_distance, images_synthetic, images_real.
    """
    edges: dict[str, Tensor] = {}  # (C, BINS)

    def collect(batches: Iterable[Batch], text: str) -> tuple[dict[str, Tensor], int]:
        sums: dict[str, Tensor] = {}  # (3 + BINS, C): count, sum, sum of squares, values up to each edge

        def visit(name: str, x: Tensor, _: Tensor) -> None:
            x = running.by_channel(x, model.get_submodule(name))
            flat = x.transpose(0, 1).flatten(1).contiguous()  # (C, values)
            ordered, values = flat.sort(1).values, flat.double()
            if name not in edges:  # torch.quantile refuses large inputs
                places = torch.linspace(0, flat.shape[1] - 1, running.BINS, dtype=torch.float64).round().long()
                edges[name] = ordered[:, places.to(flat.device)].contiguous()
            moments = torch.full_like(values[:, 0], flat.shape[1]), values.sum(1), values.square().sum(1)
            up_to = torch.searchsorted(ordered, edges[name], right=True).double()
            running.merge(sums, name, torch.stack([*moments, *up_to.T]))

        return sums, running.run(model, batches, f"synthetic gap, {text}", layer_names(model), visit)

    real, images_real = collect(real_batches, "real")  # first: it fixes the edges
    synthetic, images_synthetic = collect(synthetic_batches, "synthetic")
    frames = {}
    for name in real:
        other, own = (sums[name][1:] / sums[name][0] for sums in (synthetic, real))  # per value, (2 + BINS, C)
        gap = {"mean_synthetic": other[0], "mean_real": own[0]}
        gap |= {f"variance_{k}": (v[1] - v[0].square()).clamp_min(0) for k, v in (("synthetic", other), ("real", own))}
        frames[name] = pd.DataFrame(gap | {"ks_distance": (other - own)[2:].abs().amax(0)})
    frame = pd.concat(frames, names=["layer", "channel"]).reset_index()
    return frame.assign(images_synthetic=images_synthetic, images_real=images_real)


def generated_batches(generator: nn.Module, seed: int, count: int = 1024, batch_size: int = 64) -> Iterator[Tensor]:
    """Yield images as a run sees them, BatchNorm with the batch's statistics; generator and random state stay."""
    own, device = copy.deepcopy(generator).train(), str(next(generator.parameters()).device)
    for start in range(0, count, batch_size):
        with own_random_state(device), torch.no_grad():
            torch.manual_seed((1_000_003 * seed + start) % 2**63)  # every batch has its own numbers
            images, _ = synthesize(own, min(batch_size, count - start), device=device)
        yield images.contiguous()  # which every network takes


@torch.no_grad()
def measure_generated_images(
    generator: nn.Module, teacher: nn.Module, spec: DataSpec, per_class: int = 1, *, seed: int = 0
) -> pd.DataFrame:
    """Draw images for every label as one batch in the generator's own mode; measure what the teacher thinks of them.

    ``spec`` says how many labels there are, and how images are normalized. Generator and global random state stay.
    Columns: label (asked for), sample, predicted, confidence (the teacher's probability of the label), size (side in
    pixels), pixels (hexadecimal RGB bytes in rows; ``decode_pixels`` gives the array).
    """
    device = next(teacher.parameters()).device
    labels = torch.arange(spec.classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(seed))
    images = copy.deepcopy(generator).to(device)(noise.to(device), labels.to(device))  # its statistics move
    frame = measure_images(images.contiguous(), labels, teacher, spec)
    frame.insert(1, "sample", list(range(per_class)) * spec.classes)
    return frame


@torch.no_grad()
def measure_images(images: Tensor, labels: Tensor, teacher: nn.Module, spec: DataSpec | None = None) -> pd.DataFrame:
    """Measure what the teacher thinks of images, as ``measure_generated_images`` does."""
    with eval_mode(teacher):
        probability = teacher(images.to(next(teacher.parameters()).device)).softmax(1).cpu()
    labels = labels.cpu()
    columns = {"label": labels, "predicted": probability.argmax(1)}
    columns |= {"confidence": probability[range(len(labels)), labels].tolist(), "size": images.shape[-1]}
    return pd.DataFrame(columns | {"pixels": [image.tobytes().hex() for image in to_pixels(images, spec)]})


def to_pixels(images: Tensor, spec: DataSpec | None = None) -> np.ndarray:
    """Return normalized images (N, 3, H, W) as people see them, uint8 (N, H, W, 3); without ``spec`` roughly."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ((spec.mean, spec.std) if spec else (0.5, 0.25)))
    pixels = ((images.detach().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def decode_pixels(pixels: str, size: int) -> np.ndarray:
    """Return the image of a row of ``measure_generated_images``: uint8 (size, size, 3)."""
    return np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(size, size, 3)
