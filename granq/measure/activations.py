"""Activations in front of a layer: histograms before and after quantization, the error by value, and the steps."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from granq.graph import layer_names
from granq.hooks import Batch
from granq.measure import running
from granq.measure.running import ACTIVATION_GRANULARITIES, BINS
from granq.quantizer import choose_qparams, fake_quantize_with, min_max, qparams_from_range


def measure_activation_distortion(
    model: nn.Module, batches: Iterable[Batch], layers: Sequence[str], bits: Sequence[int] = (3, 4, 5),
    granularities: Sequence[str] = ("per_tensor", "per_channel", "per_sample_channel"),
) -> pd.DataFrame:  # fmt: skip
    """Measure histograms of the activations in front of ``layers``, quantized and not, and the error by value.

    The 64 bins of a layer span its range in the **first batch**; later values outside count in the outermost bins.

    Returns:
        One row per bin: layer, bits, granularity, bin_left, bin_right, density_full_precision, density_quantized (per
        unit of activation), rms_error (of the values whose full-precision value lies in the bin; NaN for an empty
        bin), mse and sqnr_db (of the whole layer), images.
    """
    ranges: dict[str, tuple[float, float]] = {}
    sums: dict[tuple[str, int, str], Tensor] = {}  # (4, BINS): counts before and after, squared error and signal

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x)
        low, high = ranges.setdefault(name, (x.min().item(), x.max().item()))

        def bins(values: Tensor, weights: Tensor | None = None) -> Tensor:
            index = (values.flatten() - low) * (BINS / max(high - low, 1e-12))
            return torch.bincount(index.long().clamp_(0, BINS - 1), weights, BINS).double()

        full, signal = bins(x), bins(x, x.flatten().double().square())
        for k, granularity in product(bits, granularities):
            value = fake_quantize_with(x, choose_qparams(x, k, granularity), k)
            error = bins(x, (value - x).flatten().double().square())
            running.merge(sums, (name, k, granularity), torch.stack([full, bins(value), error, signal]))

    count = running.run(model, batches, "activation distortion", running.checked(model, layers), visit)
    frames = []
    for (name, k, granularity), (full, quantized, error, signal) in sums.items():
        low, high = ranges[name]
        edges = np.linspace(low, max(high, low + 1e-12), BINS + 1)
        area = full.sum() * (edges[1] - edges[0])
        columns = dict(layer=name, bits=k, granularity=granularity, bin_left=edges[:-1], bin_right=edges[1:])
        columns |= dict(density_full_precision=full / area, density_quantized=quantized / area)
        columns |= dict(rms_error=(error / full).sqrt(), mse=(error.sum() / full.sum()).item())  # 0 / 0 is NaN
        columns |= dict(sqnr_db=running.decibel(signal.sum().item(), error.sum().item()), images=count)
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def measure_channel_histograms(
    model: nn.Module, images: Mapping[str, Tensor], layers: Sequence[str], bits: Sequence[int] = (2, 3, 4, 5),
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES, channels: int = 6,
) -> pd.DataFrame:  # fmt: skip
    """Measure histograms of single channels of single images in front of ``layers``, quantized and not.

    Args:
        images: by source ("synthetic", "real") one batch (N, 3, H, W), also the group of ranges that span images.
        channels: how many of each layer, evenly spaced from the narrowest to the widest range in the last source.

    Returns:
        One row for each of the 32 bins that span a channel in all images of a source: image, channel, rank (0:
        narrowest), bin_left, bin_right, count, count_quantized, step and lowest (levels are lowest + step * 0 .. 2^bits
        - 1, in units of the activation), levels_in_use, sqnr_db (of the channel in this image), source, layer, bits,
        granularity.
    """
    seen: dict[tuple[str, str], Tensor] = {}
    for source, batch in images.items():

        def keep(name: str, x: Tensor, _: Tensor, source: str = source) -> None:
            seen[name, source] = x.to("cpu", copy=True)  # a later layer may change it in place

        running.run(model, [batch], f"channel histograms, {source}", running.checked(model, layers), keep)
    frames = []
    for name in layers:
        spread = np.ptp(seen[name, source].numpy(), (0, 2, 3))  # (C,), of the last source
        live = spread.argsort()[(spread == 0).sum() :]  # constant channels are left out
        picked = live[np.linspace(0, len(live) - 1, min(channels, len(live))).round().astype(int)]
        for source, k, granularity in product(images, bits, granularities):
            frame = _histograms(seen[name, source], picked, k, granularity)
            frames.append(frame.assign(source=source, layer=name, bits=k, granularity=granularity))
    return pd.concat(frames, ignore_index=True)


def _histograms(x: Tensor, channels: np.ndarray, bits: int, granularity: str) -> pd.DataFrame:
    qparams = choose_qparams(x, bits, granularity)
    both = torch.stack([x, fake_quantize_with(x, qparams, bits)])[:, :, channels].flatten(3)  # (2, N, K, H * W)
    step, zero = (v.expand(*x.shape[:2], 1, 1)[:, channels, 0, 0] for v in (qparams.scale, qparams.zero_point))
    lowest, quality = (zero - 2 ** (bits - 1)) * step, running.sqnr_db(both[0], both[1], (2,))  # (N, K)
    frames = []
    for rank, channel in enumerate(channels):
        low, high = both[:, :, rank].min().item(), both[:, :, rank].max().item()
        edges = np.linspace(low, max(high, low + 1e-6), 33)
        for image in range(len(x)):
            count, count_quantized = (np.histogram(v, edges)[0] for v in both[:, image, rank])
            values = dict(image=image, channel=channel, rank=rank, bin_left=edges[:-1], bin_right=edges[1:])
            values |= dict(count=count, count_quantized=count_quantized, step=step[image, rank].item())
            values |= dict(lowest=lowest[image, rank].item(), levels_in_use=both[1, image, rank].unique().numel())
            frames.append(pd.DataFrame(values | {"sqnr_db": quality[image, rank].item()}))
    return pd.concat(frames, ignore_index=True)


def measure_scale_maps(
    model: nn.Module, images: Tensor, layers: str | Sequence[str], bits: int,
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES,
) -> pd.DataFrame:  # fmt: skip
    """Measure the quantization step of every image and channel in front of each layer, under each granularity.

    The batch ``images`` (N, 3, H, W) is also the group of ``per_tensor`` and ``per_channel``. Columns: layer, bits,
    granularity, image, channel, scale (the step 1/s, in units of the activation).
    """
    frames = []

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        for granularity in granularities:
            scale = _steps(running.by_channel(x), bits, granularity)
            image, channel = np.indices(tuple(scale.shape)).reshape(2, -1)
            values = dict(layer=name, bits=bits, granularity=granularity, image=image, channel=channel)
            frames.append(pd.DataFrame(values | {"scale": scale.flatten().cpu().numpy()}))

    names = [layers] if isinstance(layers, str) else layers
    running.run(model, [images], "scale maps", running.checked(model, names), visit)
    return pd.concat(frames, ignore_index=True)


def measure_channel_scales(
    model: nn.Module, batches: Iterable[Batch], granularity: str = "per_sample_channel", source: str = "synthetic", *,
    bits: int = 3,
) -> pd.DataFrame:  # fmt: skip
    """Measure the quantization step of every channel in front of every layer.

    ``per_tensor`` and ``per_channel`` have one range over all images, the others one for each image. Columns: layer,
    channel, source ("synthetic", "real"), granularity, bits, scale (the step, in units of the activation; mean over
    images), scale_min, scale_max (over images), images.
    """
    per_image = granularity in ("per_sample", "per_sample_channel")
    sums, lowest, highest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x)
        if per_image:  # extremes of the steps; of the values otherwise
            scale = _steps(x, bits, granularity).double()
            low, high = scale.amin(0), scale.amax(0)
            running.merge(sums, name, torch.stack([scale.sum(0), torch.full_like(low, len(x))]))
        else:
            low, high = (v.flatten().expand(x.shape[1]) for v in min_max(x, granularity))
        running.merge(lowest, name, low, torch.minimum)
        running.merge(highest, name, high, torch.maximum)

    count = running.run(model, batches, f"channel scales, {source}", layer_names(model), visit)
    frames = {}
    for name, low in lowest.items():
        high = highest[name]
        if per_image:
            mean = sums[name][0] / sums[name][1]
        else:
            mean = low = high = qparams_from_range(low, high, bits).scale
        columns = dict(scale=mean.double(), scale_min=low.double(), scale_max=high.double())
        frames[name] = pd.DataFrame(dict(source=source, granularity=granularity, bits=bits) | columns)
    return pd.concat(frames, names=["layer", "channel"]).reset_index().assign(images=count)


def _steps(x: Tensor, bits: int, granularity: str) -> Tensor:
    """Return the step of every image and channel, (N, C)."""
    return choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2])
