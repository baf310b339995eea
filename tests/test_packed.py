"""Students as files: bit for bit what was saved, and as large as the audit says."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TinyNet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import granq
from granq.app.cli import main
from granq.convert import activation_places, layer_quantizers, weight_quantizer
from granq.files import read_tensors, write_tensors
from granq.packed import pack, save_packed, unpack
from granq.runs import SavedRun

FACTS = {"network": "resnet20_cifar10", "top1": 12.5}
SPEC = granq.describe_data("digits")
EVERY = [
    (scheme, learned) for scheme in granq.SCHEMES for learned in (False, True) if not (scheme == "granq" and learned)
]


def save(path, student, config, facts=FACTS):
    save_packed(path, SavedRun(student, config, SPEC, facts, 3))
    return path


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def student_of(scheme, bits=3, learned=False, network="resnet20_cifar10"):
    torch.manual_seed(0)
    model = granq.build_network(network, 10)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2), norm.running_var.uniform_(0.5, 2)
    config = granq.QATConfig(scheme=scheme, weight_bits=bits, act_bits=bits)
    student = granq.quantize_model(model, scheme, bits, bits)
    granq.calibrate(student, [images()])
    if learned:
        with torch.no_grad():
            for step in granq.learn_steps(student):
                step.add_(torch.randn_like(step) / 5)
    return student, config


@pytest.mark.parametrize("width", range(18))
def test_codes_take_their_width_and_come_back(width):
    codes = torch.randint(0, 2**width, (7, 3), generator=torch.Generator().manual_seed(width))
    codes[0, 0], codes[0, 1] = 0, 2**width - 1  # a layer of zeros has codes of no width
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(21 * width / 8)
    # Python's own integers, a digit of 0 and 1 at a time
    number = sum(int(code) << (width * i) for i, code in enumerate(codes.flatten()))
    assert bytes(packed.numpy()) == number.to_bytes(len(packed), "little")
    assert torch.equal(unpack(packed, width, 21).view(7, 3), codes)


@pytest.mark.parametrize(("scheme", "learned"), EVERY)
def test_a_loaded_student_computes_the_same_bits(scheme, learned, tmp_path):
    student, config = student_of(scheme, learned=learned)
    save(tmp_path / "s.safetensors", student, config)
    loaded = granq.load_student(tmp_path / "s.safetensors")
    assert loaded[1:] == (config, SPEC, FACTS, 3)
    for name, module in student.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(loaded.student.get_submodule(name).weight, module.weight), name
    with torch.no_grad():
        assert torch.equal(loaded.student(images(8)), student(images(8)))
    assert not any(p.requires_grad for p in loaded.student.parameters())
    weights = [layer.original for layer in layer_quantizers(loaded.student).values()]
    assert not any(weight.data_ptr() % 64 for weight in weights)  # sums over other memory would round otherwise


@pytest.mark.parametrize(("scheme", "bits"), [("strict", 3), ("granq", 2), ("granq", 8), ("foldable", 5)])
def test_the_file_is_as_large_as_the_audit_says(scheme, bits, tmp_path):
    student, config = student_of(scheme, bits)
    path = tmp_path / "s.safetensors"
    save(path, student, config)
    frame = granq.audit(student, images())
    said = float((frame.weights * frame.bits_per_weight).sum()) / 8
    keys = {f"{layer}.weight{kind}" for layer in frame.layer for kind in ("", ".codes", ".qparams")}
    tensors = load_file(path)
    weights = sum(t.numel() * t.element_size() for key, t in tensors.items() if key in keys)
    assert weights == pytest.approx(said, rel=0.001)
    rest = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in keys)
    assert path.stat().st_size - weights - rest < 30_000  # names and settings
    teacher = sum(t.numel() * 4 for t in granq.build_network("resnet20_cifar10", 10).state_dict().values())
    assert path.stat().st_size < teacher


def test_the_audit_of_a_loaded_student_says_what_it_said_before(tmp_path):
    for scheme in ("granq", "strict", "foldable"):
        student, config = student_of(scheme)
        save(tmp_path / scheme, student, config)
        before, after = (granq.audit(s, images()) for s in (student, granq.load_student(tmp_path / scheme).student))
        sqnr = [frame.pop("weight_sqnr_db") for frame in (before, after)]
        np.testing.assert_allclose(*sqnr, rtol=1e-4)
        assert granq.summarize_audit(before.assign(weight_sqnr_db=sqnr[0])) == granq.summarize_audit(
            after.assign(weight_sqnr_db=sqnr[1])
        )
        shown = "layer weights macs weight_granularity scales bits_per_weight low_bit input_quantized".split()
        assert before[shown].equals(after[shown])


@pytest.mark.parametrize("learned", [False, True])
def test_a_loaded_foldable_student_has_the_same_integers(learned, tmp_path):
    student, config = student_of("foldable", learned=learned)
    save(tmp_path / "s", student, config)
    before, after = (granq.integer_model(s).state_dict() for s in (student, granq.load_student(tmp_path / "s").student))
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_codes_above_their_range_and_kernels_of_one_value_survive(tmp_path):
    """A tie gives code 4 at 3 bits; a constant kernel has a scale of 7e8 and a zero point beyond a float's integers."""
    student, config = student_of("granq")
    layer = student.get_submodule("features.stage1.unit1.body.conv1.conv")
    tie = torch.tensor([0.5, 1.5, 4.0, 7.5, 1, 2, 3, 5, 6]).view(3, 3)
    with torch.no_grad():
        original = layer.parametrizations.weight.original
        original[0, 0], original[0, 1], original[0, 2], original[0, 3] = tie, 0.3, 0.0, -1e-30
        original[1, 0] = 5 + torch.linspace(0, 1e-6, 9).view(3, 3)  # a zero point of millions
    expected = torch.tensor([0.0, 2, 4, 8, 0, 2, 2, 4, 6]).view(3, 3)
    save(tmp_path / "s", student, config)
    loaded = granq.load_student(tmp_path / "s").student.get_submodule("features.stage1.unit1.body.conv1.conv").weight
    assert torch.equal(loaded, layer.weight) and torch.equal(loaded[0, 0, 0], expected[0])


