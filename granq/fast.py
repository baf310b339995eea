"""Speed: the same numbers as the plain formulas, sooner. Knows tensors only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def min_max_channels_last(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``x.amin(dims)`` and ``x.amax(dims)`` of channels_last (N, C, H, W), ``dims`` (2, 3) or (0, 2, 3), dims kept."""
    # whole rows of pixels are reduced first, which are long vectors; few channels on their own would be slow
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n, h, w * c)
    over = (0, 1) if 0 in dims else (1,)
    low, high = rows.amin(over, keepdim=True), rows.amax(over, keepdim=True)  # (N or 1, 1, W * C)
    return low.view(-1, w, c).amin(1)[..., None, None], high.view(-1, w, c).amax(1)[..., None, None]


class _ChannelVarMean(torch.autograd.Function):
    """``torch.var_mean`` is slow on channels_last with few channels; in float32 this backward reads ``x`` once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        full = x.to(torch.promote_types(x.dtype, torch.float32))  # arithmetic of two dtypes is slow
        mean = full.mean((0, 2, 3))
        ctx.save_for_backward(x, mean)
        return (full - mean[:, None, None]).square_().mean((0, 2, 3)), mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope, shift = 2 * grads[0] / count, grads[1] / count  # the mean inside the variance changes nothing
        full = x.to(mean.dtype)
        return torch.addcmul((shift - slope * mean)[:, None, None], full, slope[:, None, None]).to(x.dtype)


#: Biased variance and mean of every channel, (N, C, H, W) -> (C,), (C,), in float32 at least.
channel_var_mean: Callable[[Tensor], tuple[Tensor, Tensor]] = _ChannelVarMean.apply


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(F.interpolate(x, scale_factor=2.0))`` of a 3x3 convolution with padding 1, (N, I, H, W) -> (N, O, 2H, 2W).

    Of the nine pixels that an output reads only four differ. The 3x3 kernel, summed over every 2x2 window, is that of a
    transposed convolution of stride 2: 4 products per output instead of 9.
    """
    out_channels, in_channels = conv.weight.shape[:2]
    windows = F.conv2d(conv.weight.flip(2, 3).reshape(-1, 1, 3, 3), conv.weight.new_ones(1, 1, 2, 2), padding=1)
    kernel = windows.view(out_channels, in_channels, 4, 4).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
