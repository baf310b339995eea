"""What every command does; ``granq quantize`` is ``jobs.Job.run``. Public names are imported at first use."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tyro.conf import Positional, Suppress, UseAppendAction, arg

import granq
from granq.app.jobs import Count, Data, Mean, Network, Out, Seed, Std, TeacherFile, channels, likely_data, parse_bits
from granq.app.reporting import Device, report
from granq.errors import UserError
from granq.schemes import check_bits

OwnNetwork = Annotated[str, arg(help="FILE.py:FUNCTION, again, if the run is of one: it is code")]
Percent = Annotated[float, Field(ge=0, le=100)]
Words = tuple[str, ...]
Result = dict[str, Any]


def demo(*, out: Out = Path("runs/demo"), seeds: Count = 3, epochs: Count = 6, device: Device = "auto") -> Result:
    """Quantize the digits to 2 bits: three schemes, a table and pictures. Downloads nothing."""
    import pandas as pd

    from granq.app.sweep import combine

    granq.runs.RunFolder(out).check_free()
    network, schemes = "resnet20_cifar10", ("layerwise", "granq", "strict")
    given = f"--data digits --epochs {epochs} --warmup-epochs {epochs // 2} --iterations 20 --batch-size 32"
    given += f" --student-lr 0.001 --device {device}"
    teachers = [granq.digits_teacher()]
    runs = combine(out, [network], teachers, schemes, ["2,2"], ["adadfq"], range(seeds), given.split())
    results = pd.DataFrame([run.run() for run in runs])
    one, columns = results.iloc[-1], ["ptq_top1", "last_top1", "best_top1"]
    groups = results.groupby("scheme", sort=False)[columns]
    means: Any = groups.mean()
    cells = means.map("{:.2f}".format) + (" ± " + groups.std().map("{:.2f}".format) if seeds > 1 else "")
    table = (
        f"digits, {network}, W2A2, teacher {one.teacher_top1:.2f} %, n = {seeds} seeds, {one.test_images} test images, "
        f"{one.device}, torch {one.torch}. Mean ± std in percent; best_top1 selects on the test split.\n\n"
        f"{cells.to_markdown()}\n"
    )
    (out / "results.md").write_text(table, encoding="utf-8")
    granq.files.write_csv(out / "accuracy_bits.csv", results, "%.6g")
    granq.redraw_figures(["accuracy_bits"], out)
    shared = granq.Workbench(teacher=teachers[0], runs=[one.out], out=out, device=device)
    granq.make_figures(["activation_distortion", "synthetic_images"], shared)
    print(f"{table}\nNext: open {out}/accuracy_bits.png, then {out}/activation_distortion.png.")
    return {"out": str(out), "teacher_top1": one.teacher_top1} | means.last_top1.to_dict() | {"rows": _records(results)}


def teacher(
    *, data: Data, network: Network, out: Out, epochs: Count = 30,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2, seed: Seed = 0, image_size: int | None = None,
    flip: bool = True, mean: Mean = "", std: Std = "", device: Device = "auto", bf16: bool = False,
) -> Result:  # fmt: skip
    """Train a full-precision teacher. The same command again goes on where it was stopped.

    Args:
        out: file to write, FILE.safetensors; FILE.checkpoint has the last epoch until then
        lr: peak learning rate
        flip: mirror half of the images, but no digits; --no-flip where left and right mean something
        bf16: train under bfloat16 autocast
    """
    _check_new(out, ".safetensors")
    checkpoint = out.with_suffix(".checkpoint")
    spec = granq.describe_data(data, network, image_size, **channels(mean, std))
    device = granq.devices.resolve_device(device)
    how: Result = dict(epochs=epochs, lr=lr, seed=seed, flip=flip, device=device, bf16=bf16, checkpoint=checkpoint)
    model, top1 = granq.train_teacher(network, spec, **how)
    _check_new(out)  # by another process, meanwhile
    granq.save_teacher(out, model, network, spec, top1)
    checkpoint.unlink(missing_ok=True)
    return dict(out=str(out), data=data, network=network, top1=top1, seed=seed) | granq.devices.versions(device)


def evaluate(run: Positional[Path], *, data: Data, network: OwnNetwork = "", device: Device = "auto") -> Result:
    """Measure the accuracy of a finished run, or of a packed student by its file or name."""
    device = granq.devices.resolve_device(device)
    return _run_on(run, data, network, device)[-1] | granq.devices.versions(device)


def _run_on(run: Path, data: str, network: str, device: str) -> tuple[granq.SavedRun, granq.DataSpec, Any, Result]:
    """Return a run, ``data`` as its network takes them, their test split, and the student's accuracy with its facts."""
    from granq.data import dataset_name

    saved = granq.load_student(run, device, network)
    c, old = saved.config, saved.spec
    spec = granq.describe_data(data, network, c.image_size, mean=old.mean, std=old.std).prepared_as(old)
    test = granq.load_split(spec, "test")
    top1 = granq.top1_on(saved.student, test, spec)
    then: Result = {"data": "", "top1": top1, "images": len(test)} | saved.facts
    facts: Result = {"network": network or then["network"], "scheme": str(c.scheme), "top1": top1}
    known = then.get("test_images", then["images"]), dataset_name(then["data"])
    if known != (len(test), dataset_name(data)):
        said = f"{run} was measured on {known[0]} images of {known[1] or 'unknown data'}"
        warnings.warn(f"{said}, now on {len(test)} of {dataset_name(data)}", stacklevel=2)
    else:
        facts["teacher_top1"] = then.get("teacher_top1")
        if abs(then["top1"] - top1) > 0.5:
            said = f"{run} had {then['top1']:.2f} % of these images and {top1:.2f} now; has its network's code changed?"
            warnings.warn(said, stacklevel=2)
    facts |= {"run": str(run), "data": data, "bits": c.bits, "image_bits": c.image_bits, "layer_bits": c.layer_bits}
    facts |= {"recipe": c.recipe, "seed": c.seed}
    return saved, spec, test, facts | {"epoch": saved.epoch, "images": len(test)}


