"""The GranQ quantizer: one scale and zero point per group of values, all groups in one vectorized step.

This file is the method. It knows tensors only. For ``k`` bits and a group with minimum ``m`` and maximum ``M``
(GranQ, arXiv 2503.18339, section 3; asymmetric uniform quantization)::

    scale_inv   s = (2^k - 1) / max(M - m, 1e-8)       a multiplier; the quantization step is 1/s
    zero_point  z = round(s * m) + 2^(k-1)             integral
    code        q = round(s * x - z)                   -2^(k-1) .. 2^(k-1)-1
    value       x^ = (q + z) / s

Which values share ``m`` and ``M`` is the *granularity*; everything else stays the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from granq import fast
from granq.errors import UserError, one_of
from granq.schemes import GRANULARITIES, check_bits

#: The dimensions that keep their own range. All other dimensions are reduced and share it.
#:
#:   granularity          x (N, C, H, W) -> scale     x (N, F) -> scale
#:   per_tensor           (1, 1, 1, 1)                (1, 1)
#:   per_channel          (1, C, 1, 1)                (1, F)
#:   per_sample           (N, 1, 1, 1)                (N, 1)
#:   per_sample_channel   (N, C, 1, 1)                (N, 1)     GranQ, activations
#:   per_out_channel      (O, 1, 1, 1)                (O, 1)     the usual for weights (O, I, kh, kw)
#:   per_kernel           (O, I, 1, 1)                (O, 1)     GranQ's release, weights
_KEPT_DIMS: dict[str, tuple[int, ...]] = {
    "per_tensor": (),
    "per_channel": (1,),
    "per_sample": (0,),
    "per_sample_channel": (0, 1),
    "per_out_channel": (0,),
    "per_kernel": (0, 1),
}
EPS = 1e-8  # the smallest range; a constant group then has a large finite scale and comes back within rounding


class QParams(NamedTuple):
    """Quantization parameters of every group, broadcastable against the tensor they belong to."""

    scale_inv: Tensor  #: the multiplier ``s``; the quantization step is ``1 / s``
    zero_point: Tensor  #: ``z``, integral, stored as floating point

    @property
    def scale(self) -> Tensor:
        """The quantization step ``1 / scale_inv``, in units of the tensor."""
        return 1 / self.scale_inv


def choose_qparams(x: Tensor, bits: int, granularity: str = "per_sample_channel", *, promote: bool = True) -> QParams:
    """Choose scale and zero point of every group from the minimum and maximum of its values.

    ``x`` is (N, C, H, W), (N, F), or weights (O, I, kh, kw), (O, I); both results have the shape given at
    ``_KEPT_DIMS``. The values of a group that holds a NaN or an infinity become NaN, so the damage stays visible in its
    group. With ``promote`` half-precision ranges are computed in float32, where ``1e-8`` does not underflow; without
    it, as in the public release, constant float16 channels give NaN.

    Raises UserError for another tensor, ``bits`` outside 2 to 8 or an unknown granularity.

    Example:
        >>> x = torch.tensor([0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 2)
        >>> choose_qparams(x, bits=3).scale_inv.item()
        3.5
    """
    return qparams_from_range(*min_max(x, granularity), bits, promote=promote)


def min_max(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of every group of ``x``, with the reduced dimensions kept at size 1."""
    one_of("granularity", granularity, GRANULARITIES)
    if not x.is_floating_point() or x.dim() not in (2, 4):
        raise UserError(f"expected a floating-point tensor (N, F) or (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    kept = _KEPT_DIMS[granularity]
    if x.dim() == 2 and len(kept) == 2:
        kept = (0,)  # a row of a matrix: its single values cannot have a range of their own
    dims = tuple(d for d in range(x.dim()) if d not in kept)
    x = x.detach()
    if dims in ((2, 3), (0, 2, 3)) and x.is_contiguous(memory_format=torch.channels_last):
        return fast.min_max_channels_last(x, dims)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def qparams_from_range(low: Tensor, high: Tensor, bits: int, *, promote: bool = True) -> QParams:
    """Compute scale and zero point of groups whose range is known: tracked ranges, or those of ``min_max``."""
    bits = check_bits(bits)
    if promote:
        low, high = at_least_float32(low), at_least_float32(high)
    # The epsilon bounds the range from below, it is not added to it. It is a tensor and no float of Python, so that in
    # float16 it becomes zero just as in the release; made on the device, as a copy to a GPU would wait for it.
    span = torch.maximum(high - low, low.new_full((), EPS))
    scale_inv = (2**bits - 1) / span
    return QParams(scale_inv, torch.round(scale_inv * low) + 2 ** (bits - 1))


def quantize(x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool = True) -> Tensor:
    """Quantize ``x`` to integer codes ``round(s * x - z)`` in its shape, with parameters that broadcast to it.

    ``clamp`` keeps codes within -2^(k-1) .. 2^(k-1)-1, in int8. Without it, in int32, a tie in the rounding can
    give 2^(k-1), one above. Raises UserError for NaN or infinity in ``x`` or its range: they have no integer code.
    """
    codes = float_codes(x, scale_inv, zero_point, bits, clamp)
    if not torch.isfinite(codes).all():
        raise UserError("quantize needs finite values, but x or its scale holds NaN or infinity")
    return codes.to(torch.int8 if clamp else torch.int32)


def dequantize(codes: Tensor, scale_inv: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values ``(q + z) / s`` of integer codes, in the dtype of ``scale_inv``."""
    return (codes.to(scale_inv.dtype) + zero_point) / scale_inv


def fake_quantize(
    x: Tensor, bits: int, granularity: str = "per_sample_channel", clamp: bool = True, *, promote: bool = True
) -> Tensor:
    """Quantize and dequantize ``x`` with ranges taken from ``x`` itself; the gradient is one (straight-through).

    The result has the shape and dtype of ``x``, (N, C, H, W) or (N, F), and at most ``2**bits`` distinct values per
    group if clamped, which the public release does not do. ``promote`` is that of ``choose_qparams``.

    Example:
        >>> x = torch.tensor([[0, 0.1, 0.2, 0.3]]).reshape(1, 1, 2, 2)
        >>> [round(v, 6) for v in fake_quantize(x, bits=3).flatten().tolist()]
        [0.0, 0.085714, 0.214286, 0.3]
    """
    return fake_quantize_with(x, choose_qparams(x, bits, granularity, promote=promote), bits, clamp)


def fake_quantize_with(x: Tensor, qparams: QParams, bits: int, clamp: bool = True) -> Tensor:
    """Quantize and dequantize ``x`` with given parameters: tracked or static ranges."""
    return _StraightThrough.apply(x, *qparams, bits, clamp)


class _StraightThrough(torch.autograd.Function):
    """Forward: quantize and dequantize. Backward: identity (Bengio et al. 2013, straight-through estimator)."""

    @staticmethod  # with ctx: torch inspects the signature of a forward without it at every call, 50 microseconds
    def forward(ctx: Any, x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool) -> Tensor:
        codes = float_codes(x, scale_inv, zero_point, bits, clamp)
        # In place: the same operations in the same order as the formula, without its copies.
        return codes.add_(zero_point).div_(scale_inv).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None, None


def float_codes(x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool) -> Tensor:
    """Return the codes of ``quantize``, still in floating point."""
    bits = check_bits(bits)
    codes = (x * scale_inv).sub_(zero_point).round_()
    return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if clamp else codes


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision, such as autocast gives, in float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
