"""The GranQ quantizer: one scale and zero point per group of values, all groups in one vectorized step.

This file is the method. It knows tensors only. For ``k`` bits and a group with minimum ``m`` and maximum ``M``
(GranQ, arXiv 2503.18339, section 3; asymmetric uniform quantization)::

    scale_inv   s = (2^k - 1) / max(M - m, 1e-8)       a multiplier; the quantization step is 1/s
    zero_point  z = round(s * m) + 2^(k-1)             integral
    code        q = round(s * x - z)                   -2^(k-1) .. 2^(k-1)-1
    value       x^ = (q + z) / s

Which values share ``m`` and ``M`` is the *granularity*; everything else stays the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Granularity = Literal["per_tensor", "per_channel", "per_sample", "per_sample_channel", "per_out_channel", "per_kernel"]

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
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
EPS = 1e-8  # the smallest range; a constant group then has a large finite scale and comes back exactly


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

    Args:
        x: floating-point tensor, (N, C, H, W) or (N, F); weights (O, I, kh, kw) or (O, I).
        bits: bit width, 2 to 8.
        granularity: which values share a range, one of ``GRANULARITIES``.
        promote: compute half-precision ranges in float32, where ``1e-8`` does not underflow. ``False`` keeps the
            dtype of ``x``, as the public release does: constant float16 channels then give NaN.

    Returns:
        ``QParams(scale_inv, zero_point)``, each of the shape given at ``_KEPT_DIMS``. An empty group has the range
        [0, 0]. A group that holds a NaN or an infinity gets NaN parameters, so the damage stays visible in its group.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``bits`` is not an integer.
        ValueError: wrong number of dimensions, ``bits`` outside 2 to 8, unknown granularity.

    Example:
        >>> x = torch.tensor([0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 2)
        >>> choose_qparams(x, bits=3).scale_inv.item()
        3.5
    """
    return qparams_from_range(*min_max(x, granularity), bits, promote=promote)


def min_max(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every group of ``x``, with the reduced dimensions kept at size 1."""
    dims = _reduced_dims(x, granularity)
    x = x.detach()
    if x.numel() == 0:
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        zero = x.new_zeros(shape)
        return zero, zero
    if not dims:
        return x, x
    if dims in ((2, 3), (0, 2, 3)) and x.is_contiguous(memory_format=torch.channels_last):
        return _interleaved_min_max(x, dims)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def _interleaved_min_max(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``min_max`` of channels_last: first over whole rows of pixels, long vectors, where few channels would be slow."""
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n, h, w * c)
    over = (0, 1) if 0 in dims else (1,)
    low, high = rows.amin(over, keepdim=True), rows.amax(over, keepdim=True)  # (N or 1, 1, W * C)
    return low.view(-1, w, c).amin(1)[..., None, None], high.view(-1, w, c).amax(1)[..., None, None]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision, such as autocast gives, in float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def qparams_from_range(low: Tensor, high: Tensor, bits: int, *, promote: bool = True) -> QParams:
    """Scale and zero point of groups whose range is known: tracked ranges, or those of ``min_max``."""
    check_bits(bits)
    if promote:
        low, high = at_least_float32(low), at_least_float32(high)
    # As in docs/method.md: the epsilon bounds the range from below, it is not added to it. A tensor, not a float of
    # Python, so that in float16 it becomes zero just as in the release.
    span = torch.maximum(high - low, torch.tensor(EPS, dtype=low.dtype, device=low.device))
    scale_inv = (2**bits - 1) / span
    return QParams(scale_inv, torch.round(scale_inv * low) + 2 ** (bits - 1))


def quantize(x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool = True) -> Tensor:
    """Integer codes ``round(s * x - z)`` of ``x``.

    Args:
        x: floating-point tensor.
        scale_inv: multiplier ``s`` from ``choose_qparams``, broadcastable to ``x``.
        zero_point: ``z`` from ``choose_qparams``.
        bits: bit width, 2 to 8.
        clamp: keep codes within -2^(k-1) .. 2^(k-1)-1. Without it a tie in the rounding can give 2^(k-1), one above.

    Returns:
        Codes in the shape of ``x``: int8 if clamped, else int32 (an unclamped code may leave the range).

    Raises:
        ValueError: a code is not finite (NaN or infinity in ``x`` or in its range has no integer code).
    """
    _check_tensor(x)
    codes = _float_codes(x, scale_inv, zero_point, bits, clamp)
    if not torch.isfinite(codes).all():
        raise ValueError("quantize needs finite values, but x or its scale holds NaN or infinity")
    return codes.to(torch.int8 if clamp else torch.int32)


def dequantize(codes: Tensor, scale_inv: Tensor, zero_point: Tensor) -> Tensor:
    """Values ``(q + z) / s`` of integer codes, in the dtype of ``scale_inv``."""
    return (codes.to(scale_inv.dtype) + zero_point) / scale_inv


def fake_quantize(
    x: Tensor, bits: int, granularity: str = "per_sample_channel", clamp: bool = True, *, promote: bool = True
) -> Tensor:
    """Quantize and dequantize ``x`` with ranges taken from ``x`` itself; the gradient is one (straight-through).

    Args:
        x: floating-point tensor, (N, C, H, W) or (N, F).
        bits: bit width, 2 to 8.
        granularity: which values share a range, one of ``GRANULARITIES``.
        clamp: keep codes in range; the public release does not.
        promote: see ``choose_qparams``.

    Returns:
        Tensor of the shape and dtype of ``x`` with at most ``2**bits`` distinct values per group if clamped.

    Example:
        >>> x = torch.tensor([[0, 0.1, 0.2, 0.3]]).reshape(1, 1, 2, 2)
        >>> [round(v, 6) for v in fake_quantize(x, bits=3).flatten().tolist()]
        [0.0, 0.085714, 0.214286, 0.3]
    """
    if _fused is not None:
        _reduced_dims(x, granularity)  # what is wrong is said here, not by the compiler
        check_bits(bits)
        return _Fused.apply(x, bits, granularity, clamp, promote)
    return fake_quantize_with(x, choose_qparams(x, bits, granularity, promote=promote), bits, clamp)


