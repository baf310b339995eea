"""Does compiling whole steps pay? A step of recipe match, and one of refining images, eager and by ``torch.compile``.

    python benchmarks/compiled.py --network examples/public_networks.py:resnet20 --teacher FILE --out runs/compiled.csv

Both versions alternate on the same batch. The compiled one has teacher, student and losses in one graph.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, fx, nn
from torch.nn import functional as F

import granq
from granq.devices import commit
from granq.files import write_csv
from granq.generator import batchnorm_inputs, batchnorm_loss
from granq.losses import layer_loss
from granq.match import REFINED_LABELS, Match, batchnorm_outputs, relu_ceilings
from granq.measure.latency import alternate, quartiles, timings
from granq.qat import Game


def with_norms(model: nn.Module, before: bool) -> fx.GraphModule:
    """Return the network as a graph that also gives what enters every BatchNorm2d, or what leaves it."""
    traced = isinstance(model, fx.GraphModule)
    graph = fx.GraphModule(model, copy.deepcopy(model.graph)) if traced else fx.symbolic_trace(model)
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    norms = [n for n in calls if isinstance(graph.get_submodule(str(n.target)), nn.BatchNorm2d)]
    (end,) = (n for n in graph.graph.nodes if n.op == "output")
    values = [n.args[0] for n in norms]
    for i, norm in enumerate(norms if not before else ()):
        with graph.graph.inserting_after(norm):  # a ReLU after it may work in place
            values[i] = graph.graph.call_method("clone", (norm,))
    end.args = ((end.args[0], values),)
    graph.recompile()
    return graph


def steps(game: Game, images: Tensor, labels: Tensor) -> dict[str, tuple[Callable[[], Tensor], Any]]:
    """Return losses of both steps, eager and as one function, and what their gradients are of."""
    teacher, student, recipe = game.teacher, game.student, game.recipe
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    outputs, inputs, trained = with_norms(teacher, False), with_norms(teacher, True), with_norms(student, False)
    ceilings, pixels = relu_ceilings(student), images.clone().requires_grad_()

    def match() -> Tensor:
        with torch.no_grad(), game.autocast(), batchnorm_outputs(teacher) as wanted:
            t = teacher(images).float()
        with game.autocast(), batchnorm_outputs(student) as got:
            s = student(images).float()
        return layer_loss(wanted, got, ceilings) + recipe.student_loss(t, s, labels)

    def match_whole() -> Tensor:
        with torch.no_grad(), game.autocast():
            t, wanted = outputs(images)
        with game.autocast():
            s, got = trained(images)
        return layer_loss(wanted, got, ceilings) + recipe.student_loss(t.float(), s.float(), labels)

    def refine() -> Tensor:
        with game.autocast(), batchnorm_inputs(teacher) as seen:
            logits = teacher(pixels.clone())
        return batchnorm_loss(seen) + REFINED_LABELS * F.cross_entropy(logits.float(), labels)

    def refine_whole() -> Tensor:
        with game.autocast():
            logits, seen = inputs(pixels.clone())
        moments = [torch.var_mean(x.float(), (0, 2, 3), correction=0) for x in seen]
        terms = [
            F.mse_loss(mean, norm.running_mean) + F.mse_loss(var, norm.running_var)  # type: ignore[arg-type]
            for (var, mean), norm in zip(moments, norms, strict=True)
        ]
        return torch.stack(terms).mean() + REFINED_LABELS * F.cross_entropy(logits.float(), labels)

    of = {"match": game.student_params, "refine": [pixels]}
    return {
        "match": (match, of["match"]), "match, compiled": (match_whole, of["match"]),
        "refine": (refine, of["refine"]), "refine, compiled": (refine_whole, of["refine"]),
    }  # fmt: skip


def main(
    *, network: str, teacher: Path, out: Path, scheme: str = "strict", batch_size: int = 64, bf16: bool = True,
    repetitions: int = 15,
) -> None:  # fmt: skip
    spec = granq.describe_data("digits", network)  # 32 pixels; its images are not used
    model, _ = granq.load_teacher(network, spec.fit_classes(10), teacher)
    bits = dict(weight_bits=3, act_bits=3, batch_size=batch_size, warmup_epochs=0, refined_images=0)
    config = granq.QATConfig(recipe="match", scheme=scheme, bf16=bf16, device="cpu", **bits)
    game = Game(model, config, Match(config))
    game._begin_training(None)
    images, labels = game.recipe.draw(game)
    runs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, list[float]] = {"compile_seconds": [], "loss": []}
    for name, (loss, of) in steps(game, images, labels).items():
        loss = torch.compile(loss, dynamic=False) if "compiled" in name else loss
        runs[name] = lambda loss=loss, of=of: torch.autograd.grad(loss(), of, allow_unused=True)
        start = time.perf_counter()
        runs[name]()
        facts["compile_seconds"].append(time.perf_counter() - start)
        facts["loss"].append(loss().item())
    frame = quartiles(alternate(runs, repetitions)).assign(**facts, scheme=scheme, batch_size=batch_size, bf16=bf16)
    frame = timings([frame], "step", repetitions, "cpu").assign(network=network, commit=commit())
    write_csv(out, frame, "%.6g")
    print(frame.to_string())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
