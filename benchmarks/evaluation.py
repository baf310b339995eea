"""Forward of a quantized network next to the full-precision one, both as they are and under ``torch.compile``."""

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


def measure_latency_evaluation(*, repetitions: int = 30, device: str = "cpu") -> pd.DataFrame:
    """Time ResNet-20 for CIFAR-10 with random weights, scheme ``granq``, 3 bits, 250 images.

    The student's weights are quantized once, before the clock starts, as they are while accuracy is measured.

    Returns:
        Columns method (full precision, quantized; each also compiled), batch, scheme, bits, median_ms, q25_ms, q75_ms,
        ratio_to_full_precision (of the same kind, median within repetitions), repetitions, threads, torch, device.
    """
    torch.manual_seed(0)
    model = build_network("resnet20_cifar10", 10).to(device)
    student = quantize_model(model, "granq", 3, 3)
    for layer in [m for m in student.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    images = torch.randn(250, 3, 32, 32, device=device)
    networks: dict[str, Any] = {"full precision": model, "quantized": student}
    networks |= {f"{name}, compiled": torch.compile(network) for name, network in networks.items()}

    @torch.inference_mode()
    def forward(network: Any) -> object:
        return network(images)

    times = alternate({name: partial(forward, network) for name, network in networks.items()}, repetitions)
    frame = quartiles(times, batch=len(images), scheme="granq", bits=3)
    frame["ratio_to_full_precision"] = [
        (times[name] / times[name.replace("quantized", "full precision")]).median() for name in networks
    ]
    return timings([frame], "method", repetitions, device)


if __name__ == "__main__":
    common.run(measure_latency_evaluation)
