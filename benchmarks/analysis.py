"""The layer error of one scheme, all layers, next to the plain forwards that it cannot do without."""

from __future__ import annotations

from functools import partial

import common
import pandas as pd
import torch

from granq.measure.latency import alternate, quartiles, timings
from granq.measure.layer_error import measure_layer_error
from granq.models import build_network


def measure_latency_analysis(
    network: str = "resnet50",
    images: int = 256,
    *,
    batch: int = 4,
    image_size: int = 224,
    repetitions: int = 3,
    device: str = "cpu",
) -> pd.DataFrame:
    """Time the local and accumulated error of one scheme against three forwards of random weights.

    Three are needed: full precision, quantized, and each layer on its clean input.

    Returns:
        Columns method (forwards, layer_error), network, images, median_ms, q25_ms, q75_ms, ratio_to_forwards (median
        within repetitions), repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    model = build_network(network, 10 if "cifar10" in network else 1000).to(device)
    data = [torch.randn(batch, 3, image_size, image_size, device=device) for _ in range(-(-images // batch))]

    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(3):
            for x in data:
                model(x)

    runs = {"forwards": forwards, "layer_error": partial(measure_layer_error, model, data, ["strict"], 3)}
    times = alternate(runs, repetitions)
    frame = quartiles(times, network=network, images=len(data) * batch)
    frame["ratio_to_forwards"] = times.div(times.forwards, axis=0).median()
    return timings([frame], "method", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_analysis, repetitions=3)
