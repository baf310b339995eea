"""Bits for each layer: what is computed, who knows of it, and ``granq quantize --bits auto``."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import granq
from granq import QATConfig, Scheme, UserError, activation_places, layer_quantizers, quantize_model
from granq.app import jobs
from granq.app.cli import main
from granq.convert import calibrate, original_weight
from granq.integer import integer_model, measure_integer_agreement
from granq.measure.audit import audit, summarize_audit
from granq.measure.workbench import method_name
from granq.packed import load_student, save_packed
from granq.qat import quantized
from granq.runs import SavedRun

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
OWN = {"conv1": (8, 4), "conv2": (3, 2), "point": (5, 2), "fc": (0, 0)}  # conv2 and point read one place


def rounded(x: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    """Section 2 of docs/method.md in plain torch."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    s = (2**bits - 1) / (high - low).clamp_min(1e-8)
    z = torch.round(s * low) + 2 ** (bits - 1)
    return (torch.round(s * x - z).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + z) / s


def expected(net: nn.Module, x: Tensor, bits: dict[str, tuple[int, int]]) -> Tensor:
    """What ``strict`` computes in the tiny network."""

    def layer(name: str, x: Tensor) -> Tensor:
        module, (w, a) = net.get_submodule(name), bits[name]
        weight, rest = module.weight, tuple(range(1, module.weight.dim()))
        if a:
            x = rounded(x, a, tuple(range(2, x.dim())) or (1,))
        weight = rounded(weight, w, rest) if w else weight
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, module.bias)
        return F.conv2d(x, weight, module.bias, padding=module.padding)

    x = F.relu(net.bn1(layer("conv1", x)))
    x = F.relu(net.bn2(layer("conv2", x)) + layer("point", x))
    return layer("fc", F.relu(x.mean((2, 3))))


@pytest.mark.parametrize("changed", [{}, OWN, {"fc": (2, 8)}, {"conv2": (0, 0), "point": (4, 0)}, {"conv1": (0, 6)}])
def test_every_layer_has_its_widths(tiny: nn.Module, changed: dict[str, tuple[int, int]]) -> None:
    student = quantize_model(tiny, "strict", 3, 4, bits=changed)
    full = dict.fromkeys(OWN, (3, 4)) | changed
    with torch.no_grad():
        torch.testing.assert_close(student(IMAGES), expected(tiny, IMAGES, full), rtol=1e-4, atol=1e-5)
    found = {n: (q.weight.bits if q.weight else 0, *(p.bits if p else 0 for p in q.inputs))
             for n, q in layer_quantizers(student).items()}  # fmt: skip
    assert found == full


def test_who_reads_one_place_shares_its_width(tiny: nn.Module) -> None:
    student = quantize_model(tiny, "strict", 3, 3, bits={"point": (4, 6)})
    assert [place.bits for place in activation_places(student).values()] == [3, 6, 3]
    sentence = "conv2 and point read one place, which cannot have {0, 2} bits"
    with pytest.raises(UserError, match=sentence):
        quantize_model(tiny, "strict", 3, 3, bits={"conv2": (3, 2), "point": (3, 0)})
    image = quantize_model(tiny, "strict", 3, 3, image_bits=6, bits={"conv1": (4, 2)})
    assert [place.bits for place in activation_places(image).values()] == [6, 3, 3]


def test_relu_schemes_give_widths_to_what_reads_a_relu_directly() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    student = quantize_model(net, "granq", 3, 3, bits={"0": (3, 0), "2": (3, 5), "5": (3, 0)})
    assert [place.bits for place in activation_places(student).values()] == [5, 3]
    for name in ("0", "5", "8"):  # the image, a ReLU that was pooled, a mean
        with pytest.raises(UserError, match=f"no quantizer directly in front of {name}: its activations take 0 bits"):
            quantize_model(net, "granq", 3, 3, bits={name: (3, 3)})
    table = granq.measure_sensitivity(net, [IMAGES], "granq", [2, 4], kinds=["alone"], parts=["weights", "activations"])
    chosen = granq.allocate_bits(table, 3.0)
    assert [a for _, a in chosen.values()] == [0, chosen["2"][1], 0, 0] and chosen["2"][1]
    quantize_model(net, "granq", 3, 3, bits=chosen)


