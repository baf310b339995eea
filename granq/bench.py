"""Timings: alternating, warmed up, with spread; ratios within one run. Milliseconds of a shared machine mean little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from granq.qat import versions
from granq.quantizer import fake_quantize

#: Activations of ResNet-20 at batch 200 and of ResNet-50 at batch 16, and two tensors over 50 MB.
SHAPES = (
    (200, 16, 32, 32), (200, 32, 16, 16), (200, 64, 8, 8), (16, 64, 56, 56), (16, 512, 7, 7),
    (200, 64, 32, 32), (16, 256, 56, 56),
)  # fmt: skip


class _TextbookRound(torch.autograd.Function):
    """Rounding with the straight-through gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def textbook_chain(x: Tensor, bits: int) -> Tensor:
    """The baseline: the per-sample-channel formula written out, every operation a pass over memory and a graph node."""
    rows = x.view(x.shape[0] * x.shape[1], -1)
    low, high = rows.min(1, keepdim=True).values.detach(), rows.max(1, keepdim=True).values.detach()
    scale_inv = (2**bits - 1) / (high - low).clamp_min(1e-8)
    zero_point = torch.round(scale_inv * low) + 2 ** (bits - 1)
    codes = _TextbookRound.apply(scale_inv * rows - zero_point)
    return ((codes + zero_point) / scale_inv).view_as(x)


def channel_loop(x: Tensor, bits: int) -> Tensor:
    """One call per channel, as conventional per-channel quantization does; (N, 1, H, W) slices, joined again."""
    parts = [fake_quantize(x[:, c : c + 1], bits, "per_sample_channel", clamp=False) for c in range(x.shape[1])]
    return torch.cat(parts, 1)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "layerwise": lambda x, bits: fake_quantize(x, bits, "per_tensor", clamp=False),
    "channel loop": channel_loop,
    "textbook": textbook_chain,
    "release": lambda x, bits: fake_quantize(x, bits, "per_sample_channel", clamp=False),
    "copy": lambda x, bits: x.clone(),
}


def measure_latency_quantizer(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    bits: int = 3,
    *,
    repetitions: int = 30,
    device: str = "cpu",
    backward: bool = True,
) -> pd.DataFrame:
    """Time of fake quantization per method and activation shape, float32, forward and (by default) backward.

    Every repetition runs each method once, in turn, so that a disturbance meets all of them.

    Returns:
        Columns method, shape, bytes, bits, backward, repetitions, median_ms, q25_ms, q75_ms, ratio_to_textbook and
        ratio_to_copy (medians of the ratios within one repetition, with their quartiles ``..._q25`` and ``..._q75``),
        threads, torch, device. ``release`` is the library's vectorized quantizer, ``copy`` the floor: ``x.clone()``.
    """
    facts = versions(device)
    frames = []
    for shape in tqdm(shapes, desc="quantizer", unit="shape"):
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(shape, generator=generator, device=device).requires_grad_(backward)
        gradient = torch.ones_like(x)

        def once(method: Callable[[Tensor, int], Tensor], x: Tensor = x, gradient: Tensor = gradient) -> None:
            output = method(x, bits)
            if backward:
                torch.autograd.grad(output, x, gradient)

        # torch's own timer: it synchronizes CUDA and keeps the thread count
        threads = torch.get_num_threads()
        timers = {
            name: Timer("once(method)", globals={"once": once, "method": method}, num_threads=threads)
            for name, method in METHODS.items()
        }
        for timer in timers.values():
            timer.timeit(2)  # warm-up
        times = pd.DataFrame([{n: t.timeit(1).mean * 1e3 for n, t in timers.items()} for _ in range(repetitions)])
        for name in METHODS:
            row: dict[str, object] = {
                "method": name, "shape": str(shape), "bytes": x.numel() * x.element_size(), "bits": bits,
                "backward": backward, "repetitions": repetitions, "median_ms": times[name].median(),
                "q25_ms": times[name].quantile(0.25), "q75_ms": times[name].quantile(0.75),
            }  # fmt: skip
            for reference in ("textbook", "copy"):
                ratios = times[name] / times[reference]
                row[f"ratio_to_{reference}"] = ratios.median()
                row[f"ratio_to_{reference}_q25"] = ratios.quantile(0.25)
                row[f"ratio_to_{reference}_q75"] = ratios.quantile(0.75)
            frames.append(row | {"threads": threads, "torch": facts["torch"], "device": facts["device"]})
    return pd.DataFrame(frames)