def test_a_layer_under_two_names_is_stored_once(tmp_path, monkeypatch):
    class Twice(TinyNet):
        def __init__(self):
            super().__init__()
            self.conv3 = self.conv2

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.fc((self.conv2(x) + self.conv3(x)).relu().mean((2, 3)))

    monkeypatch.setattr("granq.runs.build_network", lambda *_: Twice())
    student = granq.quantize_model(Twice(), "strict", 3, 3)
    save(tmp_path / "s", student, granq.QATConfig(scheme="strict"))
    loaded = granq.load_student(tmp_path / "s").student
    assert torch.equal(loaded(images()), student(images()))
    assert sum(key.endswith(".codes") for key in load_file(tmp_path / "s")) == len({*map(id, weights(student))})
    assert loaded.conv2 is loaded.conv3


def weights(student):
    return [layer for _, layer in student.named_modules() if weight_quantizer(layer)]


def test_skipped_layers_and_image_bits(tmp_path):
    scheme = granq.Scheme(weights="per_out_channel", activations="per_sample_channel", skip=("output",))
    config = granq.QATConfig(scheme=scheme, image_bits=6)
    student = granq.quantize_model(granq.build_network("resnet20_cifar10", 10), scheme, 3, 3, 6)
    save(tmp_path / "s", student, config)
    loaded = granq.load_student(tmp_path / "s")
    assert loaded.config == config and torch.equal(loaded.student(images()), student(images()))
    assert layer_quantizers(loaded.student)["output"].weight is None
    assert [place.bits for place in activation_places(loaded.student).values()][0] == 6


def test_what_is_no_student_is_refused(tmp_path, monkeypatch):
    student, config = student_of("strict")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.safetensors"
    (tmp_path / "mine.py").write_text(
        "from granq import build_network\ndef make(): return build_network('resnet20_cifar10', 10)"
    )
    save(path, student, config, FACTS | {"network": "mine.py:make"})
    with pytest.raises(granq.UserError, match="mine.py:make; name it with --network"):
        granq.load_student(path)
    again = granq.load_student(path, network=f"{tmp_path / 'mine.py'}:make")
    assert torch.equal(again.student(images()), student(images()))
    with pytest.raises(granq.UserError, match="is of network mine.py:make; name it"):
        granq.load_student(path, network="resnet56_cifar10")
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:5000])
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    shutil.copy(granq.digits_teacher(), tmp_path / "teacher.safetensors")
    for name in ("torn", "other", "teacher"):
        with pytest.raises(granq.UserError, match="holds no student of granq export"):
            granq.load_student(tmp_path / f"{name}.safetensors")
    with pytest.raises(
        granq.UserError, match="unknown student or run 'cifar1000-strict-w3a3'; known: .*FILE.safetensors"
    ):
        granq.load_student("cifar1000-strict-w3a3")


