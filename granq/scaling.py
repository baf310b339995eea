"""Where the scale goes: one quantized convolution, executed in four ways (docs/method.md, section 3).

With ``u = q + z`` the integers of the input (N, C, H, W), ``s`` their multiplier, ``v`` and ``t`` those of the weight
(O, C, kh, kw), every way computes ``y[o] = sum_c 1/(s_c t_oc) * conv(u[c], v[o, c])``, (N, O, H', W'):

1. ``layerwise``          one ``s``: an integer convolution, one rescale of its sums
2. ``accumulation_time``  every input channel is convolved in integers, rescaled and added: in a loop, or all at once
3. ``prescaled``          GranQ: ``u / s`` in one vectorized step, then one dense floating-point convolution
4. ``folded``             static scales multiplied into the weight once, then one dense floating-point convolution

Pre-scaling takes the rescale out of the sum and gives up integer accumulation for it. ``u`` holds the zero point, so
the zeros of the padding stand for the real value 0.
"""

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from granq.errors import UserError
from granq.quantizer import QParams, quantize


class Integers(NamedTuple):
    """A quantized tensor: ``values / scale_inv`` is what it stands for."""

    values: Tensor  #: ``u = q + z``, int8 where that is wide enough, else int16
    scale_inv: Tensor  #: the multiplier, broadcastable to ``values``

    def dequantize(self) -> Tensor:
        """Return, bit for bit, the values of ``fake_quantize`` in float32."""
        return self.values / self.scale_inv


