"""Fill the folder that ``make gpu`` takes along to a machine without a network: wheels, a teacher, test images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from granq.data import describe_data, load_split
from granq.models import load_teacher, save_teacher, top1_on

#: What a machine with torch, pandas and pytest usually lacks, in the versions that are installed here.
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "tyro", "docstring-parser", "typeguard",
          "pytorchcv")  # fmt: skip
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")


def install(site: Path, python: str, names: tuple[str, ...]) -> None:
    """Unpack wheels for another machine: x86-64 Linux with this version of Python."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), "--upgrade", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    command += [part for name in PLATFORMS for part in ("--platform", name)]
    subprocess.run([*command, *names], check=True)


def main(
    network: str,
    teacher: Path,
    data: str,
    *,
    out: Path = Path("gpu-bundle"),
    image_size: int | None = None,
    python: str = "3.12",
    more: tuple[str, ...] = (),
    wheels: bool = True,
) -> None:
    """Write ``bundle.json``, ``teacher.safetensors``, ``test.safetensors`` and the wheels, unpacked, to ``out``.

    Args:
        network: as for granq quantize; a FILE.py:FUNCTION is copied.
        teacher: its weights, safetensors or torch.save.
        data: whose test split goes along, such as folder:PATH.
        image_size: of images in a folder; normalization is what the teacher's file says, or by size and name.
        python: version of the other machine.
        more: wheels besides, such as torchao.
        wheels: False leaves them out.
    """
    model, spec = load_teacher(network, describe_data(data, network, image_size), teacher)
    test = load_split(spec, "test")
    images, labels = map(torch.cat, zip(*DataLoader(test, batch_size=500), strict=True))  # type: ignore[arg-type]
    out.mkdir(parents=True, exist_ok=True)
    if network.partition(":")[0].endswith(".py"):
        file, _, function = network.rpartition(":")
        shutil.copy(file, out / "network.py")
        network = f"network.py:{function}"
    top1 = top1_on(model, test, spec)
    save_teacher(out / "teacher.safetensors", model, network, spec, top1)
    save_file({"images": images, "labels": labels}, str(out / "test.safetensors"))
    about = {
        "network": network,
        "spec": spec.model_dump(mode="json") | {"name": spec.name.partition(":")[0], "root": ""},
    }
    (out / "bundle.json").write_text(json.dumps(about, indent=2))
    if wheels:
        install(out / "site", python, (*(f"{name}=={version(name)}" for name in WHEELS), *more))
    size = sum(path.stat().st_size for path in out.rglob("*")) / 1e6
    print(f"{out}: teacher {top1:.2f} %, {len(labels)} test images, {size:.0f} MB")


if __name__ == "__main__":
    tyro.cli(main)
