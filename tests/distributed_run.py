"""One small run in float64 for tests/test_distributed.py, alone or by torchrun: ``distributed_run.py SCHEME OUT``.

Scheme ``layers`` is ``foldable`` with that recipe.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from granq import QATConfig, train
from granq.distributed import process_group

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(3)
network = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
).eval()  # fmt: skip
config = QATConfig(
    scheme=sys.argv[1].replace("layers", "foldable"), epochs=4, warmup_epochs=2, iterations=5, batch_size=8,
    image_size=8, student_lr=0.01, device="cpu",
)  # fmt: skip
if sys.argv[1] == "layers":
    config = replace(config, recipe="layers", range_quantile=0.9, learned_steps=True, refined_images=16)
    config = replace(config, reestimate_batchnorm=True)
with process_group("cpu"):
    train(network, config, evaluate=lambda _: torch.rand(()).item(), out=Path(sys.argv[2]))  # by the first process only
