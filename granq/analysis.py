"""Measurements: a model and batches of images in, a tidy data frame out.

Every ``measure_*`` works on any network of Conv2d and Linear layers through forward hooks, and streams: one batch is
in memory at a time, between batches only running sums of fixed size are kept. A *batch* is a tensor of images
(N, 3, H, W) or a pair (images, labels). The *activation of a layer* is the tensor that enters it, which is what a
quantizer in front of it sees; channels are dimension 1 of (N, C, H, W), and the features of (N, F) or (N, T, F).
Ranges of activations are dynamic, taken anew from every batch, unless a scheme tracks them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, cycle, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from granq.calibration import calibrate
from granq.checks import check_batches, check_images, forward, one_of, typed
from granq.convert import LAYERS, ActQuantizer, frozen_ranges, input_places, quantize_model
from granq.data import DataSpec
from granq.generator import LATENT, Generator, kept
from granq.models import eval_mode
from granq.quantizer import check_bits, choose_qparams, fake_quantize_with, min_max, qparams_from_range

Batch = Tensor | Sequence[Tensor]
ACTIVATION_GRANULARITIES = ("per_tensor", "per_channel", "per_sample", "per_sample_channel")
MODES = ("local", "accumulated")
BINS = 64
DEAD = 1e-7  # a constant channel has the smallest step there is, 1e-8 / (2^k - 1)


@typed
def layer_names(model: nn.Module) -> list[str]:
    """Names of the Conv2d and Linear layers of ``model``, in the order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


@contextmanager
def layer_calls(
    model: nn.Module, layers: Iterable[str], visit: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the block ``model`` is in eval mode and every forward of a layer calls ``visit(name, input, output)``."""
    with eval_mode(model), ExitStack() as hooks:
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(
                lambda _, args, named, out, name=name: visit(name, args[0] if args else named["input"], out),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
        yield


@typed
def sqnr_db(reference: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Signal to quantization noise ratio in decibels over ``dims``, in float64; exact values give infinity."""
    if reference.shape != value.shape:
        raise ValueError(f"reference and value must have one shape, got {tuple(reference.shape)}, {tuple(value.shape)}")
    signal, noise = (where_float64_is(x).double().square().sum(dims) for x in (reference, reference - value))
    return 10 * torch.log10(signal / noise)


@torch.no_grad()
@typed
def measure_scale_maps(
    model: nn.Module,
    images: Tensor,
    layers: str | Sequence[str],
    bits: int,
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES,
) -> pd.DataFrame:
    """The quantization step of every image and channel in front of each layer, under each granularity.

    Args:
        model: the network.
        images: one batch (N, 3, H, W), which is also the group of ``per_tensor`` and ``per_channel``.
        layers: name of a Conv2d or Linear, or several.
        bits: bit width.
        granularities: which values share a scale.

    Returns:
        Columns layer, bits, granularity, image, channel, scale (the step 1/s, in units of the activation).

    Raises:
        ValueError: the model has no such layer.
    """
    _check_choice([bits], granularities)
    frames = []

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = _channels_first(x)
        for granularity in granularities:
            scale = choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2])  # (N, C)
            image, channel = np.indices(tuple(scale.shape)).reshape(2, -1)
            values = dict(layer=name, bits=bits, granularity=granularity, image=image, channel=channel)
            frames.append(pd.DataFrame(values | {"scale": scale.flatten().cpu().numpy()}))

    with layer_calls(model, _checked(model, [layers] if isinstance(layers, str) else layers), visit):
        forward(model, _images(images).to(_device(model)))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
