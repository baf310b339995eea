"""Which layer is guilty: every layer quantized alone, every layer but one, and a clean input for one.

A network is put together from two sides, and all but one layer come from the same one. What stands before that layer
is computed once for all layers: when the forward reaches a layer, only the rest of the graph runs again with the layer
of the other side.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from granq.convert import ActQuantizer, activation_places, calibrate, layer_quantizers, quantize_model
from granq.errors import one_of
from granq.files import write_csv
from granq.graph import LAYERS, layer_input, layer_names, module_of
from granq.hooks import Batch, images_of
from granq.measure import running
from granq.schemes import Scheme

KINDS = ("alone", "all_but", "patched")
PARTS = ("weights", "activations", "both")
NOTHING = Scheme(weights=None, activations=None)


class Side(NamedTuple):
    """Where layers come from."""

    layers: nn.Module  #: whose layers are called
    places: nn.Module | None  #: whose quantizers stand in front of them; ``None``: full precision


def measure_sensitivity(
    model: nn.Module, batches: Sequence[Batch], scheme: str | Scheme | nn.Module, bits: int | Sequence[int] = 0, *,
    kinds: Sequence[str] = KINDS, parts: Sequence[str] = PARTS, layers: Sequence[str] | None = None,
    calibration: Iterable[Batch] | None = None, facts: dict[str, Any] | None = None, out: Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Measure what the quantization of every layer does to the output of the network.

    Args:
        model: the full-precision network.
        batches: a list of images, or of pairs (images, labels).
        scheme: name or scheme; or a network that is quantized already, by whomever, whose layers have the names of
            ``model``'s. Of a network that ``quantize_model`` did not make, only what its layers do themselves counts.
        bits: width of weights and activations, or several; of no meaning for a network that is quantized already.
        kinds: ``alone``: only this layer is quantized. ``all_but``: all but this layer. ``patched``: all are, and this
            layer reads what it would read in the full-precision network.
        parts: what is quantized: ``weights``, ``activations`` (what layers read; in schemes that quantize after a ReLU
            its other readers belong to no layer) or ``both``.
        layers: names; all Conv2d and Linear layers that are called by default.
        calibration: images for schemes with tracked ranges; by default the **first batch** of ``batches``.
        facts: provenance, repeated in every row.
        out: CSV, replaced after every kind, part and width. Rows that it already holds are not measured again.

    Returns:
        Columns layer, place (of the activation quantizers in front of it, "" without), scheme, kind, part, bits, kl
        (teacher to student, mean over images, nats), agreement (percent of images with the teacher's prediction),
        sqnr_db (of the logits), recovered (share of the KL of the whole quantized network that is gone; NaN for
        ``alone``), with labels top1, lost (points below the teacher, with the ends ``_low`` and ``_high`` of its 95 %
        bootstrap interval, paired by image), right_to_wrong and wrong_to_right (images), weights, macs (per image),
        images, batch_size, and ``facts``.
    """
    for what, given, known_ones in (("kind", kinds, KINDS), ("part", parts, PARTS)):
        for name in given:
            one_of(what, name, known_ones)
    layers, batches = running.checked(model, layers or layer_names(model)), list(batches)
    known = {"images": sum(len(images_of(b)) for b in batches), "batch_size": max(len(images_of(b)) for b in batches)}
    known |= {"scheme": type(scheme).__name__ if isinstance(scheme, nn.Module) else str(scheme)} | (facts or {})
    rows = running.kept_rows(out, known)
    found = {tuple(row[key] for key in ("layer", "kind", "part", "bits")) for row in rows}
    plain, sizes = quantize_model(model, NOTHING, 8, 8), _sizes(model, batches[:1], layers)
    clean, warm = Side(plain, None), batches[:1] if calibration is None else [*calibration]
    for k in [bits] if isinstance(bits, int) else bits:
        student = scheme if isinstance(scheme, nn.Module) else prepare(model, scheme, (k, k), warm)
        root = student if activation_places(student) else plain
        for kind in kinds:
            for part in parts:
                names = [name for name in layers if name in sizes and (name, kind, part, k) not in found]
                noisy = Side(plain if part == "activations" else student, None if part == "weights" else student)
                rest, own = (clean, noisy) if kind == "alone" else (noisy, Side(noisy.layers, None))
                own = clean if kind == "all_but" else own
                text = f"{kind}, {part}, {k} bits"
                measured = compare(model, batches, root, rest, own, names, text, kind == "patched") if names else {}
                for name in names:
                    row = dict(layer=name, place=_places(root, name), kind=kind, part=part, bits=k)
                    recovered = 1 - measured[name]["kl"] / measured[""]["kl"] if kind != "alone" else np.nan
                    rows.append(row | measured[name] | {"recovered": recovered} | sizes[name] | known)
                if out and names:
                    write_csv(out, pd.DataFrame(rows))
    return pd.DataFrame(rows)


