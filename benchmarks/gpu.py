"""Everything that needs a CUDA device, in one call of at most eight minutes: ``make gpu``.

Tests, the quantizers with ``x.clone()`` as their floor, the training step, and last, as far as the time goes, the
published settings of CIFAR-10 at 3 bits with their accuracy. Each part is a process with a limit, so that a fault in
one leaves the others. It runs with any Python that has torch: what else is missing, teacher and test images lie in the
folder $GRANQ_GPU_BUNDLE, gpu-bundle unless set, which ``make gpu-bundle`` fills where there is a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

ROOT = Path(__file__).parent.parent
BUNDLE = Path(os.environ.get("GRANQ_GPU_BUNDLE", "gpu-bundle"))
sys.path[:0] = [str(ROOT)]  # this checkout, if another granq is installed
sys.path.append(str(BUNDLE / "site"))  # last: what the machine has itself is made for it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic sums; read when CUDA starts

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from quantizers import measure_latency_quantizers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from step import GraphedGame, measure_latency_step  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from granq.config import QATConfig  # noqa: E402
from granq.data import DataSpec, ImageData, describe_data, load_split  # noqa: E402
from granq.devices import commit, versions  # noqa: E402
from granq.errors import UserError  # noqa: E402
from granq.files import write_csv  # noqa: E402
from granq.measure.latency import SHAPES  # noqa: E402
from granq.models import digits_teacher, load_teacher, top1_on  # noqa: E402
from granq.qat import AdaDFQ, Game  # noqa: E402

Part = Literal["tests", "quantizer", "step", "run"]
LIMITS: dict[Part, int] = {"tests": 120, "quantizer": 90, "step": 150, "run": 480}  # seconds, each at most what is left
TITLES = {
    "parts": "What was run",
    "quantizer": "Quantizers, forward and backward",
    "step": "A training step of ResNet-20",
    "run": "The published settings of CIFAR-10, W3A3, scheme granq",
}
START = 25  # seconds that a process may need before it begins, and for its last rows
EVERY = 20  # epochs between two measurements of the accuracy


def tests() -> int:
    """Run the tests that need a GPU; warnings of a torch that we did not try are no failures here."""
    import pytest

    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    return int(pytest.main(["-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider", *files]))


def quantizer(device: str, dry: bool) -> Iterator[pd.DataFrame]:
    """Time the quantizers, one shape after the other."""
    for shape in [(2, 3, 4, 4)] if dry else SHAPES:
        yield measure_latency_quantizers([shape], repetitions=2 if dry else 30, device=device)


def step(device: str, dry: bool) -> Iterator[pd.DataFrame]:
    """Time the training step: plain, ours, compiled, as a CUDA graph; the smallest batch last, which is compiled."""
    for batch in (2,) if dry else (200, 64, 16):
        yield measure_latency_step(None, (batch,), repetitions=1 if dry else 30, device=device, compiled=batch == 16)


def keep(path: Path, frames: Iterable[pd.DataFrame]) -> None:
    """Write what there is after every frame: a part that is stopped keeps what it measured."""
    whole = pd.DataFrame()
    for frame in frames:
        write_csv(path, whole := pd.concat([whole, frame], ignore_index=True))


def teacher_and_test(dry: bool) -> tuple[torch.nn.Module, DataSpec, ImageData]:
    """Return what the bundle holds, or the digits, which come with the package."""
    if dry:
        spec = describe_data("digits", "resnet20_cifar10")
        teacher, spec = load_teacher("resnet20_cifar10", spec, digits_teacher())
        return teacher, spec, TensorDataset(*(part[:8] for part in cast(Any, load_split(spec, "test")).tensors))
    if not (file := BUNDLE / "bundle.json").is_file():
        raise UserError(f"{file} is missing: make gpu-bundle fills this folder, on a machine with a network")
    about = json.loads(file.read_text())
    network = about["network"].replace("network.py:", f"{BUNDLE / 'network.py'}:")
    teacher, spec = load_teacher(network, DataSpec(**about["spec"]), BUNDLE / "teacher.safetensors")
    test = load_file(BUNDLE / "test.safetensors")
    return teacher, spec, TensorDataset(test["images"], test["labels"])


def run(device: str, dry: bool, out: Path, seconds: float) -> pd.DataFrame:
    """Train with the published settings until ``seconds`` are over, and write a row for every measured epoch."""
    end = time.monotonic() + seconds
    teacher, spec, test = teacher_and_test(dry)
    short = dict(epochs=3, warmup_epochs=1, iterations=1, batch_size=2) if dry else {}
    config = QATConfig.paper("cifar10", "resnet20_cifar10", 3, device=device, **short)
    graphed = device.startswith("cuda")
    game: Game = (GraphedGame if graphed else Game)(teacher, config, AdaDFQ(config))
    facts = {"full_precision_top1": top1_on(teacher.to(device), test, spec), "test_images": len(test)}
    facts |= {"batch": config.batch_size, "seed": config.seed, "graphed": graphed, "commit": commit()}
    evaluate = partial(top1_on, dataset=test, spec=spec)
    frame, spent, slowest = pd.DataFrame(), time.monotonic(), 0.0
    while game.epoch < config.epochs:
        late = time.monotonic() + 3 * slowest > end  # of this epoch, the next, and the measurement
        due = (game.epoch + 1) % EVERY == 0 or game.epoch + 1 in (config.warmup_epochs, config.epochs) or late or dry
        row = game.run_epoch(evaluate if due else None)
        slowest, spent = max(slowest, time.monotonic() - spent), time.monotonic()
        if due:
            rows = [*frame.to_dict("records"), row | {"seconds": game.seconds} | facts | versions(device)]
            frame = pd.DataFrame(rows)
            write_csv(out / "cuda_run.csv", frame)
        if late:
            break
    return frame


def page(out: Path) -> str:
    """Return the page of the tables in ``out``."""
    text = ["# Measured with CUDA", "", f"Made by `make gpu` in {out}, from the CSV files next to it."]
    shown = {
        "parts": ["part", "seconds", "result", "device", "torch", "commit"],
        "quantizer": ["shape", "method", "median_ms", "ratio_to_granq", "ratio_to_granq_q25", "ratio_to_granq_q75",
                      "ratio_to_copy"],
        "step": ["batch", "method", "median_ms", "speedup", "speedup_q25", "speedup_q75"],
        "run": ["epoch", "warmup", "seconds", "test_top1", "full_precision_top1", "test_images"],
    }  # fmt: skip
    for name, columns in shown.items():
        path = out / f"cuda_{name}.csv"
        rows = (
            pd.read_csv(path)[columns].round(3).to_markdown(index=False) if path.is_file() else "Nothing was measured."
        )
        text += ["", f"## {TITLES[name]}", "", rows]
    return "\n".join([*text, ""])


def execute(out: Path, dry: bool, limit: float, parts: Sequence[Part]) -> pd.DataFrame:
    """Run each part as a process, and write how it ended."""
    end, rows, device = time.monotonic() + limit, [], "cpu" if dry else "cuda"
    facts = {key: versions(device)[key] for key in ("device", "torch")} | {"commit": commit()}
    for part in parts:
        start = time.monotonic()
        left = min(LIMITS[part], end - start - 5)
        options = ["--out", str(out), "--seconds", str(left - START), *["--dry"] * dry]
        try:
            code = subprocess.run([sys.executable, __file__, part, *options], timeout=max(left, 1)).returncode
            result = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {left:.0f} s"
        rows.append({"part": part, "seconds": round(time.monotonic() - start, 1), "result": result} | facts)
        write_csv(out / "cuda_parts.csv", pd.DataFrame(rows))
        (out / "cuda.md").write_text(page(out))
    return pd.DataFrame(rows)


def main(
    part: tyro.conf.Positional[Literal["all", "tests", "quantizer", "step", "run"]] = "all",
    *,
    out: Path = Path("figures"),
    seconds: float = 470,
    dry: Annotated[bool, tyro.conf.arg(help="tiny sizes on the CPU: does it run?")] = False,
) -> int:
    """Run everything, or one part of it."""
    if not dry and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run.")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if dry else "cuda"
    if part == "all":
        table = execute(out, dry, seconds, list(LIMITS))
        print(page(out))
        return int((table.result != "done").any())
    if part == "tests":
        return tests()
    if part == "run":
        run(device, dry, out, seconds)
    else:
        keep(out / f"cuda_{part}.csv", (quantizer if part == "quantizer" else step)(device, dry))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