def compile_quantizer(enabled: bool = True) -> bool:
    """Switch ``fake_quantize`` between its plain form and one that ``torch.compile`` fuses into two passes over memory.

    Codes are the same; only at ties of the rounding may they differ by one, where the compiler contracts ``s * x - z``.
    Without a working compiler the first call warns once and the plain form goes on. Returns what it was before.
    """
    global _fused
    before = _fused is not None
    _fused = _compiled() if enabled else None
    return before


#: for torch.compile: as many threads as there are when the code runs. Else the first tensor decides for all: compiled
#: for a small one, or in a process with one thread and kept on disk (pytorch issue 160812), it would have one.
ANY_THREADS: dict[str, Any] = {"cpp.dynamic_threads": True}


@cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    # a variant for each granularity, layout, kind of tensor: behind the eighth torch would go on uncompiled
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    return torch.compile(_plain, dynamic=True, options=ANY_THREADS)


def _plain(x: Tensor, bits: int, granularity: str, clamp: bool, promote: bool) -> tuple[Tensor, ...]:
    """``fake_quantize`` without its gradient, as one function for the compiler: values, scales, zero points.

    What is not an output the compiler computes again wherever it is read: a division for every 16 values.
    """
    qparams = choose_qparams(x, bits, granularity, promote=promote)
    return _dequantized_codes(x, *qparams, bits, clamp), *qparams


_fused: Callable[..., tuple[Tensor, ...]] | None = None  # compile_quantizer


def fake_quantize_with(x: Tensor, qparams: QParams, bits: int, clamp: bool = True) -> Tensor:
    """``fake_quantize`` with given parameters: tracked or static ranges."""
    return _StraightThrough.apply(x, *qparams, bits, clamp)


class _StraightThrough(torch.autograd.Function):
    """Forward: quantize and dequantize. Backward: identity (Bengio et al. 2013, straight-through estimator)."""

    @staticmethod  # with ctx: torch inspects the signature of a forward without it at every call, 50 microseconds
    def forward(ctx: Any, x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool) -> Tensor:
        return _dequantized_codes(x, scale_inv, zero_point, bits, clamp)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None, None


def fake_quantize_learned(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """``fake_quantize_with``, clamped, with a gradient for the scale as well: learned step size quantization.

    The gradient is one inside the range and zero where ``x`` was clamped; that of the step ``1 / s`` is the rounding
    error in steps inside the range, and the code itself outside (Esser et al., ICLR 2020, equation 3).
    """
    return _LearnedStep.apply(x, *qparams, bits)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        levels = _float_codes(x, scale_inv, zero_point, bits, clamp=True).add_(zero_point)
        ctx.save_for_backward(x, levels, scale_inv)
        return (levels / scale_inv).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, levels, scale_inv) = grad_outputs, ctx.saved_tensors
        # levels - x s in steps, in place as above; more than half a step (and the rounding of floats): clamped
        error = (x * scale_inv).neg_().add_(levels)
        inside = error.abs() <= 0.501
        # d value / d step, and step = 1 / s
        slope = torch.where(inside, error, levels).mul_(grad)
        return torch.where(inside, grad, 0), slope.sum_to_size(scale_inv.shape) / -scale_inv.square(), None, None


class _Fused(_StraightThrough):
    """``_StraightThrough`` around the compiled function, which finds the ranges as well."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bits: int, granularity: str, clamp: bool, promote: bool
    ) -> Tensor:
        global _fused
        if _fused is not None:
            try:
                # a plain tensor: compiled once, not per kind
                return _fused(x.detach(), bits, granularity, clamp, promote)[0]
            except Exception as error:  # whatever a missing or broken compiler raises
                reason = (str(error) or type(error).__name__).splitlines()[0]
                warnings.warn(f"the quantizer runs uncompiled: {reason}", stacklevel=2)
                _fused = None
        return _plain(x, bits, granularity, clamp, promote)[0]


def _dequantized_codes(x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool) -> Tensor:
    codes = _float_codes(x, scale_inv, zero_point, bits, clamp)
    # One new tensor, then in place: the same operations in the same order as the formula, without its copies.
    return codes.add_(zero_point).div_(scale_inv).to(x.dtype)


def _float_codes(x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int, clamp: bool) -> Tensor:
    check_bits(bits)
    codes = (x * scale_inv).sub_(zero_point).round_()
    return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if clamp else codes


def _reduced_dims(x: Tensor, granularity: str) -> tuple[int, ...]:
    _check_tensor(x)
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}; known: {', '.join(GRANULARITIES)}")
    kept = _KEPT_DIMS[granularity]
    if x.dim() == 2 and len(kept) == 2:
        kept = (0,)  # a row of a matrix: its single values cannot have a range of their own
    return tuple(d for d in range(x.dim()) if d not in kept)


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() not in (2, 4):
        raise ValueError(f"expected a 2-D (N, F) or 4-D (N, C, H, W) tensor, got shape {tuple(x.shape)}")


def check_bits(bits: int) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