def prepare(
    model: nn.Module, scheme: str | Scheme, bits: tuple[int, int], images: Iterable[Batch], quantile: float = 1.0
) -> fx.GraphModule:
    """Return a student whose static ranges, if it has any, are calibrated."""
    student = quantize_model(model, scheme, *bits)
    device = next(model.parameters()).device
    calibrate(student, [images_of(batch).to(device) for batch in images], quantile)
    return student


def compare(
    model: nn.Module, batches: Sequence[Batch], root: fx.GraphModule, rest: Side, own: Side, names: Sequence[str],
    text: str, patched: bool = False,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Compare the output of networks with that of ``model``: of ``rest`` (under ""), and of ``rest`` with one layer
    of ``own``, for each of the ``names``. With ``patched`` that layer reads what it reads in ``model``.
    """  # noqa: D205
    device, (graph, owner) = next(model.parameters()).device, _one_quantizer_a_layer(root)
    sums, inputs, labelled = dict[str, Tensor](), dict[str, list[Tensor]](), not isinstance(batches[0], Tensor)

    def keep(name: str, x: Tensor, _: Tensor) -> None:
        inputs.setdefault(name, []).append(x.clone())  # a later layer may change it in place

    def after(batch: Batch, reference: Tensor) -> None:
        network = _Mixed(root, graph, owner, rest)
        for name, logits in network.with_one_other(images_of(batch).to(device), own, names, inputs):
            running.merge(sums, name, _sums(reference, logits, batch[1].to(device) if labelled else None))
        inputs.clear()

    with parametrize.cached():  # weights are quantized once, not at every call
        count = running.run(model, batches, text, names if patched else (), keep, after)
    return {name: _metrics(values, count, labelled) for name, values in sums.items()}


def _one_quantizer_a_layer(root: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Return a graph in which no two layers share the call of a quantizer, and which layer a call belongs to."""
    graph, owner = copy.deepcopy(root.graph), dict[fx.Node, str]()
    for node in list(graph.nodes):
        if isinstance(module_of(root, node), LAYERS):
            owner[node], place = str(node.target), layer_input(node)
            if isinstance(place, fx.Node) and isinstance(module_of(root, place), ActQuantizer):
                with graph.inserting_after(place):  # not before the layer: by then the value may have been changed
                    call = graph.call_module(str(place.target), place.args)
                node.replace_input_with(place, call)
                owner[call] = owner[node]
                if not place.users:
                    graph.erase_node(place)
    return graph, owner


class _Mixed(fx.Interpreter):
    """A network whose layers come from ``rest``, except for ``name``, which comes from ``own`` and may be fed."""

    def __init__(
        self, root: fx.GraphModule, graph: fx.Graph, owner: dict[fx.Node, str], rest: Side, own: Side | None = None,
        name: str | None = None, fed: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        super().__init__(root, graph=graph)
        self.owner, self.rest, self.own, self.name, self.fed = owner, rest, own, name, iter(fed)
        self.args_iter: Iterator[Any] = iter(())

    def run_node(self, n: fx.Node) -> Any:
        module, is_own = module_of(self.module, n), self.own and self.owner.get(n) == self.name
        side = self.own if self.own and is_own else self.rest
        if isinstance(module, LAYERS):
            x = self.fetch_args_kwargs_from_env(n)
            if is_own and (clean := next(self.fed, None)) is not None:
                x = (clean,), {}
            return side.layers.get_submodule(str(n.target))(*x[0], **x[1])
        if isinstance(module, ActQuantizer):
            (x,) = self.fetch_args_kwargs_from_env(n)[0]
            return side.places.get_submodule(str(n.target))(x) if side.places else x.clone()
        return super().run_node(n)

    def step(self, node: fx.Node) -> Any:
        """Compute the value of ``node`` and forget those that nobody will read any more."""
        value = self.env[node] = self.run_node(node)
        for unused in self.user_to_last_uses.get(node, ()):
            del self.env[unused]
        return value

    def with_one_other(
        self, images: Tensor, own: Side, names: Sequence[str], inputs: dict[str, list[Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the output with the layer of ``own`` for each of ``names``, and last, under "", without any."""
        nodes, self.args_iter = list(self.graph.nodes), iter([images])
        first = {self.owner[node]: node for node in reversed(nodes) if node in self.owner}
        starts = {first[name]: name for name in names}
        for i, node in enumerate(nodes):
            if name := starts.get(node):
                other = _Mixed(self.module, self.graph, self.owner, self.rest, own, name, inputs.get(name, ()))
                # a copy, views and all: what comes may be changed in place
                other.env = dict(zip(self.env, copy.deepcopy([*self.env.values()]), strict=True))
                yield name, [other.step(later) for later in nodes[i:]][-1]
            value = self.step(node)
        yield "", value


def _places(root: nn.Module, name: str) -> str:
    names = {place: name for name, place in activation_places(root).items()}
    return " ".join(dict.fromkeys(names[place] for place in layer_quantizers(root)[name].inputs if place))


def _sizes(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return weights and, per image, multiply-accumulates of every layer that is called."""
    macs: dict[str, int] = {}

    def visit(name: str, _: Tensor, out: Tensor) -> None:
        macs[name] = macs.get(name, 0) + out.numel() * model.get_submodule(name).weight[0].numel()

    count = running.run(model, batches, "layers", names, visit)
    sizes = {name: model.get_submodule(name).weight.numel() for name in names}
    return {name: {"weights": sizes[name], "macs": macs[name] // count} for name in names if name in macs}


def _sums(reference: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return sums over images (7,): KL, same prediction, energy of logits and of their error, right, and flips."""
    teacher, student = (running.where_float64_is(x).double() for x in (reference, logits))
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    before, after = teacher.argmax(1), student.argmax(1)
    right, was = (after == labels, before == labels) if labels is not None else (before < 0, before < 0)
    sums = [kl, (before == after).sum(), teacher.square().sum(), (teacher - student).square().sum()]
    return torch.stack([x.double() for x in (*sums, right.sum(), (was & ~right).sum(), (right & ~was).sum())])


def _metrics(sums: Tensor, images: int, labelled: bool) -> dict[str, float]:
    kl, same, signal, noise, right, worse, better = sums.tolist()
    found = dict(kl=kl / images, agreement=100 * same / images, sqnr_db=float(running.decibel(signal, noise)))
    if labelled:
        # images drawn again: how many of them flip is multinomial
        shares = np.array([worse, better, images - worse - better]) / images
        drawn = np.random.default_rng(0).multinomial(images, shares, 2000)
        low, high = 100 * np.quantile((drawn[:, 0] - drawn[:, 1]) / images, (0.025, 0.975))
        found |= dict(top1=100 * right / images, lost=100 * (worse - better) / images, lost_low=low, lost_high=high)
        found |= dict(right_to_wrong=int(worse), wrong_to_right=int(better))
    return found