class Standardized(nn.Conv2d):
    """Computes something else than its weight says: stays in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_bits_that_no_layer_can_have(tiny: nn.Module) -> None:
    for bits, sentence in (
        ({"conv9": (3, 3), "fc": (3, 3)}, "bits name what is no layer that can be quantized: conv9$"),
        ({"bn1": (0, 0)}, "can be quantized: bn1"),
        ({"fc": (1, 3)}, "bits must be an integer from 2 to 8, got 1"),
        ({"fc": (3, 9)}, "bits must be an integer from 2 to 8, got 9"),
    ):
        with pytest.raises(UserError, match=sentence):
            quantize_model(tiny, "strict", 3, 3, bits=bits)
    scheme = Scheme(weights="per_out_channel", activations="per_sample_channel", skip=("conv1",))
    with pytest.raises(UserError, match="can be quantized: conv1"):
        quantize_model(tiny, scheme, 3, 3, bits={"conv1": (3, 3)})
    quantize_model(tiny, scheme, 3, 3, bits={"conv1": (0, 0)})
    tiny.conv1 = Standardized(3, 4, 3)
    with pytest.raises(UserError, match="can be quantized: conv1"):
        quantize_model(tiny, "strict", 3, 3, bits={"conv1": (3, 3)})


def test_allocation_gives_nothing_to_a_layer_that_stays_in_full_precision(tiny: nn.Module) -> None:
    tiny.conv1 = Standardized(3, 4, 3)
    with pytest.warns(UserWarning, match="conv1"):
        table = granq.measure_sensitivity(tiny, [IMAGES], "strict", [2, 3, 4], kinds=["alone"])
        chosen = granq.allocate_bits(table, 3.0)
        student = quantize_model(tiny, "strict", 3, 3, bits=chosen)
    assert chosen["conv1"] == (0, 0)
    counts = {n: m.weight.numel() for n, m in tiny.named_modules() if n in ("conv2", "point", "fc")}
    assert sum(chosen[n][0] * c for n, c in counts.items()) <= 3.0 * sum(counts.values())
    assert {n: q.weight.bits for n, q in layer_quantizers(student).items() if q.weight} == {
        n: chosen[n][0] for n in counts
    }


def test_audit_integers_and_files_know_the_widths(tiny: nn.Module, tmp_path: Path) -> None:
    own = {"conv1": (6, 4), "conv2": (3, 2), "point": (5, 2), "fc": (2, 3)}
    config = QATConfig(scheme="foldable", layer_bits=own, image_size=8)
    student = quantized(tiny, config)
    calibrate(student, [IMAGES])
    frame = audit(student, IMAGES)
    assert {row.layer: (row.weight_bits, row.act_bits) for row in frame.itertuples()} == own
    weights = {n: tiny.get_submodule(n).weight.numel() for n in own}
    macs = {n: count * (1 if n == "fc" else 64) for n, count in weights.items()}
    averages = [sum(own[n][i] * size[n] for n in own) / sum(size.values()) for i, size in enumerate((weights, macs))]
    summary = summarize_audit(frame)
    assert summary["summary"].endswith(f"have 2/3/5/6 bits, on average {averages[0]:.2f} and {averages[1]:.2f}")
    assert summary["macs_low_bit"] == pytest.approx(100)
    scales = 64 * sum(len(tiny.get_submodule(n).weight) for n in own) / sum(weights.values())
    assert summary["true_bits_per_weight"] == pytest.approx(averages[0] + scales)

    twin = integer_model(student)
    assert {n: twin.get_submodule(n).bits for n in own} == {n: w for n, (w, _) in own.items()}
    assert {name: part.bits for name, part in twin.act_quant.named_children()} == {
        name: place.bits for name, place in activation_places(student).items()
    }
    assert not measure_integer_agreement(student, IMAGES).beyond_bound.any()

    (tmp_path / "net.py").write_text(
        "from tests.conftest import TinyNet\n\n\ndef net(classes): return TinyNet(classes)\n"
    )
    spec = granq.DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
    saved = SavedRun(student, config, spec, {"network": f"{tmp_path}/net.py:net"}, 1)
    save_packed(tmp_path / "s.safetensors", saved)
    again = load_student(tmp_path / "s.safetensors", network=f"{tmp_path / 'net.py'}:net")
    assert again.config.layer_bits == own
    with torch.no_grad():
        torch.testing.assert_close(again.student(IMAGES), student(IMAGES), rtol=0, atol=0)
    assert audit(again.student, IMAGES)[["weight_bits", "act_bits"]].equals(frame[["weight_bits", "act_bits"]])


def test_settings_keep_the_widths_in_every_form(tmp_path: Path) -> None:
    own = {"features.Conv": (8, 2), "output": (3, 0)}
    config = QATConfig(layer_bits=own, auto_bits=2.5)
    assert QATConfig.model_validate_json(config.model_dump_json()) == config and config.bits == "W2.5A2.5"
    assert QATConfig(weight_bits=4).bits == "W4A3"
    with pytest.raises(ValueError, match="layer_bits"):
        QATConfig(layer_bits={"x": (1, 3)})
    with pytest.raises(UserError, match="a record of how layer_bits were chosen"):
        quantized(nn.Sequential(nn.Conv2d(3, 3, 3)), QATConfig(auto_bits=3.0))
    row = granq.Result(nn.Module(), nn.Module(), config, pd.DataFrame(), 1.0, 2.0, 3.0, 4.0).row("d", "n", 90.0, 10)
    pd.DataFrame([row, row | {"layer_bits": "", "auto_bits": 0.0, "bits": "W3A3"}]).to_csv(tmp_path / "t.csv")
    read = pd.read_csv(tmp_path / "t.csv").to_dict("records")
    assert [method_name(row) for row in read] == ["granq + auto 2.5", "granq"]
    assert method_name(row | {"auto_bits": 0.0}) == "granq + bits by layer"
    repeat = ["--from-row", str(tmp_path / "t.csv"), "1", "--out", "o"]
    job = jobs.from_arguments(repeat)
    assert (job.layer_bits, job.auto_bits, job.bits) == (own, 2.5, "W2.5A2.5")
    other = jobs.from_arguments([*repeat, "--bits", "4,4"])  # what the user wrote wins
    assert (other.layer_bits, other.auto_bits, other.bits) == ({}, 0.0, "W4A4")
    assert jobs.Job.model_validate_json(job.model_dump_json()) == job  # a line of a sweep
    by_hand = jobs.from_arguments([*repeat, "--layer-bits", "fc", "8", "8", "--generator", "g"])
    assert (by_hand.layer_bits, by_hand.auto_bits, by_hand.warmup_epochs) == ({"fc": (8, 8)}, 0.0, 0)
    with pytest.raises(UserError, match="leave --preset or --from-row out"):
        jobs.from_arguments([*repeat, "--preset", "paper"])


def test_bits_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--data cifar10 --network resnet20_cifar10 --out o".split()
    job = jobs.from_arguments([*given, "--layer-bits", "conv1", "8", "6", "fc", "4", "0"])
    assert job.layer_bits == {"conv1": (8, 6), "fc": (4, 0)} and job.auto_bits == 0
    job = jobs.from_arguments([*given, "--bits", "auto:2.5", "--epochs", "7"])
    assert (job.auto_bits, job.weight_bits, job.act_bits, job.layer_bits, job.epochs) == (2.5, 2, 2, {}, 7)
    for wrong, sentence in (
        (["--bits", "auto:1.9"], "from 2 to 8, weights,activations, such as 3,3, or an average, such as auto:3.0; got"),
        (["--bits", "auto:8.1"], "or an average, such as auto:3.0; got 'auto:8.1'"),
        (["--bits", "auto:x"], "or an average, such as auto:3.0; got 'auto:x'"),
        (["--bits", "auto:3", "--layer-bits", "fc", "3", "3"], "leave one of them out"),
        (["--bits", "auto:3", "--warmup-epochs", "0"], "needs a warm-up and an epoch after it"),
        (["--bits", "auto:3", "--epochs", "4"], "needs a warm-up and an epoch after it"),
        (["--bits", "auto:3", "--generator-epochs", "4"], "an epoch after it with the generator on"),
    ):
        assert main(["quantize", *given, *wrong]) == 2
        shown = capsys.readouterr().err
        assert sentence in shown and shown.count("\n") == 1
    assert main(["audit", "--network", "resnet20_cifar10", "--bits", "auto:3.0"]) == 2


@pytest.fixture
def small(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network of four layers, few images and few choices."""
    monkeypatch.setattr(jobs, "BIT_IMAGES", 8)
    monkeypatch.setattr(jobs, "BIT_CHOICES", (2, 3, 8))
    (tmp_path / "net.py").write_text(
        "from tests.conftest import TinyNet\n\n\ndef net(classes): return TinyNet(classes)\n"
    )
    network = f"{tmp_path / 'net.py'}:net"
    spec = granq.describe_data(folder, "cifar", 32)
    granq.save_teacher(tmp_path / "t.safetensors", granq.build_network(network, 2), network, spec, 50.0)
    given = f"--data {folder} --network {network} --teacher {tmp_path / 't.safetensors'} --scheme foldable --device cpu"
    return f"quantize {given} --epochs 3 --warmup-epochs 1 --iterations 1 --batch-size 4 --image-size 32 --json".split()


