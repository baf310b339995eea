"""Every command on tiny data: what it answers, what it refuses, and how it ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.error import URLError

import onnx
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import granq
from granq import (
    QATConfig,
    UserError,
    activation_places,
    describe_data,
    load_run,
    load_split,
    load_teacher,
    models,
    pixel_bounds,
    qat,
    top1_on,
)
from granq.app import commands, jobs, sweep
from granq.app.cli import main, sentence
from granq.files import read_checkpoint, read_tensors
from granq.measure import factorial, workbench
from granq.measure.workbench import BUDGETS
from granq.runs import RunFolder

SHORT = "--epochs 2 --warmup-epochs 1 --iterations 1 --batch-size 4 --device cpu"
OWN_CHANNELS = "--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"  # of an own network nothing else says them


def quantize_args(folder, teacher, out, scheme="layerwise"):
    given = f"quantize --data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme {scheme} --bits 3,3"
    return f"{given} --out {out} {SHORT} --json".split()


def answer(capsys):
    """Standard output as JSON, which it is from the first character to the last."""
    return json.loads(capsys.readouterr().out)


ON_DIGITS = "--data digits --network resnet20_cifar10"


@pytest.mark.parametrize(
    "command",
    [
        f"quantize {ON_DIGITS} --scheme strict", f"teacher {ON_DIGITS}", "demo", "bench", f"sensitivity {ON_DIGITS}",
        "audit --network resnet20_cifar10", "report --network resnet20_cifar10", "figures", f"factorial {ON_DIGITS}",
        "sweep --network a", "export a --data digits",
    ],
)  # fmt: skip
def test_an_out_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*command.split(), "--out", str(tmp_path / "file/x.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"x.safetensors cannot be written: {tmp_path}/file is no folder to write into")


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == granq.__version__


def test_quantize_then_evaluate_without_training_images(folder, teacher, tmp_path, capsys):
    assert main(quantize_args(folder, teacher, tmp_path / "run")) == 0
    row = answer(capsys)
    assert {"teacher_top1", "ptq_top1", "last_top1", "best_top1", "torch", "device", "weights_low_bit"} <= row.keys()
    assert json.loads((tmp_path / "run/result.json").read_text()) == row and row["preset"] == "quick"
    assert main(["evaluate", str(tmp_path / "run"), "--data", folder, "--json", "--device", "cpu"]) == 0
    assert answer(capsys)["top1"] == row["last_top1"]
    assert main(quantize_args(folder, teacher, tmp_path / "run")) == 2  # nothing is overwritten
    assert "is no empty folder" in capsys.readouterr().err


def test_recipe_match_from_the_command_to_integers(folder, tiny, tmp_path, capsys):
    (tmp_path / "net.py").write_text("from conftest import TinyNet\n\n\ndef make():\n    return TinyNet(2)\n")
    torch.save(type(tiny)(2).state_dict(), tmp_path / "t.pth")
    args = [*quantize_args(folder, tmp_path / "t.pth", tmp_path / "run", "foldable"), "--recipe", "match"]
    args += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--network", own := f"{tmp_path / 'net.py'}:make"]
    args += ["--refined-images", "4"]
    assert main([*args, "--refined-images", "3"]) == 2 and "a multiple of batch_size, 4" in capsys.readouterr().err
    assert main([*args, "--preset", "paper"]) == 2 and "match takes --epochs" in capsys.readouterr().err
    assert main(args) == 0
    row = answer(capsys)
    shared = ["--data", folder, "--network", own, "--json"]
    assert main(["evaluate", str(tmp_path / "run"), *shared, "--device", "cpu"]) == 0
    assert answer(capsys)["top1"] == row["last_top1"]
    assert main(["export", str(tmp_path / "run"), *shared, "--out", str(tmp_path / "integers")]) == 0
    exported = answer(capsys)
    assert exported["top1_integer"] == exported["top1"] == row["last_top1"]
    told = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "integers/network.onnx").metadata_props}
    assert told["mean"] == [0.5] * 3 and told["std"] == [0.25] * 3 and str(tmp_path) not in str(told)
    assert read_tensors(tmp_path / "integers/integers.safetensors")[1]["spec"] == told
    modes = {oct(path.stat().st_mode) for path in (tmp_path / "integers").iterdir()}
    assert len(modes) == 1  # whoever may read one file may read all
    state = read_checkpoint(tmp_path / "run/checkpoint.pt")
    state["rows"][-1]["test_top1"] += 1.0  # as if the network computed something else today
    torch.save(state, tmp_path / "run/checkpoint.pt")
    with pytest.warns(UserWarning, match="has its network's code changed"):
        assert main(["evaluate", str(tmp_path / "run"), *shared, "--device", "cpu"]) == 0
    answer(capsys)
    assert row["image_bits"] == 0 and row["macs_low_bit"] == pytest.approx(100)
    assert main([*args, "--image-bits", "6", "--out", str(tmp_path / "wide")]) == 0
    row = answer(capsys)
    assert row["image_bits"] == 6 and 50 < row["macs_low_bit"] < 100
    student = load_run(tmp_path / "wide", network=own).student
    assert [place.bits for place in activation_places(student).values()][:2] == [6, 3]
    place = next(iter(activation_places(student).values()))
    low, high = pixel_bounds(describe_data(folder, mean=(0.5,) * 3, std=(0.25,) * 3))
    torch.testing.assert_close((2**place.bits - 1) * place.qparams().scale, high - low, rtol=0.05, atol=0)  # learned


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")
def test_quantize_on_a_gpu(folder, teacher, tmp_path, capsys):
    assert main([*quantize_args(folder, teacher, tmp_path / "run"), "--device", "cuda"]) == 0
    assert answer(capsys)["device"].startswith("cuda")


def test_what_the_user_wrote_wins_over_preset_and_recipe():
    given = "--data cifar10 --network resnet20_cifar10 --out run"
    paper = jobs.from_arguments(f"{given} --preset paper --bits 4,3 --epochs 7".split())
    assert (paper.batch_size, paper.milestones, paper.epochs) == (16, (100, 200, 300), 7)
    assert (paper.weight_bits, paper.act_bits, paper.image_size) == (4, 3, 32)
    match = jobs.from_arguments(f"{given} --recipe match --scheme foldable --batch-size 8".split())
    assert (match.refined_images, match.student_lr) == (8 * 32, 5e-4)
    assert jobs.from_arguments(f"{given} --generator runs/warm".split()).warmup_epochs == 0
    assert jobs.from_arguments(f"{given} --generator runs/warm --warmup-epochs 3".split()).warmup_epochs == 3
    plain = jobs.from_arguments(given.split())
    assert QATConfig(**{name: getattr(plain, name) for name in QATConfig.model_fields}) == QATConfig()


def test_teacher_command_on_digits(tmp_path, capsys, monkeypatch):
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "test"), range(40))
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    out = tmp_path / "t.safetensors"
    args = f"teacher --data digits --network resnet20_cifar10 --out {out} --epochs 1 --json --device cpu".split()
    assert main(args) == 0
    shown = answer(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert main(args) == 2
    other = [str(tmp_path / "u.safetensors") if arg == str(out) else arg for arg in args]
    (tmp_path / "u.checkpoint").touch()
    assert main(other) == 2 and "u.checkpoint is not a whole file" in capsys.readouterr().err
    model, spec = load_teacher("resnet20_cifar10", describe_data("digits"), out)
    assert shown["top1"] == top1_on(model, few, spec)


def test_a_diverged_teacher_is_not_saved(tmp_path, monkeypatch):
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "train"), range(256))  # two steps
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    command = "teacher --data digits --network resnet20_cifar10 --lr 1e30 --epochs 1 --device cpu --out"
    with pytest.raises(FloatingPointError, match="learning rate 1e\\+30 is too high"):
        main([*command.split(), str(tmp_path / "t.safetensors")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nope"), "known: digits"), (("--data", "folder:/nope"), "does not exist"),
        (("--network", "nope"), "nope"), (("--scheme", "nope"), "known: granq"),
        (("--bits", "1,3"), "from 2 to 8"), (("--bits", "three"), "from 2"),
        (("--data", "digits"), "holds no weights of"),
        (("--teacher", "/nope.pt"), "/nope.pt"), (("--epochs", "0"), "epochs should be greater than or equal to 1"),
        (("--epochs", "1", "--warmup-epochs", "2"), "warmup_epochs must be at most epochs, 1"),
        (("--image-size", "64"), "was trained at 32 pixels"), (("--student-lr", "nan"), "student_lr should be"),
        (("--image-bits", "6"), "not layerwise"), (("--seed", "-1"), "seed should be"),
        (("--device", "nope"), "no device 'nope' here"), (("--device", "cuda:99"), "there is no device 'cuda:99' here"),
        (("--generator", "/nope"), "holds no run"),
        (("--refined-images", "4"), "for recipe match"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(folder, teacher, tmp_path, capsys, change, message):
    assert main([*quantize_args(folder, teacher, tmp_path / "run"), *change]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("granq: ") and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "run").exists()


def test_corrupt_teacher(folder, tmp_path, capsys):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"garbage")
    assert main(quantize_args(folder, bad, tmp_path / "run")) == 2
    assert "bad.pt" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("demo --seeds 0", "seeds should be greater than or equal to 1, got 0"), ("demo --epochs 0", "epochs should"),
        ("sweep --jobs 0", "jobs should be"), ("bench --repetitions 0", "repetitions should be"),
        ("bench --device foo", "no device 'foo' here"), ("sweep", "holds no sweep"),
        ("sweep --epochs 3", "needs --data"), ("audit --network resnet20_cifar10 --data nope", "known: digits"),
        ("teacher --data digits --network resnet20_cifar10 --device cuda:99", "there is no device 'cuda:99' here"),
        ("teacher --data digits --network resnet20_cifar10 --image-size 30", "image_size should be a multiple of 4"),
        ("teacher --data digits --network resnet20_cifar10 --lr nan", "lr should be"),
        ("audit --network resnet20_cifar10 --image-size -1", "image_size should be"),
        ("audit --network resnet20_cifar10 --scheme nope", "known: granq"),
        ("factorial --data digits --network resnet20_cifar10 --seeds 0", "seeds should be"),
        ("audit --network timm:nope --data digits", "unknown network"),
        ("report --network resnet20_cifar10 --images -1", "images should"),
        ("audit --network resnet20_cifar10 --fail-under nan", "fail_under should be"),
        ("teacher --data digits --network resnet20_cifar10 --seed 99999999999999999999", "seed should be"),
        ("sweep --data digits --network resnet20_cifar10 --schemes granq --bits 3,3 --teacher no.pt", "no.pt does not"),
        ("figures nothing", "known: "), ("evaluate nowhere --data digits", "unknown student or run"),
        ("export nowhere --data digits", "unknown student or run"),
    ],
)  # fmt: skip
def test_numbers_names_and_devices_are_checked_first(command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if "evaluate" in command else ["--out", "new.safetensors"]
    assert main([*command.split(), *out]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("quantize --data digits --network a --out b --preset nope", "paper"), ("quantize --network a", "--data"),
        ("quantize --data digits --network a --out b --epochs many", "epochs"), ("nope", "quantize"),
        ("quantize --data digits --network a --out b --batch-size many", "batch-size"),
        ("quantize --data digits --network a --out b --recipe nope", "adadfq"),
        ("bench nope", "quantizer"), ("figures --budget nope", "full"), ("evaluate", "PATH"),
        ("demo --sseeds 2", "--seeds"),
    ],
)  # fmt: skip
def test_what_no_command_takes_ends_with_code_2(command, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("error", [IndexError, ValueError, RuntimeError])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    """Python prints it, and ends with code 1; ValueError is that of a bug, too, if it is none of ours."""

    def bug():
        raise error

    monkeypatch.setitem(commands.COMMANDS, "bench", bug)
    with pytest.raises(error):
        main(["bench"])


def test_sentences():
    assert sentence(UserError("two\nlines")) == "two lines"
    with pytest.raises(ValueError) as caught:
        QATConfig(image_bits=9)
    assert sentence(caught.value) == "image_bits should be less than or equal to 8, got 9"
    with pytest.raises(ValueError) as caught:
        QATConfig(scheme="nope")
    assert sentence(caught.value).startswith("unknown scheme 'nope'; known: granq, strict")


def test_help_shows_settings_in_groups(capsys):
    with pytest.raises(SystemExit) as end:
        main(["quantize", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for group in ("files options", "run options", "quantization options", "losses options"):
        assert group in shown
    assert "How long a run is" in shown and "--bits" in shown and "--weight-bits" not in shown
    for name, command in commands.COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert command.__doc__.split(".")[0][:60] in shown and ("--out" in shown or name == "evaluate")


def test_threads_spin_as_long_as_the_user_says(monkeypatch):
    for given, wanted in ((None, "3000"), ("7", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        assert main(["bench", "--repetitions", "0"]) == 2
        assert os.environ["GOMP_SPINCOUNT"] == wanted


def test_interrupt_leaves_a_usable_run(folder, own, tmp_path, capfd):
    out = tmp_path / "run"
    again = [*quantize_args(folder, tmp_path / "t.pth", out, "granq"), "--network", own, *OWN_CHANNELS.split()]
    again += ["--image-size", "8", "--epochs", "20", "--resume"]
    command = [sys.executable, "-m", "granq.app.cli", *again[:-1]]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits deafness to it
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listens)
    with subprocess.Popen(command, **pipes) as process:
        while not (out / "history.csv").is_file():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # it stays where it is, and holds the folder
        assert main(again) == 2
        assert f"{out} is in use by another process" in capfd.readouterr().err
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate()
    assert process.returncode == 130
    told = "granq: interrupted; what was saved is kept; repeat it, with --resume if it has that"
    assert said.splitlines()[-1] == told
    assert 1 <= RunFolder(out).load()["epoch"] < 20
    assert main(["evaluate", str(out), "--data", folder, "--network", own, "--device", "cpu"]) == 0
    assert main(again) == 0
    assert len(pd.read_csv(out / "history.csv")) == 20


LACKS_MEAN = '{"config": {"image_size": 8}, "network": "a", "data": "b", "teacher_top1": 1, "spec": {"name": "digits"}}'


@pytest.mark.parametrize(("text", "said"), [("{", "config.json is missing or damaged"), (LACKS_MEAN, "Field required")])
def test_damaged_config_is_one_sentence(tiny, tmp_path, text, said, capsys):
    config = QATConfig(epochs=1, warmup_epochs=1, iterations=1, batch_size=2, image_size=8, device="cpu")
    granq.train(tiny, config, out=tmp_path / "run")
    (tmp_path / "run/config.json").write_text(text)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", "digits"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("granq: ") and said in line


def test_audit_command(tmp_path, capsys):
    assert main("audit --network resnet20_cifar10 --json".split()) == 0
    shown = answer(capsys)
    assert len(shown["rows"]) == shown["layers"] == 22 and shown["scheme"] == "granq" and shown["bits"] == "W3A3"
    limit = ["--fail-under", "99.9", "--out", str(tmp_path / "audit.csv")]
    assert main(["audit", "--network", "resnet20_cifar10", *limit]) == 1
    assert "fewer than the 99.9 % of --fail-under" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "audit.csv")) == 22
    all_of_it = "audit --network resnet20_cifar10 --scheme strict --bits 4,4 --fail-under 100"
    assert main(all_of_it.split()) == 0  # the shares add up to 99.99999999999997


def test_without_a_network_one_line_says_so(monkeypatch, capsys):
    def offline(*_):
        raise URLError("Name or service not known")

    monkeypatch.setattr(granq, "build_network", offline)
    assert main("audit --network resnet20_cifar10".split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("granq: URLError") and "service not known" in line


def test_factorial_command(folder, own, tmp_path, capsys, monkeypatch):
    every = factorial.factorial_cells
    monkeypatch.setattr(factorial, "factorial_cells", lambda *given: every(*given)[:9:2])
    given = f"factorial --data {folder} --network {own} --teacher {tmp_path / 't.pth'} {OWN_CHANNELS} --bits 2"
    short = dict(epochs=1, iterations=1, warmup_epochs=1, batch_size=4)
    monkeypatch.setitem(BUDGETS, "full", BUDGETS["full"]._replace(run=short, snapshots=[1]))
    args = [*given.split(), "--device", "cpu", "--json", "--out", str(tmp_path / "f.csv")]
    assert main(args) == 0
    shown = answer(capsys)
    assert shown["cells"] == 5 == len(pd.read_csv(tmp_path / "f.csv")) and shown["images"] == 6
    assert main(args) == 2 and "--resume" in capsys.readouterr().err
    assert main([*args, "--resume"]) == 0


def test_sensitivity_command(folder, own, tmp_path, capsys):
    given = f"sensitivity --data {folder} --network {own} --teacher {tmp_path / 't.pth'} {OWN_CHANNELS} --bits 2,3"
    args = [*given.split(), "--images", "4", "--parts", "weights", "--device", "cpu", "--json"]
    args += ["--out", str(tmp_path / "s.csv")]
    assert main(args) == 0
    shown, table = answer(capsys), pd.read_csv(tmp_path / "s.csv")
    assert len(shown["rows"]) == len(table) == 2 * 2 and {*table.images} == {4} and "top1" in table
    assert {*table.kind} == {"alone"} and {*table.part} == {"weights"} and {*table.source} == {"test"}
    assert main(args) == 2 and "--resume" in capsys.readouterr().err
    assert main([*args, "--resume"]) == 0 and pd.read_csv(tmp_path / "s.csv").equals(table)
    assert main([*args, "--resume", "--bits", "9"]) == 2 and "from 2 to 8" in capsys.readouterr().err


def test_figures_command(tmp_path, capsys):
    shutil.copy(Path(__file__).parents[1] / "figures/results_table.csv", tmp_path)
    assert main(["figures", "results_table", "--from-csv", "--out", str(tmp_path), "--json"]) == 0
    assert answer(capsys) == {"out": str(tmp_path), "figures": "results_table"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".png", ".svg", ".tex"}


def test_bench_command(tmp_path, capsys, monkeypatch):
    frame = pd.DataFrame({"method": ["granq"], "median_ms": [1.0]})
    monkeypatch.setattr(granq, "measure_latency_quantizer", lambda **_: frame)
    assert main(["bench", "quantizer", "--out", str(tmp_path), "--json"]) == 0
    assert answer(capsys) == {"quantizer": [{"method": "granq", "median_ms": 1.0}]}
    assert len(pd.read_csv(tmp_path / "quantizer_latency.csv")) == 1


def test_demo_command(tmp_path, capsys, monkeypatch):
    spec, network = describe_data("digits"), "resnet20_cifar10"
    models.save_teacher(tmp_path / "t.safetensors", models.build_network(network, 10), network, spec, 10.0)
    monkeypatch.setattr(granq, "digits_teacher", lambda: tmp_path / "t.safetensors")
    for module in (granq, workbench):
        monkeypatch.setattr(module, "load_split", lambda *given: torch.utils.data.Subset(load_split(*given), range(16)))
    monkeypatch.setattr(qat, "CALIBRATION", 1)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch())  # half of the time
    whole = sweep.from_arguments
    shorter = ["--iterations", "1", "--batch-size", "4"]
    monkeypatch.setattr(sweep, "from_arguments", lambda argv: whole([*argv, *shorter]))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seeds", "1", "--epochs", "1", "--device", "cpu", "--json"]) == 0
    shown = answer(capsys)
    assert shown.keys() == {"out", "teacher_top1", "layerwise", "granq", "strict", "rows"}
    table = (out / "results.md").read_text()
    assert "W2A2" in table and "n = 1 seeds" in table and "layerwise" in table and "nan" not in table
    assert {"accuracy_bits.png", "activation_distortion.png", "synthetic_images.png"} <= {p.name for p in out.iterdir()}


def test_underscores_choose_the_same_defaults():
    given = "--data digits --network resnet20_cifar10 --out o --scheme foldable --recipe match".split()
    dashes, underscores = ([*given, f"--image{c}bits", "6", f"--batch{c}size=16"] for c in "-_")
    job = jobs.from_arguments(dashes)
    assert job == jobs.from_arguments(underscores) and (job.image_bits, job.refined_images) == (6, 512)


def test_nothing_there_is_overwritten(tmp_path, capsys):
    for name in ("audit.csv", "quantizer_latency.csv"):
        (tmp_path / name).write_text("precious")
    assert main(["audit", "--network", "resnet20_cifar10", "--out", str(tmp_path / "audit.csv")]) == 2
    assert main(["bench", "quantizer", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("already exists") == 2
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}


def test_a_table_is_printed_once(capsys):
    assert main(["audit", "--network", "resnet20_cifar10"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 400


@pytest.mark.parametrize("bits", ["2,9", "x"])
def test_widths_of_the_factorial_are_checked_first(bits, tmp_path, capsys):
    given = f"factorial --data digits --network resnet20_cifar10 --bits {bits} --out {tmp_path / 'f.csv'}"
    assert main(given.split()) == 2 and "bits" in capsys.readouterr().err and not (tmp_path / "f.csv").exists()


def test_digits_have_a_teacher_of_their_own(tmp_path, capsys, monkeypatch):
    """The pretrained weights of the network tell other ten classes apart."""
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "test"), range(16))
    monkeypatch.setattr(workbench, "load_split", lambda *_: few)
    assert main(f"quantize {ON_DIGITS} --out {tmp_path / 'run'} --json {SHORT} --scheme strict".split()) == 0
    assert answer(capsys)["teacher_top1"] > 80


def test_a_file_s_function_is_no_pretrained_teacher(folder, tmp_path, capsys):
    (tmp_path / "net.py").write_text("from torchvision.models import resnet18 as make\n")
    given = f"quantize --data {folder} --network {tmp_path / 'net.py'}:make --out {tmp_path / 'run'} {SHORT}"
    assert main(given.split()) == 2 and "names no pretrained weights" in capsys.readouterr().err


def test_tuples_as_pandas_writes_them_are_read(tmp_path):
    row = dict(dataset="digits", network="resnet20_cifar10", scheme="granq", bits="W3A3", recipe="adadfq", seed=1)
    tables = [pd.DataFrame([row | {"last_top1": 90.0, "milestones": m}]) for m in ((), (4,), (4, 8))]
    for table, steps in zip(tables, ((), (4,), (4, 8)), strict=True):
        table.to_csv(tmp_path / "t.csv")
        job = jobs.from_arguments(["--from-row", str(tmp_path / "t.csv"), "1", "--out", "o"])
        assert (job.milestones, job.seed) == (steps, 1)


def test_a_wrong_twin_is_refused_before_anything_is_written(folder, teacher, tmp_path, capsys, monkeypatch):
    assert main([*quantize_args(folder, teacher, tmp_path / "run", "foldable")]) == 0

    integer_model = granq.integer_model  # loaded now: at its first use below the wrong one would stay for other tests

    def wrong(student):
        twin = integer_model(student)
        relus = [node for node in twin.graph.nodes if "activ" in str(node.target)]
        relus[0].replace_all_uses_with(relus[0].args[0])
        twin.graph.erase_node(relus[0])
        twin.recompile()
        return twin

    monkeypatch.setattr(granq.integer, "integer_model", wrong)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--data", folder, "--out", str(tmp_path / "integers")]) == 2
    assert "computes something else than the student: network" in capsys.readouterr().err
    assert not (tmp_path / "integers").exists()


def test_an_own_network_from_its_images_to_a_repeated_row(own, folder, tmp_path, capsys, monkeypatch):
    """Every accuracy is that of images which are normalized as the user says; nobody runs code unasked."""
    seen = set()
    for module in (granq, models):
        monkeypatch.setattr(module, "top1_on", lambda *a: seen.add((a[2].mean, a[2].std)) or top1_on(*a))
    mean, std = "0.1,0.2,0.3", "0.4,0.5,0.6"
    said = f"--data {folder} --network {own} --teacher {tmp_path / 't.pth'} --scheme foldable {SHORT} --json".split()
    assert main(["quantize", *said, "--mean", mean, "--std", std, "--out", str(tmp_path / "run")]) == 0
    row = answer(capsys)
    assert (row["mean"], row["std"], row["image_size"]) == (mean, std, 32)
    evaluate = ["evaluate", str(tmp_path / "run"), "--data", folder, "--device", "cpu", "--json"]
    assert main(evaluate) == 2 and "net.py:make; name it with --network" in capsys.readouterr().err
    assert main([*evaluate, "--network", own]) == 0
    assert answer(capsys)["top1"] == row["last_top1"]
    assert seen == {((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}
    assert main(["quantize", *said, "--mean", std, "--std", mean, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err
    export = ["export", str(tmp_path / "run"), "--data", folder, "--out", str(tmp_path / "int"), "--json"]
    assert main(export) == 2 and main([*export, "--network", own]) == 0
    assert answer(capsys)["top1"] == row["last_top1"]

    pd.DataFrame([row | {"test_images": 9975}]).to_csv(tmp_path / "rows.csv", index=False)
    repeat = ["quantize", "--from-row", str(tmp_path / "rows.csv"), "1", "--out", str(tmp_path / "again"), "--json"]
    assert main(repeat) == 2  # the table names code: only its reader may run it
    assert "only if --network names it again" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the row was measured on 9975 images, this on"):
        assert main([*repeat, "--network", own, "--device", "cpu"]) == 0
    again = answer(capsys)
    assert again["difference"] == 0 and (again["mean"], again["std"]) == (mean, std)


def test_mean_and_deviation_go_into_a_teacher_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        granq, "train_teacher", lambda network, spec, **_: (models.build_network(network, 2), spec.mean[0])
    )
    given = f"teacher --data {folder} --network resnet20_cifar10 --out {tmp_path / 't.safetensors'} --device cpu --json"
    assert main([*given.split(), "--mean", "0.1,0.2,0.3"]) == 2 and "go together" in capsys.readouterr().err
    assert main([*given.split(), "--mean", "0.1,0.2,x", "--std", "1,1,1"]) == 2
    assert "mean should be a valid number, unable to parse string as a number, got 'x'" in capsys.readouterr().err
    assert main([*given.split(), "--mean", "0.13", "--std", "0.3"]) == 2 and "three numbers" in capsys.readouterr().err
    assert main([*given.split(), "--mean", "123,117,104", "--std", "1,1,1"]) == 2
    assert "mean should be less than or equal to 1, got '123'" in capsys.readouterr().err
    assert main([*given.split(), "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6"]) == 0
    assert answer(capsys)["top1"] == 0.1
    spec = load_teacher("resnet20_cifar10", describe_data(folder, "resnet20_cifar10"), tmp_path / "t.safetensors")[1]
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("command", ["figures synthetic_images", "factorial"])
def test_figures_and_factorial_take_mean_and_deviation(command, folder, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(granq, "make_figures", lambda names, workbench: seen.append(workbench.spec.mean) or [])
    monkeypatch.setattr(granq, "measure_granularity_factorial", lambda *_, **__: pd.DataFrame())
    whole, seen = granq.Workbench, []
    monkeypatch.setattr(granq, "Workbench", lambda *a, **k: seen.append((w := whole(*a, **k)).spec.mean) or w)
    monkeypatch.setattr(whole, "zero_shot", (None, None, None))
    given = f"--data {folder} --network resnet20_cifar10 --teacher {teacher} --out {tmp_path / 'out'} --device cpu"
    assert main([*command.split(), *given.split(), "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6"]) == 0
    assert {*seen} == {(0.1, 0.2, 0.3)}


def test_a_terminal_without_unicode_gets_the_result(monkeypatch):
    """Its encoding cannot hold what the command prints after the work."""
    monkeypatch.setitem(commands.COMMANDS, "bench", lambda: {"top1": "80 ± 1 → x"})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii", write_through=True))
    assert main(["bench"]) == 0 and shown.getvalue() == b"top1: 80 \\xb1 1 \\u2192 x\n"


def test_the_folder_of_a_network_decides_nothing(tmp_path):
    """resnet50 in the path, and cifar100 too: the settings of the paper are those of the function's name."""
    (tmp_path / "resnet50_cifar100").mkdir()
    given = f"--data imagenet --network {tmp_path / 'resnet50_cifar100/net.py'}:mobilenet --out run --preset paper"
    assert jobs.from_arguments([*given.split(), "--bits", "4,4"]).alpha_ds == 0.3  # MobileNetV2's