@typed
def measure_activation_distortion(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[str],
    bits: Sequence[int] = (3, 4, 5),
    granularities: Sequence[str] = ("per_tensor", "per_channel", "per_sample_channel"),
) -> pd.DataFrame:
    """Histograms of the activations in front of ``layers``, full precision and quantized, and the error by value.

    One row is one bin of one (layer, bits, granularity). The 64 bins of a layer span its range in the **first batch**
    and stay fixed; later values outside are counted in the outermost bins.

    Returns:
        Columns layer, bits, granularity, bin_left, bin_right, density_full_precision, density_quantized (per unit of
        activation), rms_error (root mean square error of the values whose full-precision value lies in the bin; NaN
        for an empty bin), mse and sqnr_db of the whole layer (repeated in its rows), images.
    """
    _check_choice(bits, granularities)
    edges: dict[str, tuple[float, float]] = {}
    sums = _Sums()  # (4, BINS): counts of full-precision and of quantized values, squared error, squared signal

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = _channels_first(x)
        low, high = edges.setdefault(name, (x.min().item(), x.max().item()))

        def bin_of(values: Tensor) -> Tensor:
            return ((values.flatten() - low) * (BINS / max(high - low, 1e-12))).long().clamp_(0, BINS - 1)

        index = bin_of(x)
        full, signal = (
            torch.bincount(index, v.flatten().double(), BINS) for v in (torch.ones_like(x), x.double().square())
        )
        for k, granularity in product(bits, granularities):
            value = fake_quantize_with(x, choose_qparams(x, k, granularity), k)
            error = torch.bincount(index, (value - x).flatten().double().square(), BINS)
            quantized = torch.bincount(bin_of(value), minlength=BINS).double()
            sums.add((name, k, granularity), torch.stack([full, quantized, error, signal]))

    with layer_calls(model, _checked(model, layers), visit):
        count = _run(model, batches, "activation distortion")
    if not sums:
        raise ValueError(f"the forward reaches none of the layers {', '.join(layers)}")
    frames = []
    for (name, k, granularity), (full, quantized, error, signal) in sums.items():
        low, high = edges[name]
        bounds = np.linspace(low, max(high, low + 1e-12), BINS + 1)
        density = (full.sum() * (bounds[1] - bounds[0])).item()
        values = {
            "layer": name, "bits": k, "granularity": granularity, "bin_left": bounds[:-1], "bin_right": bounds[1:],
            "density_full_precision": full / density, "density_quantized": quantized / density,
            "rms_error": (error / full).sqrt(),  # 0 / 0 is NaN: nothing was seen there
            "mse": (error.sum() / full.sum()).item(), "sqnr_db": _decibel(signal.sum().item(), error.sum().item()),
        }  # fmt: skip
        frames.append(pd.DataFrame(values | {"images": count}))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
@typed
def measure_channel_histograms(
    model: nn.Module,
    images: Mapping[str, Tensor],
    layers: Sequence[str],
    bits: Sequence[int] = (2, 3, 4, 5),
    granularities: Sequence[str] = ACTIVATION_GRANULARITIES,
    channels: int = 6,
) -> pd.DataFrame:
    """Histograms of single channels of single images in front of ``layers``, full precision and quantized.

    Args:
        model: the network.
        images: by source ("synthetic", "real") one batch (N, 3, H, W), which is also the group of ranges that span
            images.
        layers: names of convolutions.
        bits: bit widths.
        granularities: which values share a scale.
        channels: how many of each layer, evenly spaced from the narrowest to the widest range in the last source.

    Returns:
        One row per bin: source, layer, image, channel, rank (0: narrowest), bits, granularity, bin_left, bin_right,
        count, count_quantized, step and lowest (the levels are lowest + step * 0 .. 2^bits - 1, in units of the
        activation), levels_in_use (how many of them) and sqnr_db of the channel in this image. The 32 bins of a channel
        span its values in all images of the source, quantized ones included.

    Raises:
        ValueError: a layer whose input is not (N, C, H, W), or that the model does not have.
    """
    _check_choice(bits, granularities)
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if not isinstance(images, Mapping) or not images:
        raise TypeError('images must be batches by source, such as {"real": images}')
    seen: dict[tuple[str, str], Tensor] = {}
    for source, batch in images.items():

        def keep(name: str, x: Tensor, _: Tensor, source: str = source) -> None:
            if x.dim() != 4:
                raise ValueError(f"the input of {name!r} has no channels of pixels: its shape is {tuple(x.shape)}")
            seen[name, source] = x.to("cpu", copy=True)  # whatever works on it in place afterwards

        with layer_calls(model, _checked(model, layers), keep):
            forward(model, _images(batch).to(_device(model)))
    frames = []
    for name in layers:
        if (name, source) not in seen:
            raise ValueError(f"the forward never reaches layer {name!r}")
        x = seen[name, source]  # of the last source
        spread = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).sort()  # (C,)
        live = spread.indices[spread.values > 0]
        if not len(live):
            raise ValueError(f"every channel in front of {name!r} is constant on these images: nothing to show")
        picked = live[torch.linspace(0, len(live) - 1, min(channels, len(live))).round().long()]
        for source, k, granularity in product(images, bits, granularities):
            values: dict[str, Any] = dict(source=source, layer=name, bits=k, granularity=granularity)
            frames.append(_histograms(seen[name, source], picked, k, granularity).assign(**values))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
