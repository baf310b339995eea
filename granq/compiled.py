"""``fake_quantize`` under ``torch.compile``: two passes over memory instead of one for every operation."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from granq import quantizer

#: As many threads as there are when the compiled code runs. Otherwise the first tensor decides for all, and the code
#: that is kept on disk would have the threads of the process that wrote it (pytorch issue 160812).
ANY_THREADS: dict[str, Any] = {"cpp.dynamic_threads": True}


def compile_quantizer(enabled: bool = True) -> bool:
    """Switch ``fake_quantize`` between its plain form and a compiled one; return what it was before.

    Codes are the same; only at ties of the rounding may they differ by one, where the compiler contracts ``s * x - z``.
    Needs a C++ compiler on the CPU.
    """
    before = quantizer._fused is not None
    quantizer._fused = _CompiledQuantizer.apply if enabled else None
    return before


def _plain(x: Tensor, bits: int, granularity: str, clamp: bool, promote: bool) -> tuple[Tensor, ...]:
    """Return values, scales, zero points. What is no output, the compiler computes again wherever it is read."""
    qparams = quantizer.choose_qparams(x, bits, granularity, promote=promote)
    return quantizer.dequantized_codes(x, *qparams, bits, clamp), *qparams


@cache
def _fused() -> Any:
    # A variant for each granularity, layout and kind of tensor: after the eighth torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(_plain, dynamic=True, options=ANY_THREADS)


class _CompiledQuantizer(torch.autograd.Function):
    """Straight-through, as the plain form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, granularity: str, clamp: bool, promote: bool) -> Tensor:
        return _fused()(x.detach(), bits, granularity, clamp, promote)[0]  # detached: compiled once for all kinds

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None, None