def test_an_own_network_is_not_audited_without_its_data(own, capsys):
    """Nobody knows its classes: a head for 1,000 would be invented."""
    assert main(["audit", "--network", own]) == 2
    assert "--data says how many classes and pixels" in capsys.readouterr().err


def test_sensitivity_at_the_size_of_the_network(own, folder, tmp_path, monkeypatch, capsys):
    sizes, counts = [], []
    hits = lambda model, pairs: counts.append(sum(len(x) for x, _ in pairs)) or torch.ones(1)  # noqa: E731
    monkeypatch.setattr(granq.models, "right", hits)
    monkeypatch.setattr(granq, "measure_sensitivity", lambda model, images, *_, **__: sizes.append(images[0][0].shape))
    given = f"sensitivity --data {folder} --network {own} --teacher {tmp_path / 't.pth'} --out {tmp_path / 's.csv'}"
    with pytest.raises(AttributeError):  # of the table, which was not measured
        main([*given.split(), "--image-size", "16", "--mean=.5,.5,.5", "--std=.5,.5,.5", "--images", "2"])
    assert sizes == [(2, 3, 16, 16)] and counts == [2]  # the teacher, too, sees no more images than asked for


def test_images_that_no_generator_draws_are_told(own, folder, tmp_path, capsys):
    given = f"quantize --data {folder} --network {own} --teacher {tmp_path / 't.pth'} --out {tmp_path / 'run'} {SHORT}"
    with pytest.warns(UserWarning, match=r"sees pixels from 0.0 \(black\) to 1.0; generators draw mean 0"):
        main([*given.split(), "--mean=0,0,0", "--std=1,1,1"])


def test_a_teacher_is_audited_at_the_size_of_its_images(own, folder, tmp_path, capsys):
    """MACs of a convolution grow with the pixels; the file knows them better than the data set's name."""
    spec = describe_data(folder, own, 16)
    models.save_teacher(tmp_path / "t.safetensors", models.build_network(own, 2), own, spec, 50.0)
    audit = f"audit --network {own} --data {folder} --teacher {tmp_path / 't.safetensors'} --json"
    for given, size in (((), 16), (("--image-size", "8"), 8)):
        assert main([*audit.split(), *given]) == 0
        shown = answer(capsys)
        assert shown["image_size"] == size and shown["rows"][0]["macs"] == (size - 2) ** 2 * 3 * 4 * 9