def audit(
    *, network: Network, scheme: str = "granq", bits: str = "3,3", teacher: Path | None = None,
    data: str | None = None, image_size: int | None = None, fail_under: Percent | None = None, out: Out | None = None,
) -> Result:  # fmt: skip
    """Say, layer by layer, what a scheme really quantizes in a network; it needs no weights and no images.

    Args:
        teacher: checkpoint; without it weights are random
        data: for its classes and its size; by default cifar10, cifar100 or imagenet, as the network's name says
        fail_under: exit code 1 if fewer percent of the weights are quantized
        out: write the table as CSV
    """
    import torch

    if out:
        _check_new(out)
    if ".py:" in network and not data:
        raise UserError(f"--data says how many classes and pixels {network} is for; give it")
    widths, spec = parse_bits(bits), granq.describe_data(data or likely_data(network), network, image_size)
    torch.manual_seed(0)
    model = granq.build_network(network, spec.classes)
    if teacher:
        model, spec = granq.load_teacher(network, spec, teacher)
    torch.manual_seed(0)
    size = image_size or spec.image_size
    granq.models.run_once(model, network, images := torch.randn(2, 3, size, size))
    frame = granq.audit(granq.quantize_model(model, scheme, **widths), images)
    result: Result = {"network": network, "scheme": scheme, "bits": "W{weight_bits}A{act_bits}".format(**widths)}
    result |= {"weights": str(teacher or "random, seed 0"), "image_size": size} | granq.summarize_audit(frame)
    if out:
        granq.files.write_csv(out, frame)
    else:
        shown = "layer weight_shape levels weight_sqnr_db input_quantized act_sqnr_db bits_per_weight status"
        print(frame[shown.split()].round(1).to_string(index=False))
        result["rows"] = _records(frame)
    if fail_under is not None and result["weights_low_bit"] < fail_under - 1e-6:  # of a sum of shares
        result["failed"] = f"{result['summary']}, fewer than the {fail_under} % of --fail-under"
    return result


def factorial(
    *, data: Data, network: Network, out: Out, teacher: TeacherFile = None, run: Path | None = None,
    bits: str = "2,3,4,5,8", images: Annotated[int, Field(ge=2)] | None = None, seeds: Count = 1,
    resume: bool = False, image_size: int | None = None, mean: Mean = "", std: Std = "", device: Device = "auto",
) -> Result:  # fmt: skip
    """Measure the accuracy of every weight granularity with every activation granularity.

    Args:
        out: CSV, a row for every finished cell
        run: granq quantize run whose generator calibrates; without it a short one is made
        bits: widths, of weights and activations alike
        images: test images, drawn with seed 0; by default all
        resume: measure the cells that --out lacks
    """
    from granq.measure import factorial as cells

    source: Result = dict(data=data, network=network, teacher=teacher, image_size=image_size, device=device)
    widths, shared, facts = _grown_table(out, resume, bits, run, source | channels(mean, std), images)
    generator, count = shared.zero_shot[0], facts["teacher_images"]
    facts["generator"] = run.name if run else "of a short run"
    frame = granq.measure_granularity_factorial(
        shared.teacher, list(shared.sample(0, count)), cells.factorial_cells(widths, seeds),
        lambda seed: granq.generated_batches(generator, seed), facts=facts, out=out,
    )  # fmt: skip
    return {"out": str(out), "images": count, **facts, "cells": len(frame), "rows": _records(frame)}


