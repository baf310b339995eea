"""Activations in front of a layer: histograms before and after quantization, the error by value, and the steps."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn

from granq.convert import ActQuantizer, original_weight, weight_quantizer
from granq.errors import UserError
from granq.graph import layer_names
from granq.hooks import Batch
from granq.integer import IntegerInput, IntegerLayer
from granq.measure import running
from granq.measure.running import ACTIVATION_GRANULARITIES, BINS
from granq.plain import module_of
from granq.quantizer import choose_qparams, fake_quantize, min_max, qparams_from_range, quantize


def measure_activation_distortion(
    model: nn.Module, batches: Iterable[Batch], layers: Sequence[str], bits: Sequence[int] = (3, 4, 5),
    granularities: Sequence[str] = ("per_tensor", "per_channel", "per_sample_channel"),
) -> pd.DataFrame:  # fmt: skip
    """Measure histograms of the activations in front of ``layers``, quantized and not, and the error by value.

    The 64 bins of a layer span its range in the **first batch**; later values outside count in the outermost bins.
    Columns: layer, bits, granularity, bin_left, bin_right, density_full_precision, density_quantized (per unit of
    activation), rms_error (of the values whose full-precision value lies in the bin; NaN for an empty bin), mse and
    sqnr_db (of the whole layer), images.
    """
    ranges: dict[str, tuple[float, float]] = {}
    sums: dict[tuple[str, int, str], Tensor] = {}  # (4, BINS): counts before and after, squared error and signal

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x, model.get_submodule(name))
        low, high = ranges.setdefault(name, (x.min().item(), x.max().item()))

        def bins(values: Tensor, weights: Tensor | None = None) -> Tensor:
            index = (values.flatten() - low) * (BINS / max(high - low, 1e-12))
            return torch.bincount(index.long().clamp_(0, BINS - 1), weights, BINS).double()

        full, signal = bins(x), bins(x, x.flatten().double().square())
        for k, granularity in product(bits, granularities):
            value = fake_quantize(x, k, granularity)
            error = bins(x, (value - x).flatten().double().square())
            running.merge(sums, (name, k, granularity), torch.stack([full, bins(value), error, signal]))

    count = running.run(model, batches, "activation distortion", running.checked(model, layers), visit)
    frames = []
    for (name, k, granularity), (full, quantized, error, signal) in sums.items():
        low, high = ranges[name]
        edges = np.linspace(low, max(high, low + 1e-12), BINS + 1)
        area = full.sum() * (edges[1] - edges[0])
        columns = dict(layer=name, bits=k, granularity=granularity, bin_left=edges[:-1], bin_right=edges[1:])
        columns |= dict(density_full_precision=full / area, density_quantized=quantized / area)
        columns |= dict(rms_error=(error / full).sqrt(), mse=(error.sum() / full.sum()).item())  # 0 / 0 is NaN
        columns |= dict(sqnr_db=running.decibel(signal.sum().item(), error.sum().item()), images=count)
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def measure_activation_samples(
    model: nn.Module, images: Mapping[str, Tensor], layers: Sequence[str], channels: int = 6, values: int = 64
) -> pd.DataFrame:
    """Sample activations in front of ``layers``, with the range of the group they belong to under each granularity.

    Args:
        images: by source ("synthetic", "real") one batch (N, 3, H, W), also the group of ranges that span images.
        channels: how many of each layer, evenly spaced from the narrowest to the widest range in the last source.
        values: how many of each channel of each image, evenly spaced from the smallest to the largest.

    Columns: source, layer, image, channel, rank (0: narrowest), x, and for every granularity of activations the ends of
    its range, such as per_tensor_low and per_tensor_high.
    """
    frames, names = [], running.checked(model, layers)
    found = ((source, call) for source in images for call in running.calls(model, images[source], names))
    called = {name: model.get_submodule(name) for name in names}
    seen = {(name, source): running.by_channel(x, called[name]).cpu() for source, (name, x, _) in found}
    for name, source in product(names, images):
        spread = np.ptp(seen[name, [*images][-1]].transpose(0, 1).flatten(1).numpy(), 1)  # (C,), of the last source
        live = spread.argsort()[(spread == 0).sum() :]  # constant channels are left out
        picked = live[running.spread(len(live), channels)]
        x = seen[name, source]
        ordered = x.reshape(*x.shape[:2], -1)[:, picked].sort(2).values.numpy()  # (N, K, H * W)
        sample = ordered[:, :, running.spread(ordered.shape[2], values)]
        image, rank, _ = np.indices(sample.shape).reshape(3, -1)
        columns = dict(source=source, layer=name, image=image, channel=picked[rank], rank=rank, x=sample.flatten())
        for granularity, end in product(ACTIVATION_GRANULARITIES, (0, 1)):
            ends = min_max(x, granularity)[end].flatten(1).expand(x.shape[:2])[:, picked]
            columns[f"{granularity}_{('low', 'high')[end]}"] = ends[image, rank].numpy()
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def measure_scale_maps(model: nn.Module, images: Tensor, layers: str | Sequence[str], bits: int) -> pd.DataFrame:
    """Measure the quantization step of every image and channel in front of each layer, under each granularity.

    The batch ``images`` (N, 3, H, W) is also the group of ``per_tensor`` and ``per_channel``. Columns: layer, bits,
    granularity, image, channel, scale (the step 1/s, in units of the activation).
    """
    names = running.checked(model, [layers] if isinstance(layers, str) else layers)
    found = running.calls(model, images, names)
    seen = [(name, running.by_channel(x, model.get_submodule(name))) for name, x, _ in found]
    return _scale_maps(seen, bits, ACTIVATION_GRANULARITIES, "image")


def measure_weight_scales(model: nn.Module, layers: Sequence[str], bits: int) -> pd.DataFrame:
    """Measure the quantization step of every kernel of the weights of ``layers``, under each granularity.

    Columns: layer, bits, granularity, filter (output channel), channel (input channel), scale (the step).
    """
    names = running.checked(model, layers)
    weights = [(name, original_weight(model.get_submodule(name))) for name in names]
    return _scale_maps(weights, bits, ("per_out_channel", "per_kernel"), "filter")


def measure_data_flow(model: nn.Module, images: Tensor, layer: str, bits: int) -> pd.DataFrame:
    """Measure how GranQ quantizes what enters a convolution, clamped, for the first of ``images``.

    Rows are values, of 16 channels and 64 pixels evenly spaced over all. Columns: layer, bits, channel, pixel, x,
    low, high (of all pixels of the channel), scale_inv, zero_point, code, value.
    """
    (_, x, _), *_ = running.calls(model, images[:1], running.checked(model, [layer]))
    x = x.cpu().flatten(2)[..., None]  # (1, C, H * W, 1)
    qparams = choose_qparams(x, bits)
    tensors = [x, *min_max(x, "per_sample_channel"), *qparams, quantize(x, *qparams, bits), fake_quantize(x, bits)]
    row, place = running.spread(x.shape[1], 16), running.spread(x.shape[2], 64)
    values = [t.expand_as(x)[0, row][:, place].flatten().numpy() for t in tensors]
    index = dict(layer=layer, bits=bits, channel=row.repeat(len(place)), pixel=np.tile(place, len(row)))
    names = "x low high scale_inv zero_point code value".split()
    return pd.DataFrame(index | dict(zip(names, values, strict=True)))


@torch.no_grad()
def measure_integer_walk(
    student: fx.GraphModule, images: Tensor, layer: str, channels: int = 4, pixels: int = 16
) -> pd.DataFrame:
    """Compute outputs of a convolution of a calibrated foldable student in integers, for the first of ``images``.

    Rows are products, of ``channels`` and ``pixels`` of the output, evenly spaced. Columns: channel, row, column (of
    the output), input_channel, place (in the kernel), q and z (code and zero point of the input, zero in the padding),
    v (integer weight), sum (int32, of all (q + z) * v), rescale, offset, value (rescale * sum + offset), student (what
    it computes in floating point), layer; and of the place that the output reaches first: read (the value), free and
    code (before and after the clamp), NaN if there is no place of that shape. Raises UserError for a layer that does
    not run in integers.
    """
    student, images = copy.deepcopy(student).cpu(), images.cpu()  # CUDA has no convolution of integers
    conv = cast(Any, student.get_submodule(*running.checked(student, [layer])))
    source = getattr(weight_quantizer(conv), "source", None) if isinstance(conv, nn.Conv2d) else None
    if not isinstance(source, ActQuantizer) or not source.seen:
        raise UserError(f"{layer} is no convolution of a calibrated foldable student: it does not run in integers")
    (_, x, output), *_ = running.calls(student, images[:1], [layer])
    integer, (scale_inv, zero_point) = IntegerLayer(conv), source.qparams()
    u = (x * scale_inv).round()  # x lies on the grid: exact
    sums, read, free, code = integer.accumulate(u), *_requantized(student, images, layer, output)
    geometry = dict(dilation=conv.dilation, padding=conv.padding, stride=conv.stride)
    windows = [nn.functional.unfold(t, conv.kernel_size, **geometry)[0] for t in (u, zero_point.expand_as(u))]
    fan_in, per_group = integer.weight[0].numel(), len(integer.weight) // conv.groups
    frames, (tall, wide) = [], output.shape[2:]
    for channel, pixel in product(running.spread(len(sums[0]), channels), running.spread(tall * wide, pixels)):
        index = channel // per_group * fan_in + np.arange(fan_in)  # of the inputs of its group
        codes, zeros = (w[index, pixel].int().cpu().numpy() for w in windows)
        at = (0, channel, *divmod(int(pixel), wide))
        input_channel, place = divmod(index, conv.weight[0, 0].numel())
        facts = dict(channel=channel, row=at[2], column=at[3], input_channel=input_channel, place=place)
        facts |= dict(q=codes - zeros, z=zeros, v=integer.weight[channel].flatten().cpu().numpy(), sum=sums[at].item())
        facts |= dict(rescale=integer.rescale[channel].item(), offset=integer.offset[channel].item())
        facts |= dict(value=integer.rescaled(sums)[at].item(), student=output[at].item())
        facts |= dict(read=read[at].item(), free=free[at].item(), code=code[at].item())
        frames.append(pd.DataFrame(facts))
    return pd.concat(frames, ignore_index=True).assign(layer=layer)


def _requantized(student: fx.GraphModule, images: Tensor, layer: str, output: Tensor) -> list[Tensor]:
    """Return what the next place reads of an output, in its shape, and its codes before and after the clamp."""
    reached = set[fx.Node]()
    for node in student.graph.nodes:
        if node.target == layer or reached.intersection(node.all_input_nodes):
            reached.add(node)
            if isinstance(place := module_of(student, node), ActQuantizer):
                (_, x, _), *_ = running.calls(student, images[:1], [str(node.target)])
                if x.shape != output.shape:
                    break
                grid = IntegerInput(place)
                return [x, (x * grid.scale_inv - grid.zero_point).round(), grid.integers(x) - grid.zero_point]
    return [torch.full_like(output, torch.nan)] * 3


def measure_channel_scales(
    model: nn.Module, batches: Iterable[Batch], granularity: str = "per_sample_channel", source: str = "synthetic", *,
    bits: int = 3,
) -> pd.DataFrame:  # fmt: skip
    """Measure the quantization step of every channel in front of every layer.

    ``per_tensor`` and ``per_channel`` have one range over all images, the others one for each image. Columns: layer,
    channel, source ("synthetic", "real"), granularity, bits, scale (the step, in units of the activation; mean over
    images), scale_min, scale_max (over images), images.
    """
    per_image = granularity in ("per_sample", "per_sample_channel")
    sums, lowest, highest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = running.by_channel(x, model.get_submodule(name))
        if per_image:  # extremes of the steps; of the values otherwise
            low = high = choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2]).double()
            running.merge(sums, name, torch.stack([low.sum(0), torch.full_like(low[0], len(x))]))
        else:
            low, high = (v.flatten(1).expand(1, x.shape[1]) for v in min_max(x, granularity))
        running.merge(lowest, name, low.amin(0), torch.minimum)
        running.merge(highest, name, high.amax(0), torch.maximum)

    count = running.run(model, batches, "channel scales", layer_names(model), visit)
    frames = {}
    for name, low in lowest.items():
        static = qparams_from_range(low, highest[name], bits).scale.double()
        steps = (sums[name][0] / sums[name][1], low, highest[name]) if per_image else [static] * 3
        columns = dict(zip(("scale", "scale_min", "scale_max"), steps, strict=True))
        frames[name] = pd.DataFrame(dict(source=source, granularity=granularity, bits=bits) | columns)
    return pd.concat(frames, names=["layer", "channel"]).reset_index().assign(images=count)


def measure_ranges(model: nn.Module, batches: Iterable[Batch]) -> pd.DataFrame:
    """Measure the range of every channel in front of every layer over all images, and of every filter of its weight.

    Columns: part ("activations", "weights"), layer, channel, low, high.
    """
    lowest, highest, names = dict[tuple[str, str], Tensor](), dict[tuple[str, str], Tensor](), layer_names(model)

    def keep(key: tuple[str, str], x: Tensor, granularity: str) -> None:
        low, high = min_max(x, granularity)
        running.merge(lowest, key, low.flatten(), torch.minimum)
        running.merge(highest, key, high.flatten(), torch.maximum)

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        keep(("activations", name), running.by_channel(x, model.get_submodule(name)), "per_channel")

    running.run(model, batches, "ranges", names, visit)
    for name in names:
        keep(("weights", name), cast(Tensor, model.get_submodule(name).weight), "per_out_channel")
    frames = {key: pd.DataFrame({"low": low, "high": highest[key]}) for key, low in lowest.items()}
    return pd.concat(frames, names=["part", "layer", "channel"]).reset_index()


def _scale_maps(
    layers: Iterable[tuple[str, Tensor]], bits: int, granularities: Iterable[str], first: str
) -> pd.DataFrame:
    """Return the step of every image and channel, or of every kernel; ``first`` names the first dimension."""
    frames = []
    for (name, x), granularity in product(layers, granularities):
        scale = choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2]).cpu().numpy()
        row, channel = np.indices(scale.shape).reshape(2, -1)
        columns = {"layer": name, "bits": bits, "granularity": granularity, first: row, "channel": channel}
        frames.append(pd.DataFrame(columns | {"scale": scale.flatten()}))
    return pd.concat(frames, ignore_index=True)
