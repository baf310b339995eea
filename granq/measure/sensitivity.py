"""Which layer is guilty: every layer quantized alone, every layer but one, and a clean input for one.

A network is put together from two sides: one layer from one side, all others from the other. Whatever stands before
that layer is computed once: the forward stops at every layer in turn, and the rest of it runs on a copy.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.convert import ActQuantizer, Quantizer, activation_places, calibrate, check_copy, quantize_model
from granq.data import predictions
from granq.errors import one_of
from granq.files import write_csv
from granq.graph import calls_of_layers, layer_names, plain_copy
from granq.hooks import Batch, eval_mode, images_of, labels_of
from granq.measure import running
from granq.measure.audit import audit
from granq.models import right
from granq.plain import LAYERS, module_of
from granq.runs import fingerprint
from granq.schemes import Scheme, get_scheme

KINDS, PARTS = ("alone", "all_but", "patched"), ("weights", "activations", "both")


class Side(NamedTuple):
    """Where layers come from."""

    layers: nn.Module  #: whose layers are called
    places: nn.Module | None  #: whose quantizers stand in front of them; ``None``: full precision


def measure_sensitivity(
    model: nn.Module, batches: Sequence[Batch], scheme: str | Scheme | nn.Module, bits: int | Sequence[int] = 0, *,
    kinds: Sequence[str] = KINDS, parts: Sequence[str] = PARTS, calibration: Sequence[Batch] | None = None,
    facts: dict[str, Any] | None = None, out: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Measure what the quantization of every layer does to the output of the network.

    Args:
        batches: a list of images, or of pairs (images, labels).
        scheme: name or scheme; or a network that is quantized already, with layers of the same names. Its BatchNorm
            counts, but not in ``alone`` and ``activations``. Networks of others have part ``both`` only.
        bits: width of weights and activations, or several; without meaning for a network that is quantized already.
        kinds: ``alone``: only this layer is quantized. ``all_but``: all but this layer. ``patched``: all are, and this
            layer reads what it would read in the full-precision network.
        parts: what is quantized: ``weights``, ``activations`` (by the quantizer in front, for this layer) or ``both``.
        calibration: images for schemes with tracked ranges; by default the **first batch** of ``batches``.
        facts: provenance, repeated in every row.
        out: CSV, replaced after every kind, part and width. Those that it already holds are not measured again.

    Columns: layer, place (of the quantizer in front of it, "" without), grid (granularity of its weight, likewise),
    weights, macs (per image), kl (teacher to student, mean over images, nats), agreement (percent of images with the
    teacher's prediction), sqnr_db (of the logits), with labels top1, lost (points below the teacher, and its 95 %
    bootstrap interval ``_low`` to ``_high``, paired by image), right_to_wrong and wrong_to_right (images), kind, part,
    bits, recovered (share of the whole network's KL that is gone; NaN for ``alone``), images, scheme; logit_norm (of
    all logits), start (a hash of a given student, or of tracked ranges): ``out`` is of these.
    """
    for kind, part in product(kinds, parts):
        one_of("kind", kind, KINDS)
        one_of("part", part, PARTS)
    warm = (batches := list(batches))[:1] if calibration is None else list(calibration)
    known = _known(model, scheme, batches, warm) | (facts or {})
    rows, plain = running.kept_rows(out, known), full_precision(model, batches)
    ours = not isinstance(scheme, nn.Module) or any(isinstance(m, Quantizer) for m in scheme.modules())
    parts = parts if ours else ["both"]  # somebody else's layers may round their inputs themselves
    found = {(row["kind"], row["part"], row["bits"]) for row in rows}
    for k in (bits,) if isinstance(bits, int) else bits:
        student = scheme if isinstance(scheme, nn.Module) else prepare(model, scheme, (k, k), warm)
        root = student if ours and isinstance(student, fx.GraphModule) else plain
        sizes = _sizes(root, images_of(batches[0])[:2].to(next(model.parameters()).device))
        for kind, part in (unit for unit in product(kinds, parts) if (*unit, k) not in found):
            noisy = Side(plain if part == "activations" else student, None if part == "weights" else student)
            clean = Side(noisy.layers if kind == "patched" else plain, None)
            sides = (clean, noisy) if kind == "alone" else (noisy, clean)
            frame = compare(model, batches, root, *sides, layer_names(model), f"{kind}, {part}", kind == "patched")
            gone = np.nan if kind == "alone" else 1 - frame.kl / frame.kl.iloc[-1]
            frame = frame[:-1].assign(kind=kind, part=part, bits=k, recovered=gone)
            rows += sizes.merge(frame).assign(**known).to_dict("records")
            if out:
                write_csv(out, pd.DataFrame(rows))
    return pd.DataFrame(rows)


