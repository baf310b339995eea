"""The error of every layer's output under quantization: of the layer alone, and with everything before it."""

from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice, product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from granq.convert import calibrate, layer_quantizers, quantize_model
from granq.errors import one_of
from granq.graph import layer_names
from granq.hooks import Batch, images_of, watch
from granq.measure import running
from granq.schemes import Scheme

MODES = ("local", "accumulated")


def measure_layer_error(
    model: nn.Module,
    batches: Iterable[Batch],
    schemes: Sequence[str | Scheme],
    bits: int | tuple[int, int],
    *,
    per_channel: bool = False,
    layers: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    calibration: Iterable[Batch] | None = None,
) -> pd.DataFrame:
    """Measure the error of every layer's output under quantization, against the full-precision output.

    ``local``: the layer receives the full-precision input, through the activation quantizer directly in front of it
    (where the scheme has one there), and works with its quantized weights. ``accumulated``: the whole network is
    quantized, so errors of earlier layers arrive too.

    Args:
        model: the full-precision network.
        batches: the images.
        schemes: names, or schemes of one's own.
        bits: bit width, or (weights, activations).
        per_channel: one row per output channel instead of one per layer.
        layers: names; all Conv2d and Linear layers by default.
        modes: ``"local"``, ``"accumulated"`` or both.
        calibration: images for schemes with tracked ranges; by default the **first batch** of ``batches``.

    Returns:
        Columns layer, scheme, weight_bits, act_bits, mode, (channel,) mse, sqnr_db, cosine_similarity, images. An
        exact output has an SQNR of infinity.
    """
    for mode in modes:
        one_of("mode", mode, MODES)
    layers = running.checked(model, layers or layer_names(model))
    widths = (bits, bits) if isinstance(bits, int) else bits
    device = next(model.parameters()).device
    images = (images_of(batch).to(device) for batch in batches)
    first = list(islice(images, 1))
    warm = first if calibration is None else [images_of(batch).to(device) for batch in calibration]
    students = {str(scheme): quantize_model(model, scheme, *widths) for scheme in schemes}
    for student in students.values():
        calibrate(student, warm)
    errors = _Errors(students, layers, modes)
    with parametrize.cached():  # weights are quantized once, not once a batch
        count = running.run(model, chain(first, images), "layer error", layers, errors.visit, errors.run_students)
    return errors.table(widths, per_channel, count)


class _Errors:
    """Running sums by (scheme, layer, mode), (4, C): values, and energies of the reference, the output, the error."""

    def __init__(self, students: dict[str, fx.GraphModule], layers: Sequence[str], modes: Sequence[str]) -> None:
        self.students, self.layers, self.modes = students, layers, modes
        self.sums: dict[tuple[str, str, str], Tensor] = {}
        self.clean: dict[str, list[Tensor]] = {}  # full-precision outputs in this batch, for each call of a layer
        self.quantizers = {  # in front of every call in turn, batch after batch; none in layers that fx does not trace
            (scheme, name): cycle(quantizers.inputs or (None,))
            for scheme, student in students.items()
            for name, quantizers in layer_quantizers(student).items()
        }

    def visit(self, name: str, x: Tensor, out: Tensor) -> None:
        """Take a layer's full-precision input and output."""
        for scheme, student in self.students.items() if "local" in self.modes else ():
            quantizer = next(self.quantizers[scheme, name])
            value = student.get_submodule(name)(x if quantizer is None else quantizer(x))
            self._add(scheme, name, "local", out, value)
        if "accumulated" in self.modes:  # a copy: an in-place ReLU after the layer would change it
            self.clean.setdefault(name, []).append(out.clone())

    def run_students(self, images: Batch, _: Tensor) -> None:
        """Compare what every layer gives in the quantized networks with what ``visit`` has just seen."""
        for scheme, student in self.students.items() if "accumulated" in self.modes else ():
            calls = {name: iter(outputs) for name, outputs in self.clean.items()}

            def visit(name: str, _: Tensor, out: Tensor, scheme: str = scheme, calls: Any = calls) -> None:
                self._add(scheme, name, "accumulated", next(calls[name]), out)

            with watch(student, self.layers, visit):
                student(images)
        self.clean.clear()

    def _add(self, scheme: str, name: str, mode: str, reference: Tensor, value: Tensor) -> None:
        energies = [_energy(x) for x in (reference, value, value - reference)]
        count = torch.full_like(energies[0], reference.numel() / len(energies[0]))
        running.merge(self.sums, (scheme, name, mode), torch.stack([count, *energies]))

    def table(self, widths: tuple[int, int], per_channel: bool, images: int) -> pd.DataFrame:
        rows: list[tuple[Any, ...]] = []
        for scheme, mode, name in product(self.students, self.modes, self.layers):
            if (scheme, name, mode) in self.sums:  # otherwise the forward never calls this layer
                sums = self.sums[scheme, name, mode]
                groups = sums.T.tolist() if per_channel else [sums.sum(1).tolist()]
                rows += [(name, scheme, *widths, mode, i, *_metrics(*group), images) for i, group in enumerate(groups)]
        columns = "layer scheme weight_bits act_bits mode channel mse sqnr_db cosine_similarity images".split()
        return pd.DataFrame(rows, columns=columns).drop(columns=[] if per_channel else "channel")


def _energy(x: Tensor) -> Tensor:
    """Sum the squares of every channel, (N, C, H, W) or (..., F) -> (C,): float32 in an image, then float64."""
    if x.dim() != 4:
        return running.where_float64_is(x.flatten(0, -2)).double().square().sum(0)
    rows = x.flatten(2)
    squares = torch.linalg.vecdot(rows, rows)  # dot products: no temporary, and faster than a norm
    return running.where_float64_is(squares).double().sum(0)


def _metrics(count: float, reference: float, value: float, error: float) -> tuple[float, float, float]:
    """Return mse, sqnr_db and cosine_similarity; the dot product follows from |v - r|^2 = |v|^2 + |r|^2 - 2 v.r."""
    norms = (reference * value) ** 0.5
    cosine = (reference + value - error) / 2 / norms if norms else float("nan")
    return error / count, running.decibel(reference, error), max(min(cosine, 1.0), -1.0)
