"""One run on several devices or machines, started by ``torchrun``: what the processes must agree on.

Every process draws the whole joint batch from the same random state and works on its own part of it. Logits are
gathered, BatchNorm statistics, activation ranges and gradients are taken over all parts, so that the result is that of
one process with the joint batch, up to the order of sums. With one process every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn import functional as differentiable

from granq.quantizer import at_least_float32


def world() -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """Join the group torchrun set up, if it did, and make this process's GPU the current one; yields the rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def own_part(x: Tensor) -> Tensor:
    """This process's rows of a joint batch (N, ...) -> (N / processes, ...)."""
    rank, size = world()
    return x.chunk(size)[rank]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, (n, ...) -> (n * processes, ...), with gradient."""
    return x if world()[1] == 1 else torch.cat(differentiable.all_gather(x.contiguous()))


def joint_var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean per channel of (N, C, H, W) over all processes, each (C,), with gradient."""
    var, mean = _JointVarMean.apply(x)
    return var, mean


class _JointVarMean(torch.autograd.Function):
    """Backward is one pass over ``x``: the variance does not change with the mean inside it, so only ``x`` counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # two passes, and not torch.var_mean, which is slow on channels_last with few channels
        mean = _joint_mean(x.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)))
        ctx.save_for_backward(x, mean)
        return _joint_mean((x - mean[:, None, None]).square_().mean((0, 2, 3))), mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope, shift = 2 * _joint_mean(grads[0]) / count, _joint_mean(grads[1]) / count
        return torch.addcmul((shift - slope * mean)[:, None, None], x, slope[:, None, None]).to(x.dtype)


def _joint_mean(x: Tensor) -> Tensor:
    size = world()[1]
    if size > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x / size


def joint_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over all processes."""
    if world()[1] > 1:
        low, high = low.clone(), high.clone()
        distributed.all_reduce(low, distributed.ReduceOp.MIN)
        distributed.all_reduce(high, distributed.ReduceOp.MAX)
    return low, high


def average_gradients(gradients: list[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    size = world()[1]
    if size == 1:
        return
    joint = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(joint)
    for g, mean in zip(gradients, (joint / size).split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def from_first(value: Any) -> Any:
    """What the first process holds, in every process."""
    if world()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


class JointBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of the joint batch; unlike torch's SyncBatchNorm it also runs on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(x)
        x = at_least_float32(x)  # for the statistics, as torch's own BatchNorm does
        var, mean = joint_var_mean(x)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            count = x.numel() // x.shape[1] * world()[1]
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), momentum)
            self.num_batches_tracked += 1
        y = (x - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        return y if self.weight is None else y * self.weight[:, None, None] + self.bias[:, None, None]
