"""Activations in front of a layer, before and after quantization: histograms, and the error by value."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from granq.errors import UserError
from granq.hooks import Batch
from granq.measure import running
from granq.measure.running import ACTIVATION_GRANULARITIES, BINS
from granq.quantizer import choose_qparams, fake_quantize_with


def measure_activation_distortion(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[str],
    bits: Sequence[int] = (3, 4, 5),
    granularities: Sequence[str] = ("per_tensor", "per_channel", "per_sample_channel"),
) -> pd.DataFrame:
    """Measure histograms of the activations in front of ``layers``, quantized and not, and the error by value.

    One row is one bin of one (layer, bits, granularity). The 64 bins of a layer span its range in the **first batch**
    and stay fixed; later values outside are counted in the outermost bins.

    Returns:
        Columns layer, bits, granularity, bin_left, bin_right, density_full_precision, density_quantized (per unit of
        activation), rms_error (root mean square error of the values whose full-precision value lies in the bin; NaN
        for an empty bin), mse and sqnr_db of the whole layer (repeated in its rows), images.
    """
    ranges: dict[str, tuple[float, float]] = {}
    sums: dict[tuple[str, int, str], Tensor] = {}  # (4, BINS): counts before and after, squared error and signal

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x)
        low, high = ranges.setdefault(name, (x.min().item(), x.max().item()))
        index = _bin_of(x, low, high)
        full = torch.bincount(index, minlength=BINS).double()
        signal = torch.bincount(index, x.flatten().double().square(), BINS)
        for k, granularity in product(bits, granularities):
            value = fake_quantize_with(x, choose_qparams(x, k, granularity), k)
            error = torch.bincount(index, (value - x).flatten().double().square(), BINS)
            quantized = torch.bincount(_bin_of(value, low, high), minlength=BINS).double()
            running.merge(sums, (name, k, granularity), torch.stack([full, quantized, error, signal]))

    count = running.run(model, batches, "activation distortion", running.checked(model, layers), visit)
    frames = []
    for (name, k, granularity), values in sums.items():
        key = dict(layer=name, bits=k, granularity=granularity)
        frames.append(pd.DataFrame(key | _densities(*ranges[name], *values)))
    return pd.concat(frames, ignore_index=True).assign(images=count)


def _bin_of(values: Tensor, low: float, high: float) -> Tensor:
    return ((values.flatten() - low) * (BINS / max(high - low, 1e-12))).long().clamp_(0, BINS - 1)


def _densities(
    low: float, high: float, full: Tensor, quantized: Tensor, error: Tensor, signal: Tensor
) -> dict[str, Any]:
    edges = np.linspace(low, max(high, low + 1e-12), BINS + 1)
    area = full.sum() * (edges[1] - edges[0])
    columns: dict[str, Any] = {"bin_left": edges[:-1], "bin_right": edges[1:]}
    columns |= {"density_full_precision": full / area, "density_quantized": quantized / area}
    columns["rms_error"] = (error / full).sqrt()  # 0 / 0 is NaN: nothing was seen there
    columns["mse"] = (error.sum() / full.sum()).item()
    return columns | {"sqnr_db": running.decibel(signal.sum().item(), error.sum().item())}


def measure_channel_histograms(
    model: nn.Module,
    images: Mapping[str, Tensor],
    layers: Sequence[str],
    bits: Sequence[int] = (2, 3, 4, 5),
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES,
    channels: int = 6,
) -> pd.DataFrame:
    """Measure histograms of single channels of single images in front of ``layers``, quantized and not.

    Args:
        images: by source ("synthetic", "real") one batch (N, 3, H, W), also the group of ranges that span images.
        layers: names of convolutions.
        channels: how many of each layer, evenly spaced from the narrowest to the widest range in the last source.

    Returns:
        One row per bin: source, layer, image, channel, rank (0: narrowest), bits, granularity, bin_left, bin_right,
        count, count_quantized, step and lowest (the levels are lowest + step * 0 .. 2^bits - 1, in units of the
        activation), levels_in_use (how many of them) and sqnr_db of the channel in this image. The 32 bins of a channel
        span its values in all images of the source, quantized ones included.
    """
    seen: dict[tuple[str, str], Tensor] = {}
    for source, batch in images.items():

        def keep(name: str, x: Tensor, _: Tensor, source: str = source) -> None:
            if x.dim() != 4:
                raise UserError(f"the input of {name!r} has no channels of pixels: its shape is {tuple(x.shape)}")
            seen[name, source] = x.to("cpu", copy=True)  # a later layer may change it in place

        running.run(model, [batch], f"channel histograms, {source}", running.checked(model, layers), keep)
    frames = []
    for name in layers:
        picked = _from_narrow_to_wide(seen[name, source], channels)
        for source, k, granularity in product(images, bits, granularities):
            frame = _histograms(seen[name, source], picked, k, granularity)
            frames.append(frame.assign(source=source, layer=name, bits=k, granularity=granularity))
    return pd.concat(frames, ignore_index=True)


def _from_narrow_to_wide(x: Tensor, count: int) -> Tensor:
    """Return ``count`` channels, evenly spaced by range; constant ones are left out."""
    spread = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).sort()  # (C,)
    live = spread.indices[spread.values > 0]
    return live[torch.linspace(0, len(live) - 1, min(count, len(live))).round().long()]


def _histograms(x: Tensor, channels: Tensor, bits: int, granularity: str) -> pd.DataFrame:
    qparams = choose_qparams(x, bits, granularity)
    quantized = fake_quantize_with(x, qparams, bits)[:, channels].flatten(2)  # (N, K, H * W)
    step = qparams.scale.expand(*x.shape[:2], 1, 1)[:, channels, 0, 0]  # (N, K)
    lowest = (qparams.zero_point.expand(*x.shape[:2], 1, 1)[:, channels, 0, 0] - 2 ** (bits - 1)) * step
    x = x[:, channels].flatten(2)
    quality = running.sqnr_db(x, quantized, (2,))
    frames = []
    for rank, channel in enumerate(channels.tolist()):
        both = torch.stack([x[:, rank], quantized[:, rank]])
        low, high = both.min().item(), both.max().item()
        edges = np.linspace(low, max(high, low + 1e-6), 33)
        for image in range(len(x)):
            count, count_quantized = (np.histogram(v[image], edges)[0] for v in both)
            values = dict(image=image, channel=channel, rank=rank, bin_left=edges[:-1], bin_right=edges[1:])
            values |= dict(count=count, count_quantized=count_quantized, step=step[image, rank].item())
            values |= dict(lowest=lowest[image, rank].item(), levels_in_use=quantized[image, rank].unique().numel())
            frames.append(pd.DataFrame(values | {"sqnr_db": quality[image, rank].item()}))
    return pd.concat(frames, ignore_index=True)