class Conv(NamedTuple):
    """Arguments of a two-dimensional convolution, as those of ``nn.Conv2d``."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "Conv":
        """Return those of a layer. Raises UserError unless it pads with zeros, as many on both sides."""
        sides = layer._reversed_padding_repeated_twice  # left, right, top, bottom; also of padding="same"
        before, after = sides[::2], sides[1::2]
        if layer.padding_mode != "zeros" or before != after:
            raise UserError(f"only equal zero padding on both sides is executed in integers, not that of {layer}")
        return cls(layer.stride, tuple(before[::-1]), layer.dilation, layer.groups)

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        spans = zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in spans)


def to_integers(x: Tensor, qparams: QParams, bits: int) -> Integers:
    """Quantize ``x``, clamped, and hold ``q + z``. Raises UserError if that needs more than 16 bits."""
    values = quantize(x, *qparams, bits) + qparams.zero_point  # floats that are whole
    if (largest := values.abs().max()) >= 2**15:
        raise UserError(f"q + z reaches {largest:.0f}, beyond int16: choose ranges that hold zero")
    return Integers(values.to(torch.int8 if largest < 2**7 else torch.int16), qparams.scale_inv)


def accumulate(values: Tensor, weight: Tensor, conv: Conv, carrier: torch.dtype | None = None) -> Tensor:
    """Convolve integers exactly. Raises OverflowError if some sum may not fit ``carrier``.

    It is int32 unless given; float32 on a GPU, where PyTorch convolves no integers.
    """
    carrier = carrier or (torch.int32 if values.device.type == "cpu" else torch.float32)
    # one byte is no looser than its bound; of two, only the largest value says how many bits are in use
    most = values.abs().max() if values.dtype == torch.int16 else torch.iinfo(values.dtype).max
    largest = int(weight.abs().sum((1, 2, 3), dtype=torch.int64).max() * most)
    limit = 2**31 if carrier == torch.int32 else 2**24
    if largest >= limit:
        raise OverflowError(f"a sum may reach {largest}, which {carrier} does not hold exactly")
    return convolve(values.to(carrier), weight.to(carrier), conv)


def convolve(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """Return ``F.conv2d``. PyTorch dilates no integers: float64 holds their sums exactly."""
    if not x.is_floating_point() and conv.dilation != (1, 1):
        return convolve(x.double(), weight.double(), conv).to(x.dtype)
    return nn.functional.conv2d(x, weight, None, *conv)


def layerwise(x: Integers, weight: Integers, conv: Conv, carrier: torch.dtype | None = None) -> Tensor:
    """Convolve integers once, rescale once. Raises UserError unless all input channels and kernels share a scale."""
    if x.scale_inv.shape[1] != 1 or weight.scale_inv.shape[1] != 1:
        raise UserError("one rescale after the sum needs one scale for all input channels")
    factor = 1 / (x.scale_inv * weight.scale_inv.view(1, -1, 1, 1))  # (N or 1, O or 1, 1, 1)
    return accumulate(x.values, weight.values, conv, carrier) * factor


def accumulation_time(x: Integers, weight: Integers, conv: Conv, grouped: bool = False) -> Tensor:
    """Rescale each input channel inside the sum: in a loop, or ``grouped``, (N, C, O, H', W') in memory."""
    (n, c), o = x.values.shape[:2], len(weight.values)
    kernels = weight.values.transpose(0, 1).contiguous()  # (C, O, kh, kw)
    weight_scale = weight.scale_inv.expand(o, c, 1, 1).transpose(0, 1)
    factor = 1 / (x.scale_inv.expand(-1, c, 1, 1)[:, :, None] * weight_scale)  # (N or 1, C, O, 1, 1)
    if grouped:
        partial = accumulate(x.values, kernels.flatten(0, 1)[:, None], conv._replace(groups=c))
        return (partial.unflatten(1, (c, o)) * factor).sum(1)
    out = factor.new_zeros(n, o, *conv.output_size(x.values.shape[2:], kernels.shape[2:]))
    for i in range(c):
        out += accumulate(x.values[:, i : i + 1], kernels[i][:, None], conv) * factor[:, i]
    return out


def prescaled(x: Integers, weight: Tensor, conv: Conv) -> Tensor:
    """Rescale all channels in one vectorized step, then convolve once with the dequantized ``weight``: GranQ."""
    return convolve(x.dequantize(), weight, conv)


def fold(weight: Integers, scale_inv: Tensor) -> Tensor:
    """Multiply the steps of the input channels, ``scale_inv`` (1, C or 1, 1, 1), into the weight, for ``folded``."""
    return weight.dequantize() * (1 / scale_inv).expand(1, -1, 1, 1)


def folded(x: Integers, folded_weight: Tensor, conv: Conv) -> Tensor:
    """Convolve the integers once with the weight of ``fold``; no rescale is left."""
    return convolve(x.values.to(folded_weight.dtype), folded_weight, conv)


def float_bound(x: Integers, weight: Integers, conv: Conv) -> Tensor:
    """Bound how far two executions may be apart at every output, in float64: ``(K + 4) * eps * sum(|x^| * |w^|)``.

    A product meets at most 4 + (K - 1) roundings of half an eps: two for scales, the rescale, its own, and the sum of
    K terms. Twice that keeps two apart (Higham 2002, section 3.1); one more eps is for the second order.
    """
    magnitude = convolve(x.dequantize().abs().double(), weight.dequantize().abs().double(), conv)
    return (weight.values[0].numel() + 4) * torch.finfo(x.scale_inv.dtype).eps * magnitude


def count_scaling(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], conv: Conv) -> pd.DataFrame:
    """Count what the executions do with one-byte integers and four-byte sums in one forward.

    A scale multiplication is one activation or one sum times (or divided by) a scale. Bytes: every operation reads each
    activation-sized operand once and writes its result once; the convolution also reads the weights. Factors have no
    spatial size and do not count. Columns: execution, scale_multiplications, bytes.
    """
    inputs, weights = math.prod(x_shape), math.prod(weight_shape)
    outputs = x_shape[0] * weight_shape[0] * math.prod(conv.output_size(x_shape[2:], weight_shape[2:]))
    partials = outputs * weight_shape[1]  # every output channel gets one from each input channel of its group
    read = (1 + 4) * inputs + 4 * (inputs + weights)  # one byte becomes four; then the convolution reads
    rows = [  # sums are written, rescaled, and added: in the loop to an output that starts as zeros
        ("layer-wise", outputs, read + (4 + 8) * outputs),
        ("accumulation-time, loop", partials, read + (4 + 8 + 12) * partials + 4 * outputs),
        ("accumulation-time, grouped", partials, read + (4 + 8 + 4) * partials + 4 * outputs),
        ("pre-scaled", inputs, read + 4 * outputs),
        ("folded", 0, read + 4 * outputs),
    ]
    return pd.DataFrame(rows, columns=["execution", "scale_multiplications", "bytes"])
