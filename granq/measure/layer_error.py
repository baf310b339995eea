"""The error of every layer's output under quantization: of the layer alone, and with everything before it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle, islice, product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from granq.convert import calibrate, check_copy, layer_quantizers, quantize_model
from granq.errors import one_of
from granq.graph import layer_names, plain_copy
from granq.hooks import Batch, eval_mode, images_of, watch
from granq.measure import running
from granq.quantizer import at_least_float32
from granq.schemes import Scheme

MODES = ("local", "accumulated")


def measure_layer_error(
    model: nn.Module, batches: Iterable[Batch],
    schemes: str | Scheme | Sequence[str | Scheme] | Mapping[str, nn.Module], bits: int | tuple[int, int] = 0, *,
    per_channel: bool = False, layers: Sequence[str] | None = None, modes: Sequence[str] = MODES,
    calibration: Iterable[Batch] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Measure the error of every layer's output under quantization, against the full-precision output.

    ``local``: the layer receives the full-precision input, through the activation quantizer directly in front of it
    (where the scheme has one there), and works with its quantized weights. ``accumulated``: the whole network is
    quantized, so errors of earlier layers arrive too.

    Args:
        model: the full-precision network.
        schemes: one or more names, or schemes of one's own; or networks that are quantized already, by whomever, under
            a name: their layers have the names of ``model``'s, and quantize their inputs themselves.
        bits: bit width, or (weights, activations); of networks that are quantized already it is only repeated.
        per_channel: rows of single output channels, too.
        calibration: images for schemes with tracked ranges; by default the **first batch** of ``batches``.

    Columns: layer, scheme, weight_bits, act_bits, mode, (channel, NaN in rows of layers,) mse, sqnr_db (infinite:
    exact), cosine_similarity, images.
    """
    for mode in modes:
        one_of("mode", mode, MODES)
    model, own = plain_copy(model), model  # a convolution that pads itself has another input
    layers = running.checked(model, layers or layer_names(model))
    widths = (bits, bits) if isinstance(bits, int) else bits
    device = next(model.parameters()).device
    images = (images_of(batch).to(device) for batch in batches)
    first = list(islice(images, 1))
    warm = first if calibration is None else [images_of(batch).to(device) for batch in calibration]
    students: dict[str, nn.Module] = {**schemes} if isinstance(schemes, Mapping) else {}
    named = [schemes] if isinstance(schemes, str | Scheme) else schemes
    for scheme in named if not students else ():
        students[str(scheme)] = student = quantize_model(model, scheme, *widths)
        calibrate(student, warm)
        for image in (x for x in first if x.dim() == 4):  # of others the walk says that they are none
            check_copy(student, own, image[:2])
    errors = _Errors(model, students, layers, modes)
    with eval_mode(*students.values()), parametrize.cached():  # weights are quantized once, not once a batch
        count = running.run(model, chain(first, images), "layer error", layers, errors.visit, errors.run_students)
    tables = [errors.table(False).assign(channel=float("nan")), *([errors.table(True)] if per_channel else [])]
    frame = pd.concat(tables, ignore_index=True).assign(weight_bits=widths[0], act_bits=widths[1], images=count)
    columns = "layer scheme weight_bits act_bits mode channel mse sqnr_db cosine_similarity images".split()
    return frame[[name for name in columns if per_channel or name != "channel"]]


class _Errors:
    """Running sums by (scheme, mode, layer), (4, C): values, and energies of the reference, the output, the error."""

    def __init__(
        self, model: nn.Module, students: Mapping[str, nn.Module], layers: Sequence[str], modes: Sequence[str]
    ) -> None:
        self.model, self.students, self.layers, self.modes = model, students, layers, modes
        self.sums: dict[tuple[str, str, str], Tensor] = {}
        self.clean: dict[str, list[Tensor]] = {}  # full-precision outputs in this batch, for each call of a layer
        found = {scheme: layer_quantizers(student) for scheme, student in students.items()}
        # in front of every call in turn, batch after batch; none in layers that fx does not trace
        self.quantizers = {(s, name): cycle(q.inputs or (None,)) for s in found for name, q in found[s].items()}

    def visit(self, name: str, x: Tensor, out: Tensor) -> None:
        for scheme, student in self.students.items() if "local" in self.modes else ():
            quantizer = next(self.quantizers.get((scheme, name), iter(())), None)  # none in a layer of another kind
            self._add(scheme, "local", name, out, student.get_submodule(name)(quantizer(x) if quantizer else x))
        if "accumulated" in self.modes:  # a copy: an in-place ReLU after the layer would change it
            self.clean.setdefault(name, []).append(out.clone())

    def run_students(self, images: Batch, _: Tensor) -> None:
        for scheme, student in self.students.items() if "accumulated" in self.modes else ():
            calls = {name: iter(outputs) for name, outputs in self.clean.items()}

            def visit(name: str, _: Tensor, out: Tensor, scheme: str = scheme, calls: Any = calls) -> None:
                self._add(scheme, "accumulated", name, next(calls[name]), out)

            with watch(student, self.layers, visit):
                student(images_of(images).clone())
        self.clean.clear()

    def _add(self, scheme: str, mode: str, name: str, reference: Tensor, value: Tensor) -> None:
        layer = self.model.get_submodule(name)
        energies = [_energy(x, layer) for x in (reference, value, value - reference)]
        count = torch.full_like(energies[0], reference.numel() / len(energies[0]))
        running.merge(self.sums, (scheme, mode, name), torch.stack([count, *energies]))

    def table(self, per_channel: bool) -> pd.DataFrame:
        frames = {}
        for key in product(self.students, self.modes, self.layers):
            if key in self.sums:  # otherwise the forward never calls this layer
                sums = self.sums[key] if per_channel else self.sums[key].sum(1, keepdim=True)
                frames[key] = pd.DataFrame(sums.T.numpy(), columns=["count", "reference", "output", "error"])
        frame = pd.concat(frames, names=["scheme", "mode", "layer", "channel"]).reset_index()
        products = (frame.reference + frame.output - frame.error) / 2  # |o - r|^2 = |o|^2 + |r|^2 - 2 o.r
        cosine = (products / (frame.reference * frame.output) ** 0.5).clip(-1, 1)
        sqnr_db = running.decibel(frame.reference, frame.error)
        return frame.assign(mse=frame.error / frame["count"], sqnr_db=sqnr_db, cosine_similarity=cosine)


def _energy(x: Tensor, layer: nn.Module) -> Tensor:
    """Sum the squares of every channel of what ``layer`` gives, (C,): float32 in an image, then float64."""
    x = at_least_float32(running.by_channel(x, layer))
    values = x.reshape(*x.shape[:2], -1)
    return torch.linalg.vecdot(values, values).double().sum(0)  # no temporary, and faster than a norm
