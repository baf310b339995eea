"""``granq report``: the page about a network by name, or about a finished student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

import granq
from granq.app.jobs import Count, Mean, Network, Out, Std, channels, likely_data, parse_bits

Device = Annotated[str, arg(help="auto, cpu, cuda or mps")]


def report(
    run: Positional[Path | None] = None, *, out: Out, network: Network = "", teacher: Path | None = None,
    data: str | None = None, scheme: str = "", bits: str = "", images: Count = 64,
    image_size: int | None = None, mean: Mean = "", std: Std = "", device: Device = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Write one HTML page about a network under quantization, layer by layer: a network by name, or a student.

    Args:
        run: run folder or packed student; without it --scheme and --bits (granq and 3,3) quantize --network
        out: new file, FILE.html
        teacher: checkpoint; without it digits have theirs, others are downloaded; a run's student is its own
        data: test images of digits, cifar10, cifar100, imagenet or folder:PATH; without it, random shapes
        images: how many
        image_size: of a network by name; by default that of its data
    """
    from granq.data import dataset_name

    if run and (scheme or bits or image_size):
        raise granq.UserError(f"{run} has a scheme, bits and an image size of its own: leave yours out")
    device, given, facts = granq.devices.resolve_device(device), channels(mean, std), dict[str, str]()
    options: dict[str, Any] = {"scheme": scheme or "granq", "bits": tuple(parse_bits(bits or "3,3").values())}
    if run:
        saved = granq.load_student(run, device, network)
        network, spec, c = network or saved.facts["network"], saved.spec, saved.config
        if teacher is None and not run.is_dir():  # the weights of a packed student are rounded
            teacher = Path(granq.models.__file__).with_name("teachers") / str(saved.facts.get("teacher"))
            if run.is_file() or not teacher.is_file():  # of a student that comes with granq ours, of others none
                raise granq.UserError(f"{run} holds rounded weights only: pass its full-precision --teacher")
        options |= {"scheme": saved.student}
        facts |= {"quantized": f"{c.scheme} {c.bits}", "student": run.name, "recipe": c.recipe, "seed": str(c.seed)}
        if data:
            given = given or {"mean": spec.mean, "std": spec.std}
            spec = granq.describe_data(data, network, c.image_size, **given).prepared_as(spec)
        model = granq.build_network(network, spec.classes).to(device)
        model.load_state_dict(saved.student.state_dict(), strict=False)  # which also holds what quantizes
    else:
        spec = granq.describe_data(data or likely_data(network), network, image_size, **given)
    if teacher or not run:
        model, spec = granq.load_teacher(network, spec, teacher, device)
        spec = spec.model_copy(update={"image_size": image_size or spec.image_size})
    facts |= {"network": Path(network).name, "data": dataset_name(data or "none")}
    facts["teacher"] = teacher.name if teacher else "the student without rounding" if run else "pretrained"
    drawn = granq.batches(granq.load_split(spec, "test"), spec, 16, seed=0) if data else ()
    options |= {"images": images, "image_size": spec.image_size, "facts": facts}
    return {"out": str(out)} | granq.report(model, drawn, out=out, **options)
