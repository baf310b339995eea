"""The command line, ``granq COMMAND``. Bad input: one sentence, exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

EXAMPLES = {
    "demo": "granq demo --out runs/demo",
    "teacher": "granq teacher --data digits --network resnet20_cifar10 --out teacher.safetensors",
    "quantize": "granq quantize --data digits --network resnet20_cifar10 --teacher teacher.safetensors "
    "--scheme release --bits 3,3 --out runs/first",
    "audit": "granq audit --network resnet50 --scheme release --bits 3,3",
    "bench": "granq bench quantizer --out runs/bench",
    "evaluate": "granq evaluate runs/first --data digits",
    "rerun": "granq rerun figures/results_cifar10.csv 3 --data folder:PATH --out runs/again",
    "factorial": "granq factorial --data digits --network resnet20_cifar10 --teacher teacher.safetensors --bits 2,3 "
    "--out runs/factorial.csv",
    "figures": "granq figures channel_scales layer_error --preset quick --out figures/quick",
    "sweep": "granq sweep --data digits --network resnet20_cifar10 --teacher teacher.safetensors --schemes layerwise "
    "release --bits 2,2 3,3 --seeds 0 1 2 --jobs 2 --out runs/sweep",
    "export": "granq export runs/foldable --data digits --out runs/integers",
}
#: ``bench.measure_latency_<name>``, in the order of ``granq bench all``
BENCHMARKS = ("quantizer", "scaling", "step", "evaluation", "analysis", "cost", "import")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="granq", description="Zero-shot quantization, measured in the open.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if name != "export":  # integer convolutions run on the CPU
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        return sub

    sub = command("demo", "Digits, W2A2: teacher, three schemes, three seeds, a table and pictures; offline.")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--epochs", type=int, default=6, help="of 20 iterations, 3 of them warm-up")

    sub = command("teacher", "Train a full-precision teacher, or fetch a pretrained one.")
    sub.add_argument("--data", required=True)
    sub.add_argument("--network", required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--pretrained", action="store_true", help="download the weights instead of training")
    sub.add_argument("--epochs", type=int, default=30)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    sub.add_argument("--init", type=Path, help="continue from the weights of this teacher file")
    sub.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast (faster on AVX512 and GPUs)")
    sub.add_argument("--resume", action="store_true", help="continue from OUT.partial, written after every epoch")
    sub.add_argument("--image-size", type=int)

    sub = command("quantize", "Quantize a teacher without its training data.")
    sub.add_argument("--data", required=True, help="its test split measures accuracy; no training image is read")
    sub.add_argument("--network", required=True)
    sub.add_argument("--teacher", type=Path, help="checkpoint; without it pretrained weights are downloaded")
    sub.add_argument("--scheme", required=True)
    sub.add_argument("--bits", required=True, help="weights,activations such as 3,3")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--recipe", default="adadfq", help="adadfq, gdfq, or layers (follow the teacher in each)")
    sub.add_argument("--seed", type=int, default=0)
    _add_settings(sub)
    sub.add_argument("--resume", action="store_true", help="continue the run in --out")
    sub.add_argument("--deterministic", action="store_true", help="same seed, same bits on CUDA too, at some speed")

    sub = command("rerun", "Repeat a row of a results table from its own fields, and say how far the new accuracy is.")
    sub.add_argument("table", type=Path, help="CSV of granq sweep, such as figures/results_cifar10.csv")
    sub.add_argument("row", type=int, help="counted from 1 below the header")
    sub.add_argument("--data", help="default: what the row says")
    sub.add_argument("--teacher", type=Path, help="default: what the row says")
    sub.add_argument("--generator", type=Path, help="run whose generator to start from; default: what the row says")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--resume", action="store_true", help="continue the run in --out")

    sub = command("sweep", "Plan many quantize runs in a folder, execute them, or continue where they stopped.")
    sub.add_argument("--out", type=Path, required=True, help="folder of the sweep; alone, it continues what is planned")
    sub.add_argument("--data")
    sub.add_argument("--network", nargs="+", help="one or more; --teacher then lists one file for each")
    sub.add_argument("--teacher", nargs="+", type=Path)
    sub.add_argument("--schemes", nargs="+")
    sub.add_argument("--bits", nargs="+", help="such as 3,3 4,4")
    sub.add_argument("--recipes", nargs="+", default=["adadfq"])
    sub.add_argument("--seeds", nargs="+", type=int, default=[0])
    _add_settings(sub)
    sub.add_argument("--jobs", type=int, default=1, help="runs at once")
    sub.add_argument("--engine", default="joblib", help="joblib, or submitit for Slurm")
    sub.add_argument("--status", action="store_true", help="print the table and start nothing")

    sub = command("figures", "Measure figures, write their CSV, and draw them from it; all of them without names.")
    sub.add_argument("names", nargs="*", metavar="NAME")
    sub.add_argument("--from-csv", action="store_true", help="draw again from the CSV files in --out, compute nothing")
    sub.add_argument("--preset", default="quick", help="quick (digits, minutes) or cifar10")
    sub.add_argument("--data", help="replaces the preset's images, such as folder:PATH")
    sub.add_argument("--network", default="resnet20_cifar10")
    sub.add_argument("--teacher", type=Path, help="checkpoint; quick trains a teacher without it")
    sub.add_argument(
        "--run", type=Path, action="append", default=[], help="finished granq quantize run to show; repeat"
    )
    sub.add_argument("--out", type=Path, help="default figures, for the quick preset figures/quick")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("evaluate", "Measure the accuracy of a finished run.")
    sub.add_argument("run", type=Path)
    sub.add_argument("--data", required=True)

    sub = command("bench", "Time the parts of the package against plain baselines and against a model of their cost.")
    sub.add_argument("what", nargs="?", choices=(*BENCHMARKS, "all"), default="all")
    sub.add_argument("--repetitions", type=int, default=30, help="analysis, minutes each: a tenth as many")
    sub.add_argument("--out", type=Path, help="folder for the CSV")

    sub = command("audit", "Say, layer by layer, what a scheme really quantizes in a network.")
    sub.add_argument(
        "--network", required=True, help="a name of pytorchcv or torchvision, or timm:NAME; no weights needed"
    )
    sub.add_argument("--scheme", default="release")
    sub.add_argument("--bits", default="3,3", help="weights,activations")
    sub.add_argument("--classes", type=int, help="default 1000, or what the network's name says (cifar10: 10)")
    sub.add_argument("--image-size", type=int, help="default 224, for CIFAR networks 32")
    sub.add_argument("--teacher", type=Path, help="checkpoint; without it weights are random")
    sub.add_argument("--fail-under", type=float, help="exit code 1 if fewer percent of the weights are quantized")
    sub.add_argument("--out", type=Path, help="write the table as CSV")

    sub = command("factorial", "Accuracy of every weight granularity with every activation granularity.")
    sub.add_argument("--data", required=True, help="its test split measures accuracy; no training image is read")
    sub.add_argument("--network", required=True)
    sub.add_argument("--teacher", type=Path, help="checkpoint; without it pretrained weights are downloaded")
    sub.add_argument("--bits", default="2,3,4,5,8", help="bit widths, of weights and activations alike")
    sub.add_argument("--images", type=int, help="test images, drawn with seed 0; default all")
    sub.add_argument("--run", type=Path, help="granq quantize run whose generator calibrates; else one is warmed up")
    sub.add_argument("--seeds", type=int, default=1)
    sub.add_argument("--train-epochs", type=int, default=0, help="also after so many epochs behind the warm-up of 4")
    sub.add_argument("--iterations", type=int, default=100, help="per epoch of the generator and of a training")
    sub.add_argument("--out", type=Path, required=True, help="CSV; every finished cell is a row")
    sub.add_argument("--resume", action="store_true", help="measure the cells that --out lacks")

    sub = command("export", "Write a run of scheme foldable as integers (safetensors) and ONNX, and check both.")
    sub.add_argument("run", type=Path)
    sub.add_argument("--data", required=True, help="its test split compares the integers with the student")
    sub.add_argument("--out", type=Path, required=True)
    return parser


#: options of a run that ``granq quantize`` and ``granq sweep`` share, besides --preset: type and help
SETTINGS: dict[str, tuple[type, str | None]] = {
    "epochs": (int, None),
    "iterations": (int, None),
    "batch_size": (int, None),
    "warmup_epochs": (int, None),
    "image_size": (int, None),
    "refined_images": (int, "recipe layers: train on so many refined images, 0 for none"),
    "image_bits": (int, "bits of the image, such as 6: two passes of a 3-bit first layer; a static range is then that "
                   "of all pixels unless --pixel-range says otherwise; default as other activations"),
    "student_lr": (float, "peak learning rate of the student"),
    "range_quantile": (float, "share of the values inside static ranges, such as 0.99; default 1, the extremes"),
    "pixel_range": (float, "static range of the image: a share of that of all pixels; default 0, that of generated "
                    "images"),
    "generator": (Path, "start from the generator of this run, without a warm-up; in a sweep {seed} stands for the "
                  "seed"),
    "reestimate_batchnorm": (bool, "undo the shift that quantization causes"),
    "random_shapes": (bool, "recipe layers: every other batch of refined images starts from random shapes"),
    "learned_steps": (bool, "train quantization steps too (LSQ)"),
    "bf16": (bool, "train under bfloat16 autocast (faster on AVX512 and GPUs); accuracies stay those of float32"),
}  # fmt: skip


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_settings(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--preset", choices=("quick", "paper"), default="quick")
    for name, (kind, text) in SETTINGS.items():
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        sub.add_argument(_option(name), help=text, **how)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: failed on the way; 2: bad input; 130: interrupted."""
    # Before torch starts its threads: waiting threads of GNU OpenMP keep their core busy for so long that beside other
    # work they hold up the one they wait for. A step then took 30 times as long; this way 3 times (docs/speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    args = build_parser().parse_args(argv)
    try:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():  # libraries tell there what they download
            result = globals()[f"_{args.command}"](args)
    except (ValueError, TypeError, ImportError) as error:
        print(f"granq: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a name contains
        return 2
    except (OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        print(f"granq: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("granq: interrupted; the last checkpoint is kept, --resume continues", file=sys.stderr)
        return 130
    if result:  # of several processes the first one speaks
        lines = (f"{k}: {v}" for k, v in result.items() if k != "failed")
        print(json.dumps(result) if args.json else "\n".join(lines))
    if "failed" in result:
        print(f"granq: {result['failed']}", file=sys.stderr)
    return 1 if "failed" in result else 0


def parse_bits(text: str) -> tuple[int, int]:
    """``"3,3"`` -> (3, 3), both from 2 to 8."""
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdecimal() and 2 <= int(p) <= 8 for p in parts):
        raise ValueError(f"--bits takes two numbers from 2 to 8, weights,activations, such as 3,3; got {text!r}")
    return int(parts[0]), int(parts[1])


def _check_new(*paths: Path | None) -> None:
    for path in paths:
        if path and path.exists():
            raise ValueError(f"{path} already exists; choose another --out")


def _at_least(args: argparse.Namespace, **least: int) -> None:
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise ValueError(f"{_option(name)} must be at least {low}, got {value}")


def _teacher(args: argparse.Namespace) -> dict[str, Any]:
    from granq import checks, data, files, models, runs

    _check_new(args.out)
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {args.out}")
    if args.pretrained and args.resume:
        raise ValueError("--resume continues a training, and --pretrained needs none")
    partial = args.out.with_name(args.out.name + ".partial")
    if partial.exists() and not args.resume:
        raise ValueError(f"{partial} holds an unfinished training; pass --resume to continue it, or remove it")
    _at_least(args, epochs=1)
    spec = data.describe_data(args.data, args.network, args.image_size)
    device = checks.resolve_device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.pretrained:
        model, spec = models.load_teacher(args.network, spec, None, device)
        top1 = models.top1_on(model, data.load_split(spec, "test"), spec, device)
    else:
        options = {name: getattr(args, name) for name in ("epochs", "lr", "seed", "bf16", "init")}
        with files.hold(args.out, lock := partial.with_suffix(".lock")):
            try:
                model, top1 = models.train_teacher(args.network, spec, device=device, checkpoint=partial, **options)
            finally:
                lock.unlink(missing_ok=True)  # while it is held: afterwards it could be another's
    files.save_atomically(args.out, lambda path: models.save_teacher(path, model, args.network, spec, top1))
    partial.unlink(missing_ok=True)
    facts = dict(out=str(args.out), data=args.data, network=args.network, top1=top1, seed=args.seed)
    return facts | runs.versions(device)


def _quantize(args: argparse.Namespace) -> dict[str, Any]:
    from granq import checks, distributed

    with distributed.process_group(checks.resolve_device(args.device)) as rank:
        row = _quantize_as(rank, args)
    return row if rank == 0 else {}


def _prepare(args: argparse.Namespace, download: bool = True) -> tuple[Any, ...]:
    """Teacher, settings, data and generator of ``granq quantize``; without ``download`` a teacher may be random.

    Raises:
        ValueError, TypeError: whatever keeps these from being trained with.
    """
    from granq import checks, convert, data, models, qat, runs
    from granq.config import QATConfig

    weight_bits, act_bits = parse_bits(args.bits)
    spec = data.describe_data(args.data, args.network, args.image_size)
    given = {f.name: getattr(args, f.name, None) for f in fields(QATConfig)}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.generator:
        changes.setdefault("warmup_epochs", 0)
    changes |= dict(weight_bits=weight_bits, act_bits=act_bits, image_size=spec.image_size)
    if args.image_bits and convert.get_scheme(args.scheme).tracked:
        changes.setdefault("pixel_range", 1.0)  # with bits to spare nothing needs to be cut off
    if args.preset == "paper":
        if args.recipe == "layers":
            raise ValueError("--preset paper is for recipes adadfq and gdfq; layers takes --epochs, --iterations")
        config = QATConfig.paper(args.data, args.network, weight_bits, **changes)
    else:
        config = (QATConfig.layers if args.recipe == "layers" else QATConfig)(**changes)
    device = checks.resolve_device(args.device)
    generator = runs.load_generator(args.generator, device) if args.generator else None
    if args.teacher or download:
        teacher, spec = models.load_teacher(args.network, spec, args.teacher, device)
    else:
        teacher = models.build_network(args.network, spec.classes)
    if args.image_size not in (None, spec.image_size):
        raise ValueError(f"--image-size {args.image_size}: {args.teacher} was trained at {spec.image_size} pixels")
    config = replace(config, image_size=spec.image_size)
    qat.Trainer(teacher, config, generator, data.pixel_bounds(spec))  # refuses now, not behind the test split
    return teacher, config, spec, generator


def _quantize_as(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    from granq import auditing, checks, data, files, models, qat, runs
    from granq.config import QATConfig

    folder = runs.RunFolder(args.out)
    if rank == 0:
        folder.check_free(args.resume)
    teacher, config, spec, generator = _prepare(args)
    device = checks.resolve_device(args.device)
    if rank == 0 and folder.config.is_file():
        saved = QATConfig.from_dict(folder.read_config()["config"])
        if saved != config:
            raise ValueError(f"{args.out} was started with other settings; resume it with the same options")
    test = data.load_split(spec, "test")  # the training split is never touched

    def evaluate(model: Any) -> float:
        return models.top1_on(model, test, spec, device)

    teacher_top1 = evaluate(teacher) if rank == 0 else 0.0
    facts = dict(data=args.data, network=args.network, teacher=str(args.teacher), teacher_top1=teacher_top1)
    facts["spec"] = vars(spec)
    result = qat.train(
        teacher, config, evaluate=evaluate, out=args.out, resume=args.resume, facts=facts, generator=generator,
        pixels=data.pixel_bounds(spec),
    )  # fmt: skip
    row = result.row(args.data, args.network, teacher_top1, len(test))
    row |= dict(teacher=str(args.teacher), generator=str(args.generator or ""), run_preset=args.preset)
    row["out"] = str(args.out)
    if rank == 0:
        image = next(data.batches(test, spec, batch_size=1))[0].to(device)
        row |= auditing.summarize_audit(auditing.audit(result.student, image))
        del row["summary"]
        files.save_atomically(args.out / "result.json", lambda p: p.write_text(json.dumps(row, indent=2)))
    return row


def _rerun(args: argparse.Namespace) -> dict[str, Any]:
    import pandas as pd

    from granq.config import QATConfig

    if not args.table.is_file():
        raise ValueError(f"{args.table} does not exist; granq sweep writes such a table")
    table = pd.read_csv(args.table, dtype=str, keep_default_na=False)
    if not 1 <= args.row <= len(table):
        raise ValueError(f"{args.table} has rows 1 to {len(table)}, got {args.row}")
    row = {name: text for name, text in table.iloc[args.row - 1].items() if text}
    needed = ("dataset", "network", "teacher", "scheme", "bits", "recipe", "seed", "run_preset", "last_top1")
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"row {args.row} of {args.table} lacks {', '.join(missing)}; granq sweep writes them")
    bits = ",".join(re.findall(r"\d+", row["bits"]))
    options = ["--data", args.data or row.get("data", row["dataset"]), "--network", row["network"]]
    options += ["--scheme", row["scheme"], "--bits", bits, "--preset", row["run_preset"]]
    teacher = str(args.teacher or row["teacher"])
    options += ["--teacher", teacher] if teacher != "None" else []
    generator = args.generator or row.get("generator")
    options += ["--generator", str(generator)] if generator else []
    again = build_parser().parse_args(["quantize", *options, "--out", str(args.out), "--device", args.device])
    again.resume = args.resume
    read: dict[type, Callable[[str], Any]] = {
        str: str, float: float, int: lambda text: int(text.removesuffix(".0")),
        bool: lambda text: text.lower() == "true",  # spreadsheets write TRUE
        tuple: lambda text: tuple(map(int, re.findall(r"\d+", text))),
    }  # fmt: skip
    for field in fields(QATConfig):
        if field.name in row and field.name != "device":
            setattr(again, field.name, read[type(field.default)](row[field.name]))
    result = _quantize(again)
    before = float(row["last_top1"])
    return result and result | {"row_last_top1": before, "difference": result["last_top1"] - before}


def _sweep(args: argparse.Namespace) -> dict[str, Any]:
    from granq import checks, data, sweep

    _at_least(args, jobs=1)
    sweep.check_engine(args.engine)
    if args.engine == "joblib":  # others run elsewhere
        checks.resolve_device(args.device)
    if args.data or args.schemes:
        if not (args.data and args.network and args.schemes and args.bits):
            raise ValueError("a new plan needs --data, --network, --schemes and --bits")
        if args.teacher and len(args.teacher) != len(args.network):
            raise ValueError(f"{len(args.network)} networks need as many teachers, got {len(args.teacher)}")
        bits = [",".join(map(str, parse_bits(text))) for text in args.bits]
        if len(set(args.network)) < len(args.network):
            raise ValueError("--network names one network twice: a sweep has one teacher for each")
        names = ("data", "preset", *SETTINGS, "device")
        given = {n: value for n in names if (value := getattr(args, n)) is not None}
        switches = {n: given.pop(n) for n, (kind, _) in SETTINGS.items() if kind is bool and n in given}
        options = [part for n, value in given.items() for part in (_option(n), str(value))]
        options += [_option(n if on else f"no_{n}") for n, on in switches.items()]
        teachers = dict(zip(args.network, args.teacher or [None] * len(args.network), strict=True))
        plan = sweep.plan_sweep(teachers, args.schemes, bits, args.seeds, args.recipes, options)
        specs = set()
        for arguments in plan.values():  # what quantize would refuse; on the CPU, as runs may be for another machine
            run = build_parser().parse_args(["quantize", *arguments, "--out", str(args.out)])
            run.device, run.bf16 = "cpu", None
            specs.add(_prepare(run, download=False)[2])
        for spec in specs:
            data.load_split(spec, "test")
        sweep.write_plan(args.out, plan)
    status = sweep.sweep_status(args.out) if args.status else sweep.run_sweep(args.out, args.jobs, args.engine)
    print(status.to_string(index=False, na_rep=""), file=sys.stderr)
    counts = {str(k): int(v) for k, v in status.state.value_counts().items()}
    if not args.status and (left := len(status) - counts.get("done", 0)):
        raise RuntimeError(f"{left} of {len(status)} runs did not finish; see {args.out}/*.log")
    return {"out": str(args.out), "runs": len(status), **counts}


def _run_on(args: argparse.Namespace, device: str) -> Any:
    """The run of ``args.run``, with ``args.data`` in place of the data that measured it."""
    from granq import data, runs

    saved = runs.load_run(args.run, device)
    spec = data.describe_data(args.data, saved.facts["network"])
    if spec.classes != saved.spec.classes:
        raise ValueError(f"{args.data} has {spec.classes} classes but the run's network has {saved.spec.classes}")
    return saved._replace(spec=data.replace(saved.spec, name=spec.name, root=spec.root))


def _figures(args: argparse.Namespace) -> dict[str, Any]:
    from granq import registry

    out = args.out or Path("figures/quick" if args.preset == "quick" and not args.from_csv else "figures")
    if args.from_csv:
        names = registry.redraw_figures(args.names, out)
    else:
        options = {name: getattr(args, name) for name in ("data", "network", "teacher", "device", "seed")}
        names = registry.make_figures(args.names, registry.Setting(args.preset, runs=args.run, out=out, **options))
    return {"out": str(out), "figures": ", ".join(names)}


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from granq import checks, data, models, runs

    device = checks.resolve_device(args.device)
    student, config, spec, facts, epoch = _run_on(args, device)
    test = data.load_split(spec, "test")
    top1 = models.top1_on(student, test, spec, device)
    return {
        "run": str(args.run), "data": args.data, "network": facts["network"], "scheme": config.scheme,
        "bits": f"W{config.weight_bits}A{config.act_bits}", "epoch": epoch, "top1": top1,
        "images": len(test), "teacher_top1": facts["teacher_top1"],
    } | runs.versions(device)  # fmt: skip


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from granq import bench, checks, files

    _at_least(args, repetitions=1)
    device = checks.resolve_device(args.device)
    names = BENCHMARKS if args.what == "all" else (args.what,)
    tables = {name: "cost_model.csv" if name == "cost" else f"{name}_latency.csv" for name in names}
    paths = {name: args.out / table for name, table in tables.items()} if args.out else {}
    _check_new(*paths.values())
    if args.out and args.out.is_file():
        raise ValueError(f"{args.out} is a file; --out takes a folder")
    result: dict[str, Any] = {}
    for name in names:
        repetitions = -(-args.repetitions // 10) if name == "analysis" else args.repetitions
        frame = getattr(bench, f"measure_latency_{name}")(repetitions=repetitions, device=device)
        if paths:
            args.out.mkdir(parents=True, exist_ok=True)
            files.write_csv(paths[name], frame)
        result[name] = json.loads(frame.to_json(orient="records"))
        if not args.json:
            constant = [c for c in frame if frame[c].nunique() == 1 and len(frame) > 1]
            print(f"\n{name}: " + ", ".join(f"{c} {frame[c].iloc[0]}" for c in constant))
            print(frame.drop(columns=constant).round(3).to_string(index=False))
    return result if args.json else {"benchmarks": ", ".join(names), "repetitions": args.repetitions}


def _audit(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from granq import auditing, checks, convert, data, files, models

    bits, device = parse_bits(args.bits), checks.resolve_device(args.device)
    _at_least(args, image_size=1, classes=1)
    _check_new(args.out)
    cifar = "cifar" in args.network
    size = args.image_size or (32 if cifar else 224)
    classes = args.classes or (100 if "cifar100" in args.network else 10 if cifar else 1000)
    if args.teacher:
        spec = data.DataSpec("", classes, size, *data.IMAGENET_STATS)
        model, _ = models.load_teacher(args.network, spec, args.teacher)
    else:
        torch.manual_seed(0)
        model = models.build_network(args.network, classes)
    torch.manual_seed(0)
    student = convert.quantize_model(model, args.scheme, *bits).to(device)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    frame = auditing.audit(student, torch.randn(2, 3, size, size).to(device))
    if args.out:
        files.write_csv(args.out, frame)
    elif not args.json:
        shown = ["layer", "weight_shape", "levels", "weight_sqnr_db", "input_quantized", "bits_per_weight", "status"]
        print(frame[shown].round(1).to_string(index=False))
    weights = str(args.teacher) if args.teacher else "random, seed 0"
    facts = {"network": args.network, "scheme": args.scheme, "bits": f"W{bits[0]}A{bits[1]}", "image_size": size}
    result = facts | {"weights": weights} | auditing.summarize_audit(frame) | {"torch": torch.__version__}
    if args.json and not args.out:
        result["layers"] = json.loads(frame.to_json(orient="records"))
    if args.fail_under is not None and result["weights_low_bit"] < args.fail_under:
        result["failed"] = f"{result['summary']}, fewer than the {args.fail_under} % of --fail-under"
    return result


def _factorial(args: argparse.Namespace) -> dict[str, Any]:
    from functools import cache

    from granq import factorial, registry
    from granq.config import QATConfig

    bits = [int(b) if b.strip().isdecimal() else 0 for b in args.bits.split(",")]
    if not all(2 <= b <= 8 for b in bits) or len(set(bits)) < len(bits):
        raise ValueError(f"--bits takes different numbers from 2 to 8, such as 2,3,4; got {args.bits!r}")
    _at_least(args, seeds=1, train_epochs=0, iterations=1, images=2)
    if args.out.exists() and not args.resume:
        raise ValueError(f"{args.out} already exists; choose another --out or pass --resume to add what it lacks")
    options = {name: getattr(args, name) for name in ("data", "network", "teacher", "device")}
    setting = registry.Setting("cifar10", runs=[args.run] if args.run else (), **options)
    count = args.images or len(setting.test)
    if count > len(setting.test):
        raise ValueError(f"--images {count} is more than the {len(setting.test)} test images of {args.data}")
    config = QATConfig(iterations=args.iterations, image_size=setting.spec.image_size, device=setting.device)

    @cache  # warmed up when the first static cell needs it
    def generator() -> Any:
        return setting.zero_shot[0] if args.run else factorial.warm_generator(setting.teacher, config)

    facts = {k: v for k, v in setting.facts().items() if k not in ("preset", "seed")}
    source = args.run.name if args.run else f"warm-up of {config.warmup_epochs} x {config.iterations} iterations"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    frame = factorial.measure_granularity_factorial(
        setting.teacher,
        list(setting.sample(0, count)),
        factorial.factorial_cells(bits, args.train_epochs, args.seeds),
        lambda seed: factorial.generated_batches(generator(), seed),
        config=config,
        facts=facts | {"generator": source},
        out=args.out,
    )
    result = {"out": str(args.out), "cells": len(frame), "images": count} | facts
    return result | ({"rows": json.loads(frame.to_json(orient="records"))} if args.json else {})


def _export(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from granq import data, files, integer, models, runs

    runs.RunFolder(args.out).check_free(resumable=False)
    student, _, spec, facts, epoch = _run_on(args, "cpu")
    twin = integer.integer_model(student)
    test = data.load_split(spec, "test")
    images, _ = next(data.batches(test, spec))
    args.out.mkdir(parents=True, exist_ok=True)
    integer.export_onnx(twin, images[:2], args.out / "network.onnx")
    agreement = integer.measure_integer_agreement(student, images)
    files.write_csv(args.out / "agreement.csv", agreement)
    top1 = models.top1_on(twin, test, spec)
    result = {
        "run": str(args.run), "data": args.data, "network": facts["network"], "epoch": epoch,
        "teacher_top1": facts["teacher_top1"], "top1_fake_quantized": models.top1_on(student, test, spec),
        "top1_integer": top1, "images": len(test), "outputs_beyond_bound": int(agreement.beyond_bound.sum()),
        "torch": torch.__version__,
    }  # fmt: skip
    integer.save_integers(twin, args.out / "integers.safetensors", facts["config"] | result)
    return result | {"out": str(args.out)}


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    import pandas as pd
    import torch

    from granq import analysis, checks, data, figures, files, models, qat, runs
    from granq.config import QATConfig

    _at_least(args, seeds=1, epochs=1)
    runs.RunFolder(args.out).check_free(resumable=False)
    args.out.mkdir(parents=True, exist_ok=True)
    device, network = checks.resolve_device(args.device), "resnet20_cifar10"
    spec = data.describe_data("digits", network)
    teacher, teacher_top1 = models.train_teacher(network, spec, epochs=12, batch_size=64, device=device)
    models.save_teacher(args.out / "teacher.safetensors", teacher, network, spec, teacher_top1)
    test = data.load_split(spec, "test")
    rows = []
    for scheme in ("layerwise", "release", "strict"):
        for seed in range(args.seeds):
            config = QATConfig(
                scheme=scheme, weight_bits=2, act_bits=2, epochs=args.epochs, iterations=20,
                warmup_epochs=args.epochs // 2, batch_size=32, student_lr=1e-3, seed=seed, device=device,
            )  # fmt: skip
            result = qat.train(teacher, config, evaluate=lambda m: models.top1_on(m, test, spec, device))
            rows.append(result.row("digits", network, teacher_top1, len(test)))
            files.write_csv(args.out / "results.csv", pd.DataFrame(rows))
    results, columns = pd.DataFrame(rows), ["ptq_top1", "last_top1", "best_top1"]

    def spread(values: pd.Series) -> str:
        return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")

    cells = results.groupby("scheme", sort=False)[columns].agg(spread)
    table = (
        f"digits, {network}, W2A2, teacher {teacher_top1:.2f} %, n = {args.seeds} seeds, {len(test)} test images, "
        f"{rows[0]['device']}, torch {torch.__version__}. Mean ± std in percent; `best` selects on the test split.\n\n"
        "| scheme | without training | last epoch | best epoch |\n|---|---|---|---|\n"
    ) + "".join(f"| {' | '.join(line)} |\n" for line in cells.itertuples())
    (args.out / "results.md").write_text(table)
    figures.save_figure("accuracy", results, figures.plot_accuracy_bits, args.out, (4.6, 2.4))
    layer = "features.stage2.unit1.body.conv2.conv"
    distortion = analysis.measure_activation_distortion(teacher, data.batches(test, spec), [layer], bits=[2])
    figures.save_figure("activation_distortion", distortion, figures.plot_activation_distortion, args.out)
    frame = analysis.measure_generated_images(result.generator, teacher, spec)
    figures.save_figure("synthetic_images", frame, figures.plot_synthetic_images, args.out, (6.8, 1.2))
    print(table, file=sys.stderr)
    print(f"Next: open {args.out}/accuracy.png, then {args.out}/activation_distortion.png.", file=sys.stderr)
    return {"out": str(args.out), "teacher_top1": teacher_top1} | {
        str(k): round(float(v), 2) for k, v in results.groupby("scheme").last_top1.mean().items()
    }


if __name__ == "__main__":
    sys.exit(main())
