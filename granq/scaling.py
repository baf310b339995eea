"""Where the scale goes: one quantized convolution, executed in four ways (docs/method.md section 3).

With ``u = q + z`` the integers of the input, ``s`` their multiplier, ``v`` and ``t`` those of the weight, every way
computes ``y[o] = sum_c 1/(s_c t_oc) * conv(u[c], v[o, c])``:

1. ``layerwise``          one ``s``: an integer convolution, one rescale of its sums
2. ``accumulation_time``  every input channel is convolved in integers, rescaled and added: in a loop, or all at once
3. ``prescaled``          GranQ: ``u / s`` in one vectorized step, then one dense floating-point convolution
4. ``folded``             static scales multiplied into the weight once, then one dense floating-point convolution

Pre-scaling takes the rescale out of the sum and gives up integer accumulation for it. Since ``u`` holds the zero point,
the zeros of the padding stand for the real value 0 whatever the zero points are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granq.convert import Scheme, get_scheme
from granq.quantizer import QParams, quantize

Pair = tuple[int, int]


class Integers(NamedTuple):
    """A quantized tensor: ``values / scale_inv`` is what it stands for."""

    values: Tensor  #: ``u = q + z``, int8 where that is wide enough, else int16; (N, C, H, W) or (O, C/groups, kh, kw)
    scale_inv: Tensor  #: the multiplier, broadcastable to ``values``

    def dequantize(self) -> Tensor:
        """Bit for bit the values of ``fake_quantize``."""
        return self.values / self.scale_inv


class Conv(NamedTuple):
    """Arguments of a two-dimensional convolution, as those of ``nn.Conv2d``."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Conv:
        """Arguments of a layer. Raises ValueError unless it pads with zeros by a number of pixels."""
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError("only numeric zero padding is executed in integers")
        stride, padding, dilation = ((a, b) for a, b in (layer.stride, layer.padding, layer.dilation))
        return cls(stride, padding, dilation, layer.groups)

    def output_size(self, size: Pair, kernel: Pair) -> Pair:
        """Height and width of the output."""
        spans = zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in spans)
        return height, width


PLAIN = Conv()


def to_integers(x: Tensor, qparams: QParams, bits: int) -> Integers:
    """Quantize ``x``, clamped, and hold ``q + z`` as integers.

    Raises:
        ValueError: a range so far from zero (or so narrow) that ``q + z`` does not fit 16 bits; ranges that hold zero
            always fit. NaN and infinities have no integer either.
    """
    values = quantize(x, *qparams, bits) + qparams.zero_point  # floats that are whole
    largest = values.abs().max().item() if values.numel() else 0
    if largest >= 2**15:
        raise ValueError(f"q + z reaches {largest:.0f}, beyond int16: choose ranges that hold zero")
    return Integers(values.to(torch.int8 if largest < 2**7 else torch.int16), qparams.scale_inv)


def accumulate(values: Tensor, weight: Tensor, conv: Conv, carrier: torch.dtype = torch.int32) -> Tensor:
    """The convolution of two integer tensors, exact, in ``carrier``.

    Args:
        values: integers (N, C, H, W).
        weight: integers (O, C/groups, kh, kw).
        conv: the arguments.
        carrier: int32 (PyTorch: only on the CPU, and slow there), or a floating-point type that holds every sum.

    Raises:
        OverflowError: the largest possible sum of this weight with these values does not fit the carrier.
    """
    per_filter = weight.abs().sum((1, 2, 3), dtype=torch.int64)  # of the type, not of the data: no pass over them
    largest = int(per_filter.max()) * torch.iinfo(values.dtype).max
    limit = 2**31 if carrier == torch.int32 else int(2 / torch.finfo(carrier).eps)  # 2**24 for float32
    if largest >= limit:
        raise OverflowError(f"a sum may reach {largest}, which {carrier} does not hold exactly")
    return convolve(values.to(carrier), weight.to(carrier), conv)


