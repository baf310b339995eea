"""Students as files: the codes of weights are packed at their width, so that a file is as large as ``audit`` says.

A file is safetensors. Of a quantized layer it holds ``NAME.weight.codes`` (uint8: code after code, lowest bits first)
and ``NAME.weight.qparams`` (2, groups: multipliers, then zero points), or its values where these are smaller: 1x1
kernels with a scale each. Everything else lies under its state-dict key.
"""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from granq.config import QATConfig
from granq.convert import Quantizer, WeightQuantizer, original_weight, weight_quantizer
from granq.data import DataSpec
from granq.errors import UserError, one_of
from granq.files import read_tensors, write_tensors
from granq.quantizer import QParams, dequantize
from granq.runs import SavedRun, load_run, load_weights, student_of
from granq.schemes import get_scheme

STUDENTS = Path(__file__).with_name("students")


class PackedWeight(WeightQuantizer):
    """Parametrization of a weight that came from a file: its values lie on their grid, and come back as they are."""

    def __init__(
        self, before: WeightQuantizer, scheme: Any, weight: Tensor, grid: Tensor | None, sqnr_db: float
    ) -> None:
        super().__init__(before.bits, get_scheme(scheme), before.groups, before.source)
        self.step = nn.Buffer(self.input_step(weight).detach().clone(), persistent=False)
        self.grid = None if grid is None else nn.Buffer(grid, persistent=False)
        self.sqnr_db = sqnr_db  #: of the weight before it was quantized, which is gone

    def forward(self, weight: Tensor) -> Tensor:
        # half precision leaves the grid
        return weight if self.grid is None or self.grid.dtype != torch.float32 else super().forward(weight)

    def qparams(self, weight: Tensor) -> QParams:
        # the grid is in units of the input's step, within half precision: of a range that was set anew it says nothing
        same = self.grid is not None and torch.allclose(self.input_step(weight).float(), self.step.float(), 2e-3, 0)
        return QParams(*cast(Tensor, self.grid)) if same else super().qparams(weight)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack integers from 0 to ``2**width - 1`` without gaps: int64 of any shape -> uint8 (bytes,)."""
    return torch.from_numpy(np.packbits(codes.reshape(-1, 1).numpy() >> np.arange(width) & 1, bitorder="little"))


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the first ``count`` integers that ``pack`` packed: uint8 (bytes,) -> int64 (count,)."""
    bits = np.unpackbits(packed.numpy(), count=width * count, bitorder="little").reshape(count, width)
    return torch.from_numpy(bits @ 2 ** np.arange(width))


def _layers(student: fx.GraphModule) -> dict[str, Any]:
    return {n: layer for n, layer in student.named_modules(remove_duplicate=False) if weight_quantizer(layer)}


def _quantizers(student: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return what tells quantizers apart, by name."""
    found: Any = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    what = "bits granularity fold clamp promote tracked".split()
    return {name: tuple(getattr(quantizer, key, None) for key in what) for name, quantizer in found.items()}


@torch.no_grad()
def save_packed(path: Path, saved: SavedRun) -> None:
    """Write a student, its ranges set, and JSON facts. What ``load_student`` reads computes the same, bit for bit.

    Raises UserError if the facts lack the name of its network, or settings and data description are of another student.
    """
    layers, records, c = _layers(saved.student), dict[str, dict[str, float]](), saved.config
    if not (name := saved.facts.get("network")):
        raise UserError("the facts lack the name of the student's network, which load_student builds")
    if _quantizers(saved.student) != _quantizers(student_of(path, name, name, c, saved.spec)):
        raise UserError("network or settings are of another student: its scheme or its bits differ")
    if c.image_size != saved.spec.image_size:
        raise UserError(f"the settings say {c.image_size} pixels, the data description {saved.spec.image_size}")
    tensors = {  # without weights and their steps
        key: value
        for key, value in saved.student.state_dict().items()
        if key.removesuffix(".weight").partition(".parametrizations.")[0] not in layers
    }
    for layer, name in {layer: name for name, layer in layers.items()}.items():  # of two names one
        found, records[name] = _packed_weight(layer)
        tensors |= {f"{name}.weight{kind}": tensor for kind, tensor in found.items()}
    header = {"config": saved.config.model_dump(), "spec": saved.spec.facts(), "facts": saved.facts}
    write_tensors(path, tensors, header | {"epoch": saved.epoch, "layers": records})


def _packed_weight(layer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors of a layer's weight by the end of their name, and what the header says of it."""
    quantizer, value, original = cast(Any, weight_quantizer(layer)), layer.weight, original_weight(layer)
    ratio = original.double().square().sum() / (original.double() - value.double()).square().sum()
    record = {"sqnr_db": quantizer.sqnr_db if isinstance(quantizer, PackedWeight) else 10 * ratio.log10().item()}
    qparams: QParams = quantizer.qparams(original)
    step, codes = quantizer.input_step(original), quantizer.codes(original).long()
    low = int(codes.min())
    width = (int(codes.max()) - low).bit_length()  # unclamped codes may leave their range
    smaller = width * codes.numel() + 64 * qparams.scale_inv.numel() < 32 * codes.numel()
    if not smaller or not torch.equal(dequantize(codes, *qparams) / step, value):
        return {"": value}, record
    record |= {"width": width, "low": low}
    return {".codes": pack((codes - low).cpu(), width), ".qparams": torch.stack(qparams)}, record


@torch.no_grad()
def load_student(name: str | Path, device: str = "cpu", network: str = "") -> SavedRun:
    """Open a student: the name of one that comes with granq, a file of ``save_packed``, or a run folder.

    From a file its weights cannot be trained further. A network ``FILE.py:FUNCTION`` must be named again: a file of
    others runs no code. Raises UserError if it is not, if there is no such student, or if the file is damaged.
    """
    if Path(name).is_dir():
        return load_run(name, device, network)
    known = {file.stem: file for file in sorted(STUDENTS.glob("*.safetensors"))}
    if not Path(name).is_file():
        one_of("student or run", str(name), [*known, "FILE.safetensors"])
    try:
        tensors, header = read_tensors(known.get(str(name), name))
        records, facts, epoch = (header[key] for key in ("layers", "facts", "epoch"))
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{name} holds no student of granq export --format packed: {str(error)[:200]}") from error
    config, spec = QATConfig.model_validate_json(json.dumps(header["config"])), DataSpec(**header["spec"])
    student = student_of(name, facts["network"], network, config, spec)
    parts = {n: [tensors.pop(f"{n}.weight{kind}", None) for kind in ("", ".codes", ".qparams")] for n in records}
    own = {f"{n}.weight": original_weight(m) for n, m in _layers(student).items()}
    load_weights(student, own | tensors, name)
    for n, (value, codes, grid) in parts.items():
        layer: Any = student.get_submodule(n)
        weight, quantizer = layer.parametrizations.weight, cast(WeightQuantizer, weight_quantizer(layer))
        if codes is not None and grid is not None:
            found = unpack(codes, records[n]["width"], weight.original.numel()) + records[n]["low"]
            value = dequantize(found.view_as(weight.original), *grid) / quantizer.input_step(weight.original)
        # a copy, as sums over memory that is not aligned round otherwise; tied weights have grids of their own
        weight.original = nn.Parameter(cast(Tensor, value).to(weight.original, copy=True))
        weight[0] = PackedWeight(quantizer, config.scheme, weight.original, grid, records[n]["sqnr_db"])
    return SavedRun(student.requires_grad_(False).to(device), config, spec, facts, epoch)
