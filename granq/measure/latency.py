"""Time the quantizer and the executions of a convolution; docs/speed.md says how to read the numbers."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from granq import scaling
from granq.devices import versions
from granq.quantizer import choose_qparams, fake_quantize

#: Activations of ResNet-20 at batch 200 and of ResNet-50 at batch 16, and two tensors over 50 MB.
SHAPES = ((200, 16, 32, 32), (200, 32, 16, 16), (200, 64, 8, 8), (16, 64, 56, 56), (16, 512, 7, 7),
          (200, 64, 32, 32), (16, 256, 56, 56))  # fmt: skip
SAME = scaling.Conv(padding=(1, 1))  # the output of a 3x3 convolution has as many pixels as its input


def textbook_chain(x: Tensor, bits: int) -> Tensor:
    """Quantize per sample and channel by the formula as it is written, every operation a pass over memory."""
    rows = x.reshape(x.shape[0] * x.shape[1] if x.dim() == 4 else len(x), -1)
    low, high = rows.min(1, keepdim=True).values.detach(), rows.max(1, keepdim=True).values.detach()
    scale_inv = (2**bits - 1) / (high - low).clamp_min(1e-8)
    zero_point = torch.round(scale_inv * low) + 2 ** (bits - 1)
    codes = scale_inv * rows - zero_point
    codes.data = codes.data.round()  # the gradient does not see it: straight-through
    return ((codes + zero_point) / scale_inv).view_as(x)


ours = partial(fake_quantize, granularity="per_sample_channel", clamp=False)  # as the scheme granq does
METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "layerwise": partial(fake_quantize, granularity="per_tensor", clamp=False),
    "channel loop": lambda x, bits: torch.cat([ours(channel, bits) for channel in x.split(1, 1)], 1),
    "textbook": textbook_chain,
    "granq": ours,
    "granq, NHWC": ours,
    "copy": lambda x, bits: x.clone(),
}


def alternate(runs: Mapping[str, Callable[[], Any]], repetitions: int) -> pd.DataFrame:
    """Return milliseconds, (repetitions, runs): runs take turns, so that a disturbance meets all; each is warmed up."""
    from torch.utils.benchmark import Timer  # its import prints a warning about CUDA_HOME

    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    return pd.DataFrame([{name: 1e3 * t.timeit(1).mean for name, t in timers.items()} for _ in range(repetitions)])


def quartiles(times: pd.DataFrame, ratio: str = "", **facts: Any) -> pd.DataFrame:
    """Return a row for each column of ``times``: ``facts``, median and quartiles, of milliseconds or of a ``ratio``."""
    names = (ratio, f"{ratio}_q25", f"{ratio}_q75") if ratio else ("median_ms", "q25_ms", "q75_ms")
    return pd.DataFrame(facts, times.columns).join(times.quantile([0.5, 0.25, 0.75]).T.set_axis(names, axis=1))


def timings(frames: Sequence[pd.DataFrame], name: str, repetitions: int, device: str) -> pd.DataFrame:
    """Join frames of ``quartiles``, their index as column ``name``, with what it takes to trust them."""
    facts = {"threads": torch.get_num_threads()} | {k: versions(device)[k] for k in ("torch", "device")}
    return pd.concat(frames).rename_axis(name).reset_index().assign(repetitions=repetitions, **facts)


def measure_latency_quantizer(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES, bits: int = 3, *, repetitions: int = 30, device: str = "cpu"
) -> pd.DataFrame:
    """Time fake quantization, forward and backward, per method and activation shape (N, C, H, W), float32.

    Method ``copy`` is the floor, ``x.clone()``; ``NHWC`` is a tensor in channels_last. Columns: method, shape, bytes,
    bits, median_ms, q25_ms, q75_ms, ratio_to_textbook and ratio_to_copy (medians of the ratios within a repetition;
    quartiles in ``..._q25``, ``..._q75``), repetitions, threads, torch, device.
    """
    frames = []
    for shape in tqdm(shapes, desc="quantizer", unit="shape", leave=False):
        nchw = torch.rand(shape, generator=torch.Generator(device).manual_seed(0), device=device).requires_grad_()
        nhwc = nchw.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

        def once(name: str, x: Tensor, gradient: Tensor) -> None:
            torch.autograd.grad(METHODS[name](x, bits), x, gradient)

        inputs = {name: nhwc if name.endswith("NHWC") else nchw for name in METHODS}
        times = alternate({n: partial(once, n, x, torch.ones_like(x)) for n, x in inputs.items()}, repetitions)
        frame = quartiles(times, shape=str(shape), bytes=nchw.nbytes, bits=bits)
        for reference in ("textbook", "copy"):
            frame = frame.join(quartiles(times.div(times[reference], axis=0), f"ratio_to_{reference}"))
        frames.append(frame)
    return timings(frames, "method", repetitions, device)


def _executions(c: int, n: int, size: int, bits: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Quantize an input and a weight of ``c`` channels, and return what there is to time."""
    rng = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, c, size, size, generator=rng, device=device).relu()
    kernels = torch.randn(c, c, 3, 3, generator=rng, device=device)

    def integers(tensor: Tensor, granularity: str) -> scaling.Integers:
        return scaling.to_integers(tensor, choose_qparams(tensor, bits, granularity), bits)

    one, static, own = (integers(x, g) for g in ("per_tensor", "per_channel", "per_sample_channel"))
    weight = integers(kernels, "per_out_channel")
    return {
        "layer-wise": partial(scaling.layerwise, one, weight, SAME),
        "layer-wise, float32": partial(scaling.layerwise, one, weight, SAME, torch.float32),
        "accumulation-time, loop": partial(scaling.accumulation_time, own, weight, SAME),
        "accumulation-time, grouped": partial(scaling.accumulation_time, own, weight, SAME, grouped=True),
        "pre-scaled": partial(scaling.prescaled, own, weight.dequantize(), SAME),
        "folded": partial(scaling.folded, static, scaling.fold(weight, static.scale_inv), SAME),
    }


