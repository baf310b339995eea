"""granq's quantizer next to what a user would pick instead, in one alternating run.

All give one scale to each channel of each image and a gradient of one, but for torch's observer along the channels,
which has less to do: it is what torch's own tools would pick. Values are not negative, as after a ReLU: torch and
torchao take zero into every range, and compute the same there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import common
import pandas as pd
import torch
from torch import Tensor
from torch.ao.quantization import PerChannelMinMaxObserver
from tqdm.auto import tqdm

from granq.measure.latency import METHODS, SHAPES, alternate, ours, quartiles, timings
from granq.quantizer import QParams, choose_qparams, fake_quantize_with


def loop_for_scales(x: Tensor, bits: int) -> Tensor:
    """Find scales channel by channel, and quantize all at once: what GranQ's first version is compared with."""
    found = [choose_qparams(channel, bits) for channel in x.split(1, 1)]
    return fake_quantize_with(x, QParams(*(torch.cat(part, 1) for part in zip(*found, strict=True))), bits, False)


def torch_observer(x: Tensor, bits: int, per_sample: bool) -> Tensor:
    """Quantize by torch's observer and its own kernel; images and channels become one dimension if each counts."""
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped, axis = (x.flatten(0, 1), 0) if per_sample else (x, 1)
    scheme = torch.per_channel_affine
    observer = PerChannelMinMaxObserver(axis, torch.qint8, scheme, quant_min=ends[0], quant_max=ends[1]).to(x.device)
    observer(grouped)
    scale, zero_point = observer.calculate_qparams()
    return torch.fake_quantize_per_channel_affine(grouped, scale, zero_point, axis, *ends).view_as(x)


def torchao_affine(x: Tensor, bits: int) -> Tensor:
    """Quantize to int8 and back by torchao, a block for each channel of each image; the gradient is added by hand."""
    from torchao.quantization import quant_primitives as ao

    ends, block = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (1, 1, *x.shape[2:])
    with torch.no_grad():
        scale, zero = ao.choose_qparams_affine(x, ao.MappingType.ASYMMETRIC, block, torch.int8, *ends)
        codes = ao.quantize_affine(x, block, scale, zero, torch.int8, *ends)
        value = ao.dequantize_affine(codes, block, scale, zero, torch.int8, *ends)
    return x + (value - x).detach()


def methods() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return what can be compared here, by name; says so if torchao is not installed."""
    found = {name: METHODS[name] for name in ("granq", "copy", "textbook", "channel loop")}
    found |= {
        "granq, compiled": torch.compile(ours, dynamic=True),
        "loop for scales": loop_for_scales,
        "torch observer, per sample and channel": partial(torch_observer, per_sample=True),
        "torch observer, per channel": partial(torch_observer, per_sample=False),
    }
    if importlib.util.find_spec("torchao"):
        return found | {"torchao affine": torchao_affine}
    print("torchao is not installed: its row is left out")
    return found


def measure_latency_quantizers(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES, bits: int = 3, *, repetitions: int = 30, device: str = "cpu"
) -> pd.DataFrame:
    """Time fake quantization, forward and backward, per method and activation shape (N, C, H, W), float32.

    Returns:
        Columns method, shape, bytes, bits, median_ms, q25_ms, q75_ms, ratio_to_granq and ratio_to_copy (medians of the
        ratios within a repetition; quartiles in ``..._q25``, ``..._q75``), repetitions, threads, torch, device.
    """
    frames, compared = [], methods()
    for shape in tqdm(shapes, desc="quantizers", unit="shape"):
        x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).relu().requires_grad_()

        def once(method: Callable[[Tensor, int], Tensor], x: Tensor, gradient: Tensor) -> None:
            torch.autograd.grad(method(x, bits), x, gradient)

        runs = {name: partial(once, method, x, torch.ones_like(x)) for name, method in compared.items()}
        times = alternate(runs, repetitions)
        frame = quartiles(times, shape=str(shape), bytes=x.nbytes, bits=bits)
        for reference in ("granq", "copy"):
            frame = frame.join(quartiles(times.div(times[reference], axis=0), f"ratio_to_{reference}"))
        frames.append(frame)
    return timings(frames, "method", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_quantizers)