def sensitivity(
    *, data: Data, network: Network, out: Out, teacher: TeacherFile = None, run: Path | None = None,
    scheme: str = "strict", bits: str = "3", images: Count = 256, kinds: Words = ("alone",),
    parts: Words = ("weights", "activations", "both"), resume: bool = False, image_size: int | None = None,
    mean: Mean = "", std: Std = "", device: Device = "auto",
) -> Result:  # fmt: skip
    """Measure what the quantization of every layer costs.

    Args:
        out: CSV, a row for every layer, kind, part and width
        run: granq quantize run whose generator draws the images; without it they are test images, with labels
        bits: widths, of weights and activations alike
        kinds: alone (one layer quantized), all_but (all the others), patched (all, with a clean input for one layer)
        images: how many
        resume: measure what --out lacks
    """
    source: Result = dict(data=data, network=network, teacher=teacher, image_size=image_size, device=device)
    widths, shared, facts = _grown_table(out, resume, bits, run, source | channels(mean, std), images)
    facts["source"] = f"generated, {run.name}" if run else "test"
    drawn = granq.generated_batches(shared.zero_shot[0], 0, images, 32) if run else shared.sample(0, images, 32)
    how: Result = dict(kinds=kinds, parts=parts, facts=facts, out=out)
    frame = granq.measure_sensitivity(shared.teacher, list(drawn), scheme, widths, **how)
    columns = ["layer", "kind", "part", "bits", "kl", "agreement", *frame.columns.intersection(["lost"])]
    print(frame.sort_values("kl", ascending=False)[columns].head(10).to_string(index=False))
    return {"out": str(out), **facts, "rows": _records(frame)}


def _grown_table(
    out: Path, resume: bool, bits: str, run: Path | None, source: Result, images: int | None
) -> tuple[list[int], granq.Workbench, Result]:
    """Return widths, workbench and provenance of a measurement that writes row after row into ``out``.

    The teacher's accuracy is that of the first ``images`` in the order of seed 0, which are measured, too.
    """
    if out.exists() and not resume:
        raise UserError(f"{out} already exists; choose another --out, or pass --resume to add what it lacks")
    widths = [check_bits(int(b) if b.isdecimal() else 0) for b in dict.fromkeys(bits.split(","))]
    shared = granq.Workbench("full", runs=[run] if run else [], **source)
    right = granq.models.right(shared.teacher, shared.sample(0, images or len(shared.test)))
    shared.top1 = 100 * int(right.sum()) / len(right)
    facts = {name: fact for name, fact in shared.facts().items() if name not in ("budget", "seed")}
    return widths, shared, facts | {"teacher_images": len(right)}


def export(
    run: Positional[Path], *, data: Data, out: Out, network: OwnNetwork = "",
    format: Literal["integers", "packed"] = "integers",
) -> Result:  # fmt: skip
    """Write the student of a run: a foldable one as integers and ONNX, and any as one small file.

    Args:
        out: folder for integers, which are checked; FILE.safetensors for packed, which granq evaluate opens
        format: integers (safetensors and ONNX), or packed (the codes of weights at their width)
    """
    from granq.data import dataset_name

    if format == "packed":
        _check_new(out, ".safetensors")
    else:
        granq.runs.RunFolder(out).check_free()
        granq.integer_model(granq.load_student(run, "cpu", network).student)  # refuses now, not after minutes
    saved, spec, test, facts = _run_on(run, data, network, "cpu")
    if format == "packed":
        facts |= granq.summarize_audit(granq.audit(saved.student, next(granq.batches(test, spec, 1))[0]))
        facts |= granq.devices.versions() | {"commit": granq.devices.commit()}
        facts |= {"run": run.name, "data": dataset_name(data), "teacher": Path(saved.facts.get("teacher", "")).name}
        granq.save_packed(out, saved._replace(facts=facts))
        return facts | {"out": str(out), "bytes": out.stat().st_size}
    twin, (images, _) = granq.integer_model(saved.student), next(granq.batches(test, spec))
    agreement = granq.measure_integer_agreement(saved.student, images)
    if (wrong := agreement.layer[agreement.beyond_bound > 0]).any():
        raise UserError(f"the integer twin computes something else than the student: {', '.join(wrong)}")
    out.mkdir(parents=True, exist_ok=True)
    granq.export_onnx(twin, images[:2], out / "network.onnx", spec.facts())
    granq.files.write_csv(out / "agreement.csv", agreement)
    facts |= {"top1_integer": granq.top1_on(twin, test, spec), "torch": granq.devices.versions()["torch"]}
    header = saved.config.model_dump() | facts | {"spec": spec.facts()}
    granq.files.write_tensors(out / "integers.safetensors", twin.state_dict(), header)
    return facts | {"out": str(out)}