def measure_flips(model: nn.Module, other: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """Count the images of every class whose prediction ``other`` turns from right to wrong, and from wrong to right.

    Columns label, images, right, right_to_wrong, wrong_to_right (counts; ``right`` are those of ``model``).
    """
    batches = [*batches]  # a DataLoader may have another order each time
    before, after = (right(network, batches) for network in (model, other))
    labels = torch.cat([labels.flatten() for _, labels in batches]).cpu().numpy()
    flips = dict(right=before, right_to_wrong=before & ~after, wrong_to_right=after & ~before)
    return pd.DataFrame(dict(label=labels, images=1) | flips).groupby("label", as_index=False).sum()


def _sizes(root: nn.Module, images: Tensor) -> pd.DataFrame:
    """Return what an audit says of the size of layers, and the place that stands directly in front of each."""
    frame = audit(root, images).rename(columns={"weight_granularity": "grid"})
    names: dict[Any, str] = {place: name for name, place in activation_places(root).items()}
    frame["place"] = frame.layer.map({name: names.get(source, "") for name, source in calls_of_layers(root)}).fillna("")
    return frame[["layer", "place", "grid", "weights", "macs"]]


def full_precision(model: nn.Module, batches: Sequence[Batch]) -> fx.GraphModule:
    """Return a copy of ``model`` in which nothing is quantized. Raises UserError if it computes something else."""
    student = quantize_model(model, Scheme(weights=None, activations=None), 8, 8)
    check_copy(student, model, images_of(batches[0])[:2])
    return student.to(memory_format=torch.channels_last)


def prepare(
    model: nn.Module, scheme: str | Scheme, bits: tuple[int, int], images: Iterable[Batch], quantile: float | None = 1.0
) -> fx.GraphModule:
    """Return a student whose static ranges, if it has any, are calibrated."""
    student = quantize_model(model, scheme, *bits)
    calibrate(student, images, quantile)
    return student.to(memory_format=torch.channels_last)


def compare(
    model: nn.Module, batches: Sequence[Batch], root: fx.GraphModule, rest: Side, own: Side, names: Sequence[str],
    text: str, patched: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Compare the output of mixed networks with that of ``model``: columns layer and metrics (``measure_sensitivity``).

    In each network one layer comes from ``own`` and all others from ``rest``; in the last row, without a layer, all
    do. ``root`` gives the graph. With ``patched`` the layer of ``own`` reads what it reads in ``model``.
    """
    network, device, labelled = _Mixed(root, rest), next(model.parameters()).device, labels_of(batches[0]) is not None
    sums, inputs = dict[str, Tensor](), dict[str, list[Tensor]]()

    def keep(name: str, x: Tensor, _: Tensor) -> None:
        inputs.setdefault(name, []).append(x.clone())  # a later layer may change it in place

    def after(batch: Batch, reference: Tensor) -> None:
        labels = cast(Tensor, labels_of(batch)).to(device) if labelled else None
        for name, logits in network.outputs(images_of(batch).detach().to(device), own, names, inputs):
            running.merge(sums, name, _sums(reference, logits, labels))
        inputs.clear()

    walked = plain_copy(model) if patched else model  # a convolution that pads itself has another input
    with eval_mode(root, rest.layers, own.layers), parametrize.cached():  # weights are quantized once
        count = running.run(walked, batches, text, names if patched else (), keep, after)
    return pd.DataFrame([{"layer": name} | _metrics(values, count, labelled) for name, values in sums.items()])


class _Mixed(fx.Interpreter):
    """Runs a graph with the layers of ``rest``, but for the one called ``name``, which comes from ``own``.

    All other modules and parameters are those of ``rest``, too, unless somebody else made it: then those of ``root``.
    """

    def __init__(self, root: fx.GraphModule, rest: Side) -> None:
        self.root, self.rest, self.own, self.name, self.fed = root, rest, rest, "", iter(list[Tensor]())
        graph, self.owner = copy.deepcopy(root.graph), dict[fx.Node, str]()
        for node in list(graph.nodes):
            if isinstance(module_of(root, node), LAYERS):
                self.owner[node], place = str(node.target), node.all_input_nodes[0]
                if isinstance(module_of(root, place), ActQuantizer):
                    with graph.inserting_after(place):  # a call for every layer, so that one can be left out
                        call = graph.call_module(str(place.target), place.args)
                    node.replace_input_with(place, call)
                    self.owner[call] = self.owner[node]
                    if not place.users:
                        graph.erase_node(place)
        super().__init__(rest.layers if any(isinstance(m, Quantizer) for m in root.modules()) else root, graph=graph)

    def outputs(
        self, images: Tensor, own: Side, names: Sequence[str], inputs: dict[str, list[Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the output with the layer of ``own``, for each of ``names`` that is called, and, under "", without."""
        nodes, self.args_iter, started = list(self.graph.nodes), iter([images]), set[str]()
        for i, node in enumerate(nodes):
            name = self.owner.get(node, "")
            if name in names and name not in started:
                started.add(name)
                other = copy.copy(self)
                other.own, other.name, other.fed = own, name, iter(inputs.get(name, ()))
                # a copy, views and all: what follows may change values in place
                other.env = dict(zip(self.env, copy.deepcopy([*self.env.values()]), strict=True))
                yield name, [other.step(later) for later in nodes[i:]][-1]
            output = self.step(node)
        yield "", output

    def step(self, node: fx.Node) -> Any:
        """Compute the value of ``node``, and forget values that nothing will read any more."""
        value = self.env[node] = self.run_node(node)
        for unused in self.user_to_last_uses.get(node, ()):
            del self.env[unused]
        return value

    def run_node(self, n: fx.Node) -> Any:
        """Compute the value of ``n``: a layer or a quantizer of its side, or what the graph says."""
        module, is_own = module_of(self.root, n), self.owner.get(n) == self.name
        side, (args, kwargs) = self.own if is_own else self.rest, self.fetch_args_kwargs_from_env(n)
        if isinstance(module, ActQuantizer):
            return side.places.get_submodule(str(n.target))(*args) if side.places else args[0].clone()
        if isinstance(module, LAYERS):
            clean = next(self.fed, None) if is_own else None
            layer = side.layers.get_submodule(str(n.target))
            return layer(*args, **kwargs) if clean is None else layer(clean)
        return super().run_node(n)


def _known(
    model: nn.Module, scheme: str | Scheme | nn.Module, batches: Sequence[Batch], warm: Sequence[Batch]
) -> dict[str, Any]:
    """Return what tells a table from others: the number of images, the scheme, the norm of all logits, the start."""
    squares, other = list[float](), [scheme] if isinstance(scheme, nn.Module) else []

    def add(_: Batch, output: Tensor) -> None:
        predictions(output)  # refuses what is no logits
        squares.append(output.norm().item() ** 2)

    for network in (model, *other):
        count = running.run(network, batches, "logits", after=add)
    name = type(scheme).__name__ if other else str(scheme)
    tracked = warm if not isinstance(scheme, nn.Module) and get_scheme(scheme).tracked else ()
    start = fingerprint(str([f"{images_of(batch).norm().item():.4g}" for batch in tracked]), *other)[:8]
    return {"images": count, "scheme": name, "logit_norm": sum(squares) ** 0.5, "start": f"#{start}"}


def _sums(reference: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return sums over images (7,): KL, same prediction, energy of logits and of their error, right, and flips."""
    teacher, student = (running.where_float64_is(x).double() for x in (reference, logits))
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    before, after = predictions(reference), predictions(logits)
    was, still = (x == (-1 if labels is None else labels) for x in (before, after))
    counts = (still.sum(), (was & ~still).sum(), (still & ~was).sum())
    sums = (kl, (before == after).sum(), teacher.square().sum(), (teacher - student).square().sum(), *counts)
    return torch.stack([running.where_float64_is(x).double() for x in sums])


def _metrics(sums: Tensor, images: int, labelled: bool) -> dict[str, float]:
    kl, same, signal, noise, right, worse, better = sums.tolist()
    found = dict(kl=kl / images, agreement=100 * same / images, sqnr_db=float(running.decibel(signal, noise)))
    if labelled:  # of images that are drawn again, so many flip as a multinomial distribution says
        lost = running.mean_and_interval("lost", (100, 0, -100), (worse, images - worse - better, better))
        found |= dict(top1=100 * right / images) | lost
        found |= dict(right_to_wrong=int(worse), wrong_to_right=int(better))
    return found