@typed
def measure_channel_scales(
    model: nn.Module,
    batches: Iterable[Batch],
    granularity: str = "per_sample_channel",
    source: str = "synthetic",
    *,
    bits: int = 3,
) -> pd.DataFrame:
    """The quantization step of every channel in front of every layer.

    ``per_tensor`` and ``per_channel`` have one range over all images, ``per_sample`` and ``per_sample_channel`` one
    range per image, of which the mean and the extremes are kept.

    Args:
        model: the network.
        batches: the images.
        granularity: which values share a scale.
        source: ``"synthetic"`` or ``"real"``, written into the frame.
        bits: bit width.

    Returns:
        Columns layer, channel, source, granularity, bits, scale (step, in units of the activation; mean over
        images), scale_min, scale_max (over images), images.
    """
    _check_choice([bits], [granularity])
    per_image = granularity in ("per_sample", "per_sample_channel")
    sums, lowest, highest = _Sums(), _Sums(torch.minimum), _Sums(torch.maximum)

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        x = _channels_first(x)
        if per_image:  # of the scales; of the values otherwise
            scale = choose_qparams(x, bits, granularity).scale.flatten(1).expand(x.shape[:2]).double()
            low, high = scale.amin(0), scale.amax(0)
            sums.add(name, torch.stack([scale.sum(0), torch.full_like(low, len(x))]))
        else:
            low, high = (v.flatten().expand(x.shape[1]) for v in min_max(x, granularity))
        lowest.add(name, low)
        highest.add(name, high)

    with layer_calls(model, _checked(model, layer_names(model)), visit):
        count = _run(model, batches, f"channel scales, {source}")
    frames = []
    for name, low in lowest.items():
        mean, high = sums[name][0] / sums[name][1] if per_image else low, highest[name]
        if not per_image:
            mean = low = high = qparams_from_range(low, high, bits).scale
        values = {"channel": range(len(mean)), "source": source, "granularity": granularity, "bits": bits}
        scales = {"scale": mean.double(), "scale_min": low.double(), "scale_max": high.double()}
        frames.append(pd.DataFrame({"layer": name} | values | scales | {"images": count}))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
