"""One output value of a layer in integers, product by product."""

from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn

from granq.convert import weight_quantizer
from granq.integer import IntegerLayer
from granq.measure import running


@torch.no_grad()
def measure_integer_walk(
    student: fx.GraphModule, images: Tensor, layer: str, channels: int = 4, pixels: int = 16
) -> pd.DataFrame:
    """Compute outputs of a convolution of a calibrated foldable student in integers, for the first of ``images``.

    Returns:
        One row per product, of ``channels`` and ``pixels`` of the output, evenly spaced: channel, row, column (of the
        output), input_channel, place (in the kernel), q and z (code and zero point of the input, zero in the padding),
        v (integer weight), sum (int32, of all (q + z) * v), rescale, offset, value (rescale * sum + offset), student
        (what it computes in floating point), layer.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    running.run(student, [images[:1]], "integer walk", [layer], lambda _, x, out: seen.append((x, out.clone())))
    (x, output), conv = seen[0], cast(Any, student.get_submodule(layer))
    integer, (scale_inv, zero_point) = IntegerLayer(conv), cast(Any, weight_quantizer(conv)).source.qparams()
    u = (x * scale_inv).round()  # x lies on the grid: exact
    sums = integer.accumulate(u)
    geometry = dict(dilation=conv.dilation, padding=conv.padding, stride=conv.stride)
    windows = [nn.functional.unfold(t, conv.kernel_size, **geometry)[0] for t in (u, zero_point.expand_as(u))]
    fan_in, per_group = integer.weight[0].numel(), len(integer.weight) // conv.groups
    frames, (tall, wide) = [], output.shape[2:]
    for channel in running.spread(len(integer.weight), channels):
        start = channel // per_group * fan_in  # of the inputs of its group
        for pixel in running.spread(tall * wide, pixels):
            codes, zeros = (w[start : start + fan_in, pixel].int().cpu().numpy() for w in windows)
            at = (0, channel, *divmod(int(pixel), wide))
            index, places = np.arange(start, start + fan_in), conv.weight[0, 0].numel()
            facts = dict(channel=channel, row=at[2], column=at[3], input_channel=index // places, place=index % places)
            facts |= dict(
                q=codes - zeros, z=zeros, v=integer.weight[channel].flatten().cpu().numpy(), sum=sums[at].item()
            )
            facts |= dict(rescale=integer.rescale[channel].item(), offset=integer.offset[channel].item())
            frames.append(
                pd.DataFrame(facts | dict(value=integer.rescaled(sums)[at].item(), student=output[at].item()))
            )
    return pd.concat(frames, ignore_index=True).assign(layer=layer)
