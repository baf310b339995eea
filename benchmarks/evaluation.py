"""Forward of a quantized network next to the full-precision one: as they are, compiled, and with channels last."""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import pandas as pd
import torch
from torch.nn.utils import parametrize

from granq.convert import quantize_model
from granq.measure.latency import alternate, quartiles, timings
from granq.models import build_network


def measure_latency_evaluation(*, repetitions: int = 30, device: str = "cpu", batch: int = 250) -> pd.DataFrame:
    """Time ResNet-20 for CIFAR-10 with random weights, scheme ``granq``, 3 bits, a batch of images.

    The student's weights are quantized once, before the clock starts, as they are while accuracy is measured.

    Returns:
        Columns method (full precision, quantized; each also compiled, and in channels_last), batch, scheme, bits,
        median_ms, q25_ms, q75_ms, ratio_to_full_precision (of the same kind, median within repetitions),
        ratio_to_default (to the same network, neither compiled nor in channels_last), repetitions, threads, torch,
        device.
    """
    torch.manual_seed(0)
    model = build_network("resnet20_cifar10", 10).to(device)
    student = quantize_model(model, "granq", 3, 3)
    for layer in [m for m in student.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    images = torch.randn(batch, 3, 32, 32, device=device)
    networks: dict[str, Any] = {"full precision": model, "quantized": student}

    @torch.inference_mode()
    def forward(network: Any, images: torch.Tensor) -> object:
        return network(images)

    last = images.contiguous(memory_format=torch.channels_last)
    methods = {name: partial(forward, network, images) for name, network in networks.items()}
    methods |= {f"{name}, compiled": partial(forward, torch.compile(networks[name]), images) for name in networks}
    methods |= {f"{name}, channels_last": partial(forward, networks[name], last) for name in networks}
    times = alternate(methods, repetitions)
    frame = quartiles(times, batch=batch, scheme="granq", bits=3)
    frame["ratio_to_full_precision"] = [
        (times[name] / times[name.replace("quantized", "full precision")]).median() for name in methods
    ]
    frame["ratio_to_default"] = [(times[name] / times[name.partition(",")[0]]).median() for name in methods]
    return timings([frame], "method", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_evaluation)