@typed
def measure_layer_error(
    model: nn.Module,
    batches: Iterable[Batch],
    schemes: Sequence[str],
    bits: int | tuple[int, int],
    *,
    per_channel: bool = False,
    layers: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    calibration: Iterable[Batch] | None = None,
) -> pd.DataFrame:
    """Error of every layer's output under quantization: the layer alone, and with everything before it.

    ``local``: the layer receives the full-precision input, through the activation quantizer directly in front of it
    (where the scheme has one there), and works with its quantized weights. ``accumulated``: the whole network is
    quantized, so errors of earlier layers arrive too. Both are compared with the full-precision output.

    Args:
        model: the full-precision network.
        batches: the images.
        schemes: names in ``granq.SCHEMES``.
        bits: bit width, or (weights, activations).
        per_channel: one row per output channel instead of one per layer.
        layers: names; all Conv2d and Linear layers by default.
        modes: ``"local"``, ``"accumulated"`` or both.
        calibration: images for schemes with tracked ranges; by default the **first batch** of ``batches``.

    Returns:
        Columns layer, scheme, weight_bits, act_bits, mode, (channel,) mse, sqnr_db, cosine_similarity, images. An
        exact output has an SQNR of infinity.
    """
    weight_bits, act_bits = (bits, bits) if isinstance(bits, int) else bits
    for mode in modes:
        one_of("mode", mode, MODES)
    layers = _checked(model, layer_names(model) if layers is None else layers)
    device = _device(model)
    check_batches(batches)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("measure_layer_error needs at least one batch")
    warm = [_images(b).to(device) for b in ([first] if calibration is None else calibration)]
    students = {scheme: quantize_model(model, scheme, weight_bits, act_bits) for scheme in schemes}
    for student in students.values():
        calibrate(student, warm)
    del warm
    sums = _Sums()  # (scheme, layer, mode) -> (4, C)
    clean: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by layer, for each of its calls: output and its energy

    def add(scheme: str, name: str, mode: str, reference: Tensor, energy: Tensor, value: Tensor) -> None:
        count = torch.full_like(energy, reference.numel() / len(energy))
        sums.add((scheme, name, mode), torch.stack([count, energy, _energy(value), _energy(value - reference)]))

    def visit_clean(name: str, x: Tensor, out: Tensor) -> None:
        energy = _energy(out)
        if "local" in modes:
            for scheme, student in students.items():
                quantizer = next(places[scheme].get(name, iter(())), None)  # none inside what fx does not trace
                value = student.get_submodule(name)(x if quantizer is None else quantizer(x))
                add(scheme, name, "local", out, energy, value)
        if "accumulated" in modes:  # a copy: an in-place ReLU behind the layer would change it
            clean.setdefault(name, []).append((out.clone(), energy))

    count = 0
    with ExitStack() as stack:
        stack.enter_context(parametrize.cached())  # weights are quantized once, not once a batch
        for student in students.values():
            stack.enter_context(frozen_ranges(student))
        places = {scheme: _input_quantizers(student) for scheme, student in students.items()}
        for batch in tqdm(chain([first], rest), desc="layer error", unit="batch"):
            images = _images(batch).to(device)
            count += len(images)
            clean.clear()
            with layer_calls(model, layers, visit_clean):
                forward(model, images)
            for scheme, student in students.items() if "accumulated" in modes else ():
                calls = {name: iter(values) for name, values in clean.items()}

                def visit_student(name: str, x: Tensor, out: Tensor, scheme: str = scheme, calls: Any = calls) -> None:
                    reference, energy = next(calls[name])
                    add(scheme, name, "accumulated", reference, energy, out)

                with layer_calls(student, layers, visit_student):
                    student(images)

    rows = []
    for scheme, mode, name in product(schemes, modes, layers):
        if (scheme, name, mode) not in sums:
            continue  # the forward never calls this layer
        values = sums[scheme, name, mode]
        groups = values.T.tolist() if per_channel else [values.sum(1).tolist()]
        for channel, group in enumerate(groups):
            key = (name, scheme, weight_bits, act_bits, mode) + ((channel,) if per_channel else ())
            rows.append((*key, *_error_metrics(*group), count))
    columns = ["layer", "scheme", "weight_bits", "act_bits", "mode"] + (["channel"] if per_channel else [])
    return pd.DataFrame(rows, columns=[*columns, "mse", "sqnr_db", "cosine_similarity", "images"])


@torch.no_grad()
@typed
def measure_synthetic_gap(
    model: nn.Module, synthetic_batches: Iterable[Batch], real_batches: Iterable[Batch]
) -> pd.DataFrame:
    """How far the activations of synthetic images are from those of real images, per layer and channel.

    The two-sample distance is Kolmogorov and Smirnov's: the largest difference of the two distribution functions,
    0 (equal) to 1 (disjoint), seen at 64 quantiles of the channel in the **first real batch**.

    Returns:
        Columns layer, channel, mean_synthetic, mean_real, variance_synthetic, variance_real, ks_distance,
        images_synthetic, images_real.
    """
    edges: dict[str, Tensor] = {}  # (C, BINS)

    def collect(batches: Iterable[Batch], text: str) -> tuple[_Sums, int]:
        sums = _Sums()  # (C, 3 + BINS): count, sum, sum of squares, values up to each edge

        def visit(name: str, x: Tensor, _: Tensor) -> None:
            flat = _channels_first(x).transpose(0, 1).flatten(1).contiguous()  # (C, values)
            if name not in edges:
                edges[name] = _quantiles(flat, BINS)
            # bin b holds the values in (edge[b-1], edge[b]]; the cumulative sum is the distribution function
            index = torch.searchsorted(edges[name], flat)
            counts = torch.zeros(len(flat), BINS + 1, dtype=torch.float64, device=flat.device)
            counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
            values = flat.double()
            moments = torch.stack([torch.full_like(values[:, 0], flat.shape[1]), values.sum(1), values.square().sum(1)])
            sums.add(name, torch.cat([moments.T, counts.cumsum(1)[:, :-1]], 1))

        with layer_calls(model, _checked(model, layer_names(model)), visit):
            return sums, _run(model, batches, f"synthetic gap, {text}")

    real, real_count = collect(real_batches, "real")  # first: it fixes the edges
    synthetic, synthetic_count = collect(synthetic_batches, "synthetic")
    frames = []
    for name, values in real.items():
        other, own = ((v[:, 1:] / v[:, :1]).T for v in (synthetic[name], values))  # per value, (2 + BINS, C)
        gap = {"mean_synthetic": other[0], "mean_real": own[0]}
        gap |= {f"variance_{k}": (v[1] - v[0].square()).clamp_min(0) for k, v in (("synthetic", other), ("real", own))}
        gap["ks_distance"] = (other - own)[2:].abs().amax(0)
        frames.append(pd.DataFrame({"layer": name, "channel": range(len(values))} | gap))
    result = pd.concat(frames, ignore_index=True)
    return result.assign(images_synthetic=synthetic_count, images_real=real_count)


