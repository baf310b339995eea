"""The quantization steps in front of a network's layers."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from granq.graph import layer_names
from granq.hooks import Batch
from granq.measure import running
from granq.measure.running import ACTIVATION_GRANULARITIES
from granq.quantizer import choose_qparams, min_max, qparams_from_range


def measure_scale_maps(
    model: nn.Module,
    images: Tensor,
    layers: str | Sequence[str],
    bits: int,
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES,
) -> pd.DataFrame:
    """Measure the quantization step of every image and channel in front of each layer, under each granularity.

    ``images`` is one batch (N, 3, H, W), which is also the group of ``per_tensor`` and ``per_channel``.

    Returns:
        Columns layer, bits, granularity, image, channel, scale (the step 1/s, in units of the activation).
    """
    frames = []

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x)
        for granularity in granularities:
            scale = _by_image(x, bits, granularity)
            image, channel = np.indices(tuple(scale.shape)).reshape(2, -1)
            values = dict(layer=name, bits=bits, granularity=granularity, image=image, channel=channel)
            frames.append(pd.DataFrame(values | {"scale": scale.flatten().cpu().numpy()}))

    names = [layers] if isinstance(layers, str) else layers
    running.run(model, [images], "scale maps", running.checked(model, names), visit)
    return pd.concat(frames, ignore_index=True)


def measure_channel_scales(
    model: nn.Module,
    batches: Iterable[Batch],
    granularity: str = "per_sample_channel",
    source: str = "synthetic",
    *,
    bits: int = 3,
) -> pd.DataFrame:
    """Measure the quantization step of every channel in front of every layer.

    ``per_tensor`` and ``per_channel`` have one range over all images, ``per_sample`` and ``per_sample_channel`` one
    range per image, of which the mean and the extremes are kept. ``source`` ("synthetic", "real") is a column.

    Returns:
        Columns layer, channel, source, granularity, bits, scale (step, in units of the activation; mean over
        images), scale_min, scale_max (over images), images.
    """
    per_image = granularity in ("per_sample", "per_sample_channel")
    sums, lowest, highest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x)
        if per_image:  # extremes of the scales; of the values otherwise
            scale = _by_image(x, bits, granularity).double()
            low, high = scale.amin(0), scale.amax(0)
            running.merge(sums, name, torch.stack([scale.sum(0), torch.full_like(low, len(x))]))
        else:
            low, high = (v.flatten().expand(x.shape[1]) for v in min_max(x, granularity))
        running.merge(lowest, name, low, torch.minimum)
        running.merge(highest, name, high, torch.maximum)

    count = running.run(model, batches, f"channel scales, {source}", layer_names(model), visit)
    frames = []
    for name, low in lowest.items():
        high = highest[name]
        if per_image:
            mean = sums[name][0] / sums[name][1]
        else:
            mean = low = high = qparams_from_range(low, high, bits).scale
        values = dict(layer=name, channel=range(len(mean)), source=source, granularity=granularity, bits=bits)
        scales = dict(scale=mean.double(), scale_min=low.double(), scale_max=high.double())
        frames.append(pd.DataFrame(values | scales))
    return pd.concat(frames, ignore_index=True).assign(images=count)


def _by_image(x: Tensor, bits: int, granularity: str) -> Tensor:
    """Return the step of every image and channel, (N, C)."""
    return choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2])
