"""Two processes with a shared batch do what one does with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from granq.runs import RunFolder

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
#: relative, in float64; measured at most 4e-8 after 20 steps. It starts in the last bits, as between any two orders of
#: the same sums; Adam's division by small gradients and the rounding to codes let it grow, in float32 to per cents.
TOLERANCE = 1e-6


def python(*arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# ranges of the joint batch, or of an image; layers: a recipe
@pytest.mark.parametrize("scheme", ["layerwise", "release", "foldable", "layers"])
def test_two_processes_equal_one_with_the_joint_batch(tmp_path, scheme):
    script = Path(__file__).parent / "distributed_run.py"
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        done = python(*launcher, script, scheme, tmp_path / name)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (pd.read_csv(tmp_path / name / "history.csv") for name in ("one", "two"))
    for loss in ("generator_loss", "student_loss", "bn_loss", "teacher_top1"):
        assert two[loss].to_numpy() == pytest.approx(one[loss].to_numpy(), rel=TOLERANCE, nan_ok=True)
    states = [RunFolder(tmp_path / name).load() for name in ("one", "two")]
    for part in ("student", "generator"):  # the generator's running BatchNorm statistics and tracked ranges among them
        for key, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][key], value, rtol=1e-4, atol=1e-6, msg=f"{part} {key}")


def test_torchrun_of_the_command_writes_one_run(folder, teacher, tmp_path):
    common = f"granq.cli quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme strict"
    common += f" --bits 3,3 --epochs 1 --warmup-epochs 1 --iterations 1 --device cpu --json --out {tmp_path / 'run'}"
    bad = python(*TORCHRUN, "-m", *common.split(), "--batch-size", 9)
    assert bad.returncode != 0 and "batch_size 9 does not divide among 2 processes" in bad.stderr
    done = python(*TORCHRUN, "-m", *common.split(), "--batch-size", 8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"last_top1"') == 1  # the first process speaks, and only it
    assert (tmp_path / "run/result.json").is_file()
