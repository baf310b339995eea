"""Measurements: model and images in, tidy data frame out."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from granq.quantizer import fake_quantize


def sqnr_db(reference: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Signal to quantization noise ratio in decibels over ``dims``, in float64; exact values give infinity."""
    signal, noise = reference.double().square().sum(dims), (reference - value).double().square().sum(dims)
    return 10 * torch.log10(signal / noise)


@torch.no_grad()
def measure_activation_distortion(
    model: nn.Module,
    images: Tensor,
    layer: str,
    bits: int,
    granularities: tuple[str, ...] = ("per_tensor", "per_channel", "per_sample_channel"),
) -> pd.DataFrame:
    """SQNR of every live channel at the output of ``layer`` behind a ReLU, per granularity, dynamic ranges.

    Returns:
        Columns layer, bits, granularity, channel, sqnr_db, images. Channels that are zero everywhere are left out.
    """
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(torch.relu(out)))
    try:
        model(images)
    finally:
        hook.remove()
    x = seen[0]  # (N, C, H, W)
    live = (x.amax((0, 2, 3)) > 0).nonzero().flatten().tolist()
    rows = []
    for granularity in granularities:
        values = sqnr_db(x, fake_quantize(x, bits, granularity), (0, 2, 3)).tolist()
        rows += [(layer, bits, granularity, c, values[c], len(images)) for c in live]
    return pd.DataFrame(rows, columns=["layer", "bits", "granularity", "channel", "sqnr_db", "images"])
