"""Ranges that are not those of one tensor: quantiles, and steps that are learned (LSQ)."""

from typing import Any

import torch
from torch import Tensor, nn

from granq.quantizer import QParams, at_least_float32, float_codes


def best_quantile(bits: int) -> float:
    """Return the share of its values that a static range holds, for the least squared error: 0.99 at 3 bits.

    Every further bit divides the share outside by 3.5. For normal and exponential values after a ReLU, at 2 to 8 bits,
    this is within half of the best share (the optima of ACIQ, Banner et al., NeurIPS 2019, computed).
    """
    return 1 - 0.01 * 3.5 ** (3 - bits)


def quantile_range(x: Tensor, granularity: str, quantile: float) -> tuple[Tensor, Tensor]:
    """Return ends of every group's range, ``per_tensor`` or ``per_channel``, beyond which lie ``1 - quantile`` values.

    Positive and negative values are counted apart: after a ReLU most are zero, and say nothing of the range.
    """
    rows = x.transpose(0, 1).flatten(1) if granularity == "per_channel" else x.reshape(1, -1)
    above, below = (((1 - quantile) * side.sum(1, True)).long() for side in (rows > 0, rows < 0))
    high = rows.topk(int(above.max()) + 1).values.gather(1, above)
    low = rows.topk(int(below.max()) + 1, largest=False).values.gather(1, below)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return low.view(shape), high.view(shape)


class LearnedSteps(nn.Module):
    """Parameters whose steps are learned, as logarithms: a gradient step changes them by a share. Zero points stay."""

    def __init__(self, scale_inv: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.log_step = nn.Parameter(-scale_inv.detach().log())
        self.zero_point = nn.Buffer(zero_point.clone())

    def forward(self) -> QParams:
        return QParams(torch.exp(-at_least_float32(self.log_step)), at_least_float32(self.zero_point))


class LearnedStep(torch.autograd.Function):
    """Quantize and dequantize ``x``, clamped, with a gradient for the scale as well.

    The gradient is one inside the range and zero where ``x`` was clamped; that of the step ``1 / s`` is the rounding
    error in steps inside the range, and the code itself outside (LSQ, Esser et al., ICLR 2020, equation 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_inv: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        levels = float_codes(x, scale_inv, zero_point, bits, clamp=True).add_(zero_point)
        ctx.save_for_backward(x, levels, scale_inv)
        return (levels / scale_inv).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, levels, scale_inv = ctx.saved_tensors
        grad, scaled = grad_outputs[0].to(levels.dtype), x * scale_inv
        # what lies beyond half a step was clamped; an operation on booleans would be slow on a CPU
        inside = torch.ops.aten.hardtanh_backward(grad, levels - scaled, -0.501, 0.501)
        slope = (levels * grad).sub_(scaled.mul_(inside))  # d value / d step, and step = 1 / s
        return inside.to(x.dtype), slope.sum_to_size(scale_inv.shape) / -scale_inv.square(), None, None