def figures(
    names: Positional[Words] = (), *, from_csv: bool = False, budget: Literal["quick", "full"] = "quick",
    data: str | None = None, network: Network = "resnet20_cifar10", teacher: Path | None = None,
    run: UseAppendAction[tuple[Path, ...]] = (), out: Out | None = None, seed: Seed = 0,
    image_size: int | None = None, mean: Mean = "", std: Std = "", device: Device = "auto",
) -> Result:  # fmt: skip
    """Measure figures, write their CSV, and draw them from it; all of them without names.

    Args:
        from_csv: draw again from the CSV files in --out, compute nothing
        budget: quick (digits, minutes) or full (cifar10)
        data: images instead of the budget's, such as folder:PATH
        teacher: checkpoint; without it the digits have theirs
        run: finished granq quantize runs to show; accuracy_bits shows them with --budget full
        out: by default figures, and figures/quick for the quick budget
    """
    folder = out or Path("figures/quick" if budget == "quick" and not from_csv else "figures")
    if from_csv:
        return {"out": str(folder), "figures": ", ".join(granq.redraw_figures(names, folder))}
    shared = granq.Workbench(
        budget, data=data, network=network, teacher=teacher, runs=run, out=folder, device=device, seed=seed,
        image_size=image_size, **channels(mean, std),
    )  # fmt: skip
    return {"out": str(folder), "figures": ", ".join(granq.make_figures(names, shared))}


def bench(
    what: Positional[Literal["quantizer", "scaling", "all"]] = "all", *, repetitions: Count = 30,
    out: Out | None = None, device: Device = "auto",
) -> Result:  # fmt: skip
    """Time the quantizer and the scaled convolution against plain baselines; --out is the folder for their CSV."""
    device, result = granq.devices.resolve_device(device), {}
    names = ("quantizer", "scaling") if what == "all" else (what,)
    for file in [out / f"{name}_latency.csv" for name in names] if out else []:
        _check_new(file)
    for name in names:
        frame = getattr(granq, f"measure_latency_{name}")(repetitions=repetitions, device=device)
        if out:
            granq.files.write_csv(out / f"{name}_latency.csv", frame)
        print(frame.round(3).to_string(index=False))
        result[name] = _records(frame)
    return result


def sweep(
    *, out: Out, network: Words = (), teacher: tuple[Path, ...] = (), schemes: Words = (), bits: Words = (),
    recipes: Words = ("adadfq",), seeds: tuple[int, ...] = (0,), jobs: Count = 1, cluster: str = "",
    status: bool = False, options: Suppress[Words] = (),
) -> Result:  # fmt: skip
    """Plan many runs of granq quantize, whose other options go here too, and execute what is not done yet.

    Args:
        out: folder of the sweep; alone, it continues what is planned, unless a network is a FILE.py:FUNCTION
        network: one or more; --teacher then lists one file for each
        bits: such as 2,2 3,3
        seeds: {seed} in another option becomes the seed of its run, as in --generator runs/warm_{seed}
        jobs: runs at once on this machine
        cluster: execute them on the workers of this dask.distributed scheduler, an address such as tcp://host:8786
        status: print the table and start nothing
    """
    from granq.app import sweep as plans

    out = out.resolve()  # as the plan keeps it
    if network or schemes or bits or options or teacher or recipes != ("adadfq",) or seeds != (0,):
        plans.write_plan(out, plans.combine(out, network, teacher, schemes, bits, recipes, seeds, options))
    table = plans.status(out) if status else plans.run_sweep(out, jobs, cluster, network)
    print(table.to_string(index=False, na_rep=""))
    counts: Any = table.state.value_counts().to_dict()
    result: Result = {"out": str(out), "runs": len(table)} | counts | {"rows": _records(table)}
    if (left := len(table) - counts.get("done", 0)) and not status:
        result["failed"] = f"{left} of {len(table)} runs did not finish; see {out}/*.error"
    return result


def _check_new(path: Path, suffix: str = "") -> None:
    if not path.name.endswith(suffix):
        raise UserError(f"--out must end in {suffix}, got {path}")
    if path.exists():
        raise UserError(f"{path} already exists; choose another --out")


def _records(frame: Any) -> list[Result]:
    return json.loads(frame.to_json(orient="records"))


COMMANDS = {
    f.__name__: f
    for f in (demo, teacher, evaluate, audit, report, factorial, sensitivity, export, sweep, figures, bench)
}