@torch.no_grad()
@typed
def measure_generated_images(
    generator: Generator, teacher: nn.Module, spec: DataSpec, per_class: int = 1, *, seed: int = 0
) -> pd.DataFrame:
    """Images drawn for every label, and what the teacher thinks of them.

    The generator draws one balanced batch in its own mode, so that in training mode its BatchNorm layers use the
    statistics of that batch, as during the run; its state is not changed, and the global random state neither.

    Args:
        generator: as trained.
        teacher: classifies the images.
        spec: its number of classes, and the normalization, to show pixels in their natural range.
        per_class: images for every label.
        seed: of the noise.

    Returns:
        One row per image: label (asked for), sample, predicted, confidence (the teacher's probability of the label),
        size (side in pixels), pixels (hexadecimal RGB bytes in rows; ``decode_pixels`` gives the array).
    """
    if generator.classes != spec.classes:
        raise ValueError(f"the generator draws {generator.classes} classes, but spec has {spec.classes}")
    device = _device(teacher)
    labels = torch.arange(spec.classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(seed))
    with kept(generator), eval_mode(teacher):
        images = generator(noise.to(device), labels.to(device))
        probability = forward(teacher, images).softmax(1).cpu()
    if probability.shape != (len(labels), spec.classes):
        raise ValueError(
            f"the teacher must give {spec.classes} logits for each image, not {tuple(probability.shape[1:])}"
        )
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
    pixels = ((images.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return pd.DataFrame(
        {
            "label": labels.tolist(),
            "sample": list(range(per_class)) * spec.classes,
            "predicted": probability.argmax(1).tolist(),
            "confidence": probability.gather(1, labels[:, None])[:, 0].tolist(),
            "size": pixels.shape[1],
            "pixels": [image.contiguous().numpy().tobytes().hex() for image in pixels],
        }
    )


@typed
def decode_pixels(pixels: str, size: int) -> np.ndarray:
    """The image of a row of ``measure_generated_images``: uint8 (size, size, 3)."""
    if not re.fullmatch(f"([0-9a-f]{{2}}){{{max(size, 0) ** 2 * 3}}}", pixels):
        raise ValueError(f"these are not the pixels of an image of {size} x {size}")
    return np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(size, size, 3)


def _images(batch: Batch) -> Tensor:
    images: Any = batch[0] if isinstance(batch, tuple | list) and batch else batch
    check_images(images)
    return images


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _run(model: nn.Module, batches: Iterable[Batch], text: str) -> int:
    """Forward every batch and count the images."""
    check_batches(batches)
    device, count = _device(model), 0
    for batch in tqdm(batches, desc=text, unit="batch"):
        images = _images(batch).to(device)
        forward(model, images)
        count += len(images)
    if not count:
        raise ValueError("there is no image to measure: batches is empty")
    return count


def _checked(model: nn.Module, layers: Iterable[str]) -> list[str]:
    names, known = list(dict.fromkeys(layers)), set(layer_names(model))
    if not names:
        raise ValueError("no layer to measure: the model has no Conv2d or Linear layer, or none was named")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is no Conv2d or Linear of the model; known: {', '.join(sorted(known))}")
    return names


def _check_choice(bits: Sequence[int], granularities: Sequence[str]) -> None:
    if not bits or not granularities:
        raise ValueError("nothing to measure: name bits and granularities")
    for width in bits:
        check_bits(width)
    for granularity in granularities:
        one_of("granularity", granularity, ACTIVATION_GRANULARITIES)


def _input_quantizers(student: fx.GraphModule) -> dict[str, Iterator[ActQuantizer | None]]:
    """By layer the quantizers in front of its calls, in turn, forward after forward."""
    places: dict[str, list[ActQuantizer | None]] = {}
    for name, quantizer in input_places(student):
        places.setdefault(name, []).append(quantizer)
    return {name: cycle(found) for name, found in places.items()}


def _channels_first(x: Tensor) -> Tensor:
    """(N, C, H, W) and (N, F) as they are, (..., F) as rows (N, F); where they can be summed in float64."""
    return where_float64_is(x if x.dim() in (2, 4) else x.flatten(0, -2))


def where_float64_is(x: Tensor) -> Tensor:
    """``x``, on the CPU if its device has no float64: Apple's MPS."""
    return x.cpu() if x.device.type == "mps" else x


def _histograms(x: Tensor, channels: Tensor, bits: int, granularity: str) -> pd.DataFrame:
    qparams = choose_qparams(x, bits, granularity)
    quantized = fake_quantize_with(x, qparams, bits)[:, channels].flatten(2)  # (N, K, H * W)
    step = qparams.scale.expand(*x.shape[:2], 1, 1)[:, channels, 0, 0]  # (N, K)
    lowest = (qparams.zero_point.expand(*x.shape[:2], 1, 1)[:, channels, 0, 0] - 2 ** (bits - 1)) * step
    x = x[:, channels].flatten(2)
    quality = sqnr_db(x, quantized, (2,))
    frames = []
    for rank, channel in enumerate(channels.tolist()):
        both = torch.stack([x[:, rank], quantized[:, rank]])
        low, high = both.min().item(), both.max().item()
        edges = np.linspace(low, max(high, low + 1e-6), 33)
        for image in range(len(x)):
            count, count_quantized = (np.histogram(v[image], edges)[0] for v in both)
            values: dict[str, Any] = dict(image=image, channel=channel, rank=rank, bin_left=edges[:-1])
            values |= dict(bin_right=edges[1:], count=count, count_quantized=count_quantized)
            values |= dict(step=step[image, rank].item(), lowest=lowest[image, rank].item())
            values |= dict(levels_in_use=quantized[image, rank].unique().numel())
            frames.append(pd.DataFrame(values | {"sqnr_db": quality[image, rank].item()}))
    return pd.concat(frames, ignore_index=True)


def _energy(x: Tensor) -> Tensor:
    """Sum of squares of every channel, (N, C, H, W) or (..., F) -> (C,): float32 in an image, float64 between."""
    if x.dim() != 4:
        return where_float64_is(x.flatten(0, -2)).double().square().sum(0)
    rows = x.flatten(2)
    squares = torch.linalg.vecdot(rows, rows)  # dot products: no temporary, and faster than a norm
    return where_float64_is(squares).double().sum(0)


def _error_metrics(count: float, reference: float, value: float, error: float) -> tuple[float, float, float]:
    """mse, sqnr_db, cosine_similarity from the sums; the dot product follows from |v - r|^2 = |v|^2 + |r|^2 - 2 v.r."""
    norms = (reference * value) ** 0.5
    cosine = (reference + value - error) / 2 / norms if norms else float("nan")
    return error / count, _decibel(reference, error), max(-1.0, min(1.0, cosine))


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return float("inf") if signal else float("nan")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


def _quantiles(flat: Tensor, count: int) -> Tensor:
    """``count`` quantiles from 0 to 1 of every row, (C, values) -> (C, count); torch.quantile refuses large inputs."""
    index = torch.linspace(0, flat.shape[1] - 1, count, dtype=torch.float64).round().long().to(flat.device)
    return flat.sort(1).values[:, index].contiguous()


class _Sums(dict[Any, Tensor]):
    """Running sums by key, kept on the CPU; ``combine`` is another way to merge old and new, such as a minimum."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.combine = combine

    def add(self, key: Any, new: Tensor) -> None:
        """Merge ``new`` into what is kept under ``key``."""
        self[key] = self.combine(self[key], new.cpu()) if key in self else new.cpu()