def convolve(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """``F.conv2d``, also of integers with a dilated kernel, which PyTorch has not: it is written out with its zeros."""
    (dy, dx), (*io, h, w) = conv.dilation, weight.shape
    if not x.is_floating_point() and (dy, dx) != (1, 1):
        wide = weight.new_zeros((*io, dy * (h - 1) + 1, dx * (w - 1) + 1))
        wide[..., ::dy, ::dx] = weight
        weight, conv = wide, conv._replace(dilation=(1, 1))
    return F.conv2d(x, weight, None, *conv)


def layerwise(x: Integers, weight: Integers, conv: Conv = PLAIN, carrier: torch.dtype = torch.int32) -> Tensor:
    """One integer convolution, one rescale: (N, O, H', W').

    Raises:
        ValueError: several input channels, or several kernels of a filter, have scales of their own.
    """
    if x.scale_inv.shape[1] != 1 or weight.scale_inv.shape[1] != 1:
        raise ValueError("one rescale behind the sum needs one scale for all input channels")
    factor = 1 / (x.scale_inv * weight.scale_inv.view(1, -1, 1, 1))  # (N or 1, O or 1, 1, 1)
    return accumulate(x.values, weight.values, conv, carrier) * factor


def accumulation_time(
    x: Integers, weight: Integers, conv: Conv = PLAIN, grouped: bool = False, carrier: torch.dtype = torch.int32
) -> Tensor:
    """Every input channel rescaled inside the sum: (N, O, H', W').

    Args:
        x: any scales.
        weight: any scales that do not vary within a kernel.
        conv: the arguments.
        grouped: all partial sums at once, (N, C, O/groups, H', W') in memory, instead of a loop over channels.
        carrier: see ``accumulate``.
    """
    (n, c), (o, per_group) = x.values.shape[:2], weight.values.shape[:2]
    wide = o // conv.groups  # output channels that read one input channel
    # kernels and their scales, by the input channel they read: (C, wide, kh, kw) and (C, wide, 1, 1)
    kernels, weight_scale = (
        t.unflatten(0, (conv.groups, wide)).transpose(1, 2).flatten(0, 1)
        for t in (weight.values, weight.scale_inv.expand(o, per_group, 1, 1))
    )
    factor = 1 / (x.scale_inv.expand(-1, c, 1, 1)[:, :, None] * weight_scale)  # (N or 1, C, wide, 1, 1)
    if grouped:
        partial = accumulate(x.values, kernels.flatten(0, 1)[:, None], conv._replace(groups=c), carrier)
        scaled = partial.unflatten(1, (c, wide)) * factor  # (N, C, wide, H', W')
        return scaled.unflatten(1, (conv.groups, per_group)).sum(2).flatten(1, 2)
    height, width = conv.output_size((x.values.shape[2], x.values.shape[3]), (kernels.shape[2], kernels.shape[3]))
    out = torch.zeros(n, conv.groups, wide, height, width, dtype=factor.dtype, device=x.values.device)
    for i in range(c):
        partial = accumulate(x.values[:, i : i + 1], kernels[i][:, None], conv._replace(groups=1), carrier)
        out[:, i // per_group].add_(partial * factor[:, i])
    return out.flatten(1, 2)


def prescaled(x: Integers, weight: Tensor, conv: Conv = PLAIN) -> Tensor:
    """GranQ: all channels rescaled in one vectorized step, then one dense convolution: (N, O, H', W').

    Args:
        x: any scales.
        weight: dequantized, floating point; this was done once.
        conv: the arguments.
    """
    return convolve(x.dequantize(), weight, conv)


def fold(weight: Integers, scale_inv: Tensor, conv: Conv = PLAIN) -> Tensor:
    """The dequantized weight times the steps of the input channels it reads, for ``folded``.

    Args:
        weight: (O, C/groups, kh, kw).
        scale_inv: of the input, the same for every image: (1, C or 1, 1, 1).
        conv: the arguments.

    Raises:
        ValueError: images have scales of their own, which no single weight can hold.
    """
    if scale_inv.shape[0] != 1:
        raise ValueError("the scales differ between images, and one weight serves all of them")
    o, per_group = weight.values.shape[:2]
    step = (1 / scale_inv).expand(1, per_group * conv.groups, 1, 1).reshape(conv.groups, per_group, 1, 1)
    return weight.dequantize() * step.repeat_interleave(o // conv.groups, 0)


def folded(x: Integers, folded_weight: Tensor, conv: Conv = PLAIN) -> Tensor:
    """One dense convolution of the integers with the weight of ``fold``; no rescale is left: (N, O, H', W')."""
    return convolve(x.values.to(folded_weight.dtype), folded_weight, conv)


def float_bound(x: Integers, weight: Integers, conv: Conv = PLAIN) -> Tensor:
    """How far two executions may be apart at every output, in float64: ``(K + 4) * eps * sum(|x^| * |w^|)``.

    No product meets more than 4 + (K - 1) roundings of half an eps: the reciprocal and product of scales, rescale or
    dequantization, and the product itself are 4 at most (``folded``), the sum of K terms adds K - 1. Two executions are
    apart by at most twice that to first order (Higham 2002, section 3.1); one more eps covers the second order.
    """
    fan_in = weight.values[0].numel()
    magnitude = convolve(x.dequantize().abs().double(), weight.dequantize().abs().double(), conv)
    return (fan_in + 4) * torch.finfo(x.scale_inv.dtype).eps * magnitude


def count_scaling(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], conv: Conv = PLAIN) -> pd.DataFrame:
    """Exact counts of what the executions do with one-byte integers and four-byte sums, one forward.

    A scale multiplication is one activation or one sum times (or divided by) a scale. Bytes: every operation reads each
    activation-sized operand once and writes its result once, as PyTorch executes it here; of weights, only what the
    convolution reads. Weights are prepared once, and the factors of the rescale have no spatial size: neither counts.

    Args:
        x_shape: (N, C, H, W).
        weight_shape: (O, C/groups, kh, kw).
        conv: the arguments.

    Returns:
        Columns execution, scale_multiplications, bytes.
    """
    size = conv.output_size((x_shape[2], x_shape[3]), (weight_shape[2], weight_shape[3]))
    inputs, weights = math.prod(x_shape), math.prod(weight_shape)
    outputs = x_shape[0] * weight_shape[0] * math.prod(size)
    partials = outputs * weight_shape[1]  # every output channel gets one from each input channel of its group
    widen = (1 + 4) * inputs  # one byte becomes four: read and write
    convolve = 4 * (inputs + weights)
    rows = {
        "layer-wise": (outputs, widen + convolve + 4 * outputs + 8 * outputs),
        # partial sum written; rescaled; added to the output, which starts as zeros
        "accumulation-time, loop": (partials, widen + convolve + (4 + 8 + 12) * partials + 4 * outputs),
        # partial sums written; rescaled; summed
        "accumulation-time, grouped": (partials, widen + convolve + (4 + 8 + 4) * partials + 4 * outputs),
        "pre-scaled": (inputs, widen + convolve + 4 * outputs),
        "folded": (0, widen + convolve + 4 * outputs),
    }
    values = [(name, *counts) for name, counts in rows.items()]
    return pd.DataFrame(values, columns=["execution", "scale_multiplications", "bytes"])


def folds(scheme: str | Scheme) -> tuple[bool, str]:
    """Whether the activation scales of a scheme can be multiplied into the weights beforehand, and why (not).

    Raises:
        ValueError: unknown scheme.

    Example:
        >>> folds("release")[0]
        False
    """
    scheme = get_scheme(scheme)
    if scheme.activations is None:
        return False, "Activations stay in full precision: there is no scale to fold."
    if scheme.activations not in ("per_tensor", "per_channel"):
        return False, "Every image has scales of its own, and one weight serves all images."
    if not scheme.tracked:
        return False, "Ranges are taken anew from every batch: the scales are unknown when the weights are prepared."
    behind = " This holds where a layer reads a quantized place directly." if scheme.places == "relu" else ""
    if scheme.fold:
        return True, "Scales are static and folded before the weights are quantized: the convolution stays integer."
    if scheme.activations == "per_tensor":
        return True, "One static scale leaves the sum altogether: an integer convolution and one rescale." + behind
    return True, (
        "Scales are static, one for each input channel; the folded weight leaves its own grid, so that the convolution "
        "is floating point." + behind
    )