def test_students_that_come_with_granq_open_by_name(tmp_path, monkeypatch):
    student, config = student_of("strict")
    save(tmp_path / "digits-strict-w3a3.safetensors", student, config)
    monkeypatch.setattr("granq.packed.STUDENTS", tmp_path)
    assert torch.equal(granq.load_student("digits-strict-w3a3").student(images()), student(images()))
    with pytest.raises(granq.UserError, match="known: digits-strict-w3a3, FILE.safetensors"):
        granq.load_student("nope")


SHIPPED = sorted(path.stem for path in granq.packed.STUDENTS.glob("*.safetensors"))


def test_students_ship():
    assert {f"cifar{data}-{scheme}-w3a3" for data in (10, 100) for scheme in ("strict", "foldable")} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_students_that_ship(name):
    saved = granq.load_student(name)
    facts, size = saved.facts, (granq.packed.STUDENTS / f"{name}.safetensors").stat().st_size
    frame = granq.audit(saved.student, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    found = granq.summarize_audit(frame)
    assert found["weights_low_bit"] == pytest.approx(100) and found["macs_not_quantized"] == 0
    assert found["true_bits_per_weight"] == pytest.approx(facts["true_bits_per_weight"])
    packed, beside = (frame.weights * frame.bits_per_weight).sum() / 8, 60_000  # BatchNorms, ranges and the header
    assert packed < size < packed + beside
    assert facts["top1"] > facts["teacher_top1"] - (8 if "100" in name else 3)
    assert saved.config.bits == "W3A3" and name.split("-")[1] == saved.config.scheme and facts["commit"]


def test_export_and_evaluate(folder, teacher, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "out/s.safetensors"
    tiny = "--epochs 2 --warmup-epochs 1 --iterations 1 --batch-size 4 --device cpu --scheme strict --bits 3,3".split()
    given = ["--data", folder, "--network", "resnet20_cifar10"]
    assert main(["quantize", *given, "--teacher", str(teacher), *tiny, "--out", str(run)]) == 0
    export = ["export", str(run), "--data", folder, "--format", "packed", "--out", str(file), "--json"]
    capsys.readouterr()
    assert main(export) == 0
    said = json.loads(capsys.readouterr().out)
    with safe_open(str(file), "pt") as opened:
        header = opened.metadata()["granq"]
    facts = json.loads(header)["facts"]
    assert str(tmp_path) not in header  # where things lay is nobody's business
    assert facts["network"] == "resnet20_cifar10" and facts["teacher"] == teacher.name and facts["data"] == "data"
    assert facts["images"] == 6 and facts["torch"]
    assert facts["true_bits_per_weight"] == pytest.approx(3.2, abs=0.1) and said["bytes"] == file.stat().st_size
    assert main(["evaluate", str(file), "--data", folder, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == facts["top1"]
    assert main(export) == 2 and "already exists" in capsys.readouterr().err
    assert main([*export[:-2], str(tmp_path / "x.bin")]) == 2 and ".safetensors" in capsys.readouterr().err


def test_a_student_says_that_images_are_others(capsys):
    with pytest.warns(UserWarning, match="measured on 9975 images of cifar10, now on 450 of digits"):
        assert main("evaluate cifar10-strict-w3a3 --data digits --device cpu --json".split()) == 0
    assert "teacher_top1" not in json.loads(capsys.readouterr().out)


def test_a_student_in_half_precision_has_no_nan():
    """A dead channel has the smallest step there is, whose reciprocal float16 does not hold."""
    student = granq.load_student("cifar100-foldable-w3a3").student
    assert min(place.qparams().scale.min() for place in activation_places(student).values()) < 1e-8
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, half = student(images), copy.deepcopy(student).half()(images.half())
    assert half.isfinite().all() and (half - whole).abs().mean() < whole.abs().mean() / 3  # rounding goes elsewhere


def test_layers_with_one_weight_keep_grids_of_their_own(tmp_path, monkeypatch):
    class Tied(TinyNet):
        def __init__(self):
            super().__init__()
            self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
            self.conv3.weight = self.conv2.weight

        def forward(self, x):
            return self.fc(self.conv3(self.relu(self.conv2(self.conv1(x).relu()))).mean((2, 3)))

    monkeypatch.setattr("granq.runs.build_network", lambda *_: Tied())
    student = granq.quantize_model(Tied(), "foldable", 3, 3)
    granq.calibrate(student, [images()])
    save(tmp_path / "s", student, granq.QATConfig(scheme="foldable"))
    assert torch.equal(granq.load_student(tmp_path / "s").student(images()), student(images()))


def test_a_file_of_other_layers_is_one_sentence(tmp_path):
    student, config = student_of("strict")
    with pytest.raises(granq.UserError, match="network or settings are of another student"):
        save(tmp_path / "s", student, config, FACTS | {"network": "resnet56_cifar10"})
    tensors, header = read_tensors(save(tmp_path / "s", student, config))
    write_tensors(tmp_path / "s", tensors, header | {"facts": FACTS | {"network": "resnet56_cifar10"}})
    with pytest.raises(granq.UserError, match="s is of another network: "):
        granq.load_student(tmp_path / "s")


def test_half_precision_and_back_keeps_the_grid(tmp_path):
    student, config = student_of("foldable", 3)
    path = save(tmp_path / "s.safetensors", student, config)
    before, after = (granq.load_student(path).student for _ in range(2))
    pairs = zip(before.modules(), after.half().float().modules(), strict=True)
    layers = [pair for pair in pairs if isinstance(pair[0], nn.Conv2d)]
    assert layers and all(torch.allclose(a.weight, b.weight, rtol=2e-3, atol=1e-5) for a, b in layers)


@pytest.mark.parametrize("scheme", ["strict", "foldable"])
def test_other_weights_in_a_loaded_student_are_rounded_too(tmp_path, scheme):
    """Weights that were loaded or trained afterwards do not lie on the grid."""
    student, config = student_of(scheme, 3)
    loaded = granq.load_student(save(tmp_path / "s.safetensors", student, config)).student
    layer = next(layer for layer in loaded.modules() if isinstance(layer, nn.Conv2d))
    before = layer.weight.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1 * torch.randn_like(before))
    assert not torch.equal(layer.weight, before)
    if scheme == "foldable":  # of another step of the input the grid says nothing
        granq.calibrate(loaded, [3 * images()])
        assert torch.allclose(granq.integer_model(loaded)(images()), loaded(images()), atol=1e-5)
    assert max(len(filter.unique()) for filter in layer.weight.flatten(1)) <= (8 if scheme == "strict" else 27)


def test_what_would_come_back_as_another_student_is_not_saved(tmp_path):
    """Settings that say something else, and no network to build it from."""
    student, config = student_of("foldable")
    network = granq.build_network("resnet20_cifar10", 10)
    mixed = granq.quantize_model(network, "strict", 3, 3, bits={"output": (5, 3)})
    skips = granq.Scheme(**dict(granq.SCHEMES["strict"]) | {"skip": ("output",)})
    strict, own = config.change(scheme="strict"), {"features.stage1.unit1.body.conv1.conv": (5, 3)}
    for wrong in (
        (student, config.change(weight_bits=4)), (student, config.change(act_bits=4)), (student, strict),
        (mixed, strict), (mixed, strict.change(layer_bits=own)), (granq.quantize_model(network, skips, 3, 3), strict),
        (granq.quantize_model(network, "strict", 3, 3), config.change(scheme="granq")),
    ):  # fmt: skip
        with pytest.raises(granq.UserError, match="network or settings are of another student"):
            save(tmp_path / "s", *wrong)
    with pytest.raises(granq.UserError, match="16 pixels, the data description 32"):
        save(tmp_path / "s", student, config.change(image_size=16))
    with pytest.raises(granq.UserError, match="lack the name of the student's network"):
        save(tmp_path / "s", student, config, {})
