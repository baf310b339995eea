"""What is measured of every layer of a network, next to the plain forwards that it cannot do without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import pandas as pd
import torch

import granq
from granq.graph import calls_of_layers
from granq.measure.latency import quartiles, timings
from granq.measure.sensitivity import full_precision
from granq.models import build_network


def measure_latency_analysis(
    network: str = "resnet50", images: int = 64, *, batch: int = 8, image_size: int = 224, repetitions: int = 1,
    device: str = "cpu",
) -> pd.DataFrame:  # fmt: skip
    """Time layer errors, sensitivity (each layer alone, weights and activations) and the report, with random weights.

    Layer errors need three forwards: full precision, quantized, and each layer on its clean input. Sensitivity needs
    one, and for each layer what comes after its input, counted in multiply-adds. The report needs both.

    Returns:
        Columns method (forward, layer_error, sensitivity, report), network, images, median_ms, q25_ms, q75_ms,
        forwards_needed, ratio_to_forwards (median over repetitions of the time over that of so many forwards),
        repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    model = build_network(network, 10 if "cifar10" in network else 1000).to(device)
    data = [torch.randn(batch, 3, image_size, image_size, device=device) for _ in range(-(-images // batch))]
    macs = granq.audit(model, data[0][:1]).set_index("layer").macs
    order = macs[[name for name, _ in calls_of_layers(full_precision(model, data))]]
    rest = 1 + (order[::-1].cumsum() / order.sum()).sum()

    @torch.inference_mode()
    def forward() -> None:
        for x in data:
            model(x)

    def report() -> None:
        with tempfile.TemporaryDirectory() as folder:
            granq.report(model, data, out=Path(folder, "report.html"), scheme="strict", bits=3)

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "layer_error": lambda: granq.measure_layer_error(model, data, ["strict"], 3),
        "sensitivity": lambda: granq.measure_sensitivity(model, data, "strict", 3, kinds=["alone"], parts=["both"]),
        "report": report,
    }
    needed = pd.Series({"forward": 1, "layer_error": 3, "sensitivity": rest, "report": 2 + rest})
    forward()  # one warm-up: the others take minutes, and torch's timer would run each three times
    times = pd.DataFrame([{name: milliseconds(run) for name, run in runs.items()} for _ in range(repetitions)])
    frame = quartiles(times, network=network, images=len(data) * batch)
    frame["forwards_needed"] = needed
    frame["ratio_to_forwards"] = (times.div(times.forward, axis=0) / needed).median()
    return timings([frame], "method", repetitions, device)


def milliseconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    common.run(measure_latency_analysis, repetitions=1)