def test_auto_allocates_resumes_and_is_repeated(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, network = [*small, "--bits", "auto:3.0"], small[small.index("--network") + 1]
    assert main([*run, "--out", str(tmp_path / "a")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["bits"], row["auto_bits"], row["epochs"], row["warmup_epochs"]) == ("W3A3", 3.0, 2, 0)
    assert method_name(row) == "foldable + auto 3.0" and row["generator"] == str(tmp_path / "a/warmup")
    warm, rest = (torch.load(tmp_path / name / "checkpoint.pt")["seconds"] for name in ("a/warmup", "a"))
    assert row["seconds"] == pytest.approx(warm + rest, abs=0.11)  # the warm-up is a part of the run
    saved = granq.load_run(tmp_path / "a", network=network)
    own = {name: tuple(pair) for name, pair in json.loads(row["layer_bits"]).items()}
    assert saved.config.layer_bits == own and set(own) == set(OWN)
    found = {n: (q.weight.bits, q.inputs[0].bits) for n, q in layer_quantizers(saved.student).items()}
    assert found == own and own["conv2"][1] == own["point"][1]
    weights = {n: original_weight(saved.student.get_submodule(n)).numel() for n in own}
    macs = {n: count * (1 if n == "fc" else 32 * 32) for n, count in weights.items()}
    for i, size in enumerate((weights, macs)):
        assert sum(own[n][i] * size[n] for n in own) <= 3.0 * sum(size.values()) + 1e-9

    out, measure = tmp_path / "b", granq.measure_sensitivity

    def interrupted(*args: object, **options: object) -> pd.DataFrame:
        raise KeyboardInterrupt

    monkeypatch.setattr(granq, "measure_sensitivity", interrupted)
    assert main([*run, "--out", str(out)]) == 130
    capsys.readouterr()
    monkeypatch.setattr(granq, "measure_sensitivity", measure)
    assert main([*run, "--out", str(out)]) == 2 and "or --resume a run" in capsys.readouterr().err
    assert main([*run, "--out", str(out), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["layer_bits"] == row["layer_bits"] and again["last_top1"] == row["last_top1"]
    state = granq.load_run(out, network=network).student.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.student.state_dict().items())

    assert main([*run, "--out", str(out), "--resume"]) == 0  # a finished run says what it said
    assert json.loads(capsys.readouterr().out) == again | {"out": str(out)}
    monkeypatch.setattr(granq, "measure_sensitivity", interrupted)  # a row names the bits: nothing is measured again
    pd.DataFrame([row]).to_csv(tmp_path / "t.csv", index=False)
    repeat = ["quantize", "--from-row", str(tmp_path / "t.csv"), "1", "--out", str(tmp_path / "c"), "--device", "cpu"]
    assert main([*repeat, "--network", network, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 0
    state = granq.load_run(tmp_path / "c", network=network).student.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.student.state_dict().items())


def test_what_a_scheme_cannot_do_is_said_before_the_warm_up(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise granq.UserError("conv1 is called twice")

    monkeypatch.setattr(granq, "quantize_model", refuses)
    assert main([*small, "--bits", "auto:3.0", "--out", str(tmp_path / "run")]) == 2
    assert "conv1 is called twice" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_auto_on_a_given_generator_keeps_the_epochs(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--bits", "3,3", "--out", str(tmp_path / "warm")]) == 0
    given = ["--bits", "auto:2.5", "--generator", str(tmp_path / "warm"), "--warmup-epochs", "0"]
    capsys.readouterr()
    assert main([*small, *given, "--out", str(tmp_path / "run")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["bits"], row["epochs"], row["generator"]) == ("W2.5A2.5", 3, str(tmp_path / "warm"))
    assert not (tmp_path / "run/warmup").exists()
    given[1:2] = ["auto:5.0", "--image-bits", "7"]
    assert main([*small, *given, "--out", str(tmp_path / "image")]) == 0  # the image takes its share of the average
    row = json.loads(capsys.readouterr().out)
    assert json.loads(row["layer_bits"])["conv1"][1] == 7 and row["true_bits_per_activation"] <= 5.0


def test_budgets_are_measured_before_training(tiny: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(tuple(q.weight.bits for q in layer_quantizers(model).values() if q.weight))
        return 10.0 * len(seen)

    frame = granq.measure_budgets(
        tiny, [IMAGES], evaluate, schemes=["strict"], budgets=[2.5, 4.0], choices=[2, 3, 4, 8]
    )
    assert frame[["scheme", "how", "average"]].to_numpy().tolist() == [
        ["strict", "uniform", 2], ["strict", "uniform", 3], ["strict", "uniform", 4], ["strict", "allocated", 2.5],
        ["strict", "allocated", 4], ["granq", "uniform", 3],
    ]  # fmt: skip
    assert seen[:3] == [(k,) * 4 for k in (2, 3, 4)] and seen[-1] == (3,) * 4
    assert frame.top1.tolist() == [10, 20, 30, 40, 50, 60]
    counts = [tiny.get_submodule(n).weight.numel() for n in OWN]
    scales = 64 * sum(len(tiny.get_submodule(n).weight) for n in OWN) / sum(counts)
    for place, bits in enumerate(seen[:5]):
        average = sum(b * c for b, c in zip(bits, counts, strict=True)) / sum(counts)
        assert average <= frame.average[place] + 1e-9
        assert frame.true_bits_per_weight[place] == pytest.approx(average + scales)
    ax = granq.plot_accuracy_true_bits(frame)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["strict, allocated"].get_ydata().tolist() == [40, 50] and len(lines) == 3