def measure_latency_scaling(
    channels: Sequence[int] = (8, 16, 32, 64, 128), batches: Sequence[int] = (1, 4, 16, 64), *,
    fixed: tuple[int, int] = (32, 16), size: int = 16, bits: int = 3, repetitions: int = 30, device: str = "cpu",
) -> pd.DataFrame:  # fmt: skip
    """Time the executions of a 3x3 convolution of ``size`` x ``size`` pixels, from integers to the float output.

    ``fixed`` is (channels, batch): the one that stays while the other varies. Finding scales is not timed. Sums are
    int32 on the CPU, where PyTorch does not optimize integer convolutions: ``layer-wise, float32`` holds the same exact
    integers as floats, as all do on other devices. Columns: execution, channels, batch, size, bits, median_ms, q25_ms,
    q75_ms, peak_mb, scale_multiplications and bytes (``count_scaling``), repetitions, threads, torch, device.
    """
    frames = []
    shapes = dict.fromkeys([(c, fixed[1]) for c in channels] + [(fixed[0], n) for n in batches])
    for c, n in tqdm(shapes, desc="scaling", unit="shape", leave=False):
        runs = _executions(c, n, size, bits, device)
        frame = quartiles(alternate(runs, repetitions), channels=c, batch=n, size=size, bits=bits)
        frame["peak_mb"] = [peak_mb(run, device) for run in runs.values()]
        counts = scaling.count_scaling((n, c, size, size), (c, c, 3, 3), SAME).set_index("execution")
        counts.loc["layer-wise, float32"] = counts.loc["layer-wise"]
        frames.append(frame.join(counts))
    return timings(frames, "execution", repetitions, device)


def peak_mb(run: Callable[[], object], device: str = "cpu") -> float:
    """Return the most bytes that PyTorch allocates at once during ``run``, beyond those before it, in 10^6."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device != "cpu":
        return math.nan  # MPS does not tell
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 1e6
