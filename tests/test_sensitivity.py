"""Sensitivity against plain forwards, remedies, and the allocation of bits against exhaustive search."""

import copy
import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from granq.convert import activation_places, calibrate, quantize_model
from granq.errors import UserError
from granq.measure import sensitivity
from granq.measure.allocation import allocate_bits
from granq.measure.layer_error import measure_layer_error
from granq.measure.remedies import measure_remedies
from granq.measure.sensitivity import KINDS, PARTS, measure_flips, measure_sensitivity
from granq.schemes import SCHEMES, Scheme
from granq.show.layers import plot_sensitivity

LAYERS = ("conv1", "conv2", "point", "fc")  # conv2 and point read one place
FOLDED = ("foldable", "weights")


def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=rng), torch.randint(3, (8,), generator=rng)) for _ in range(2)]


@pytest.fixture
def sharp(tiny: nn.Module) -> nn.Module:
    """The tiny network with logits that differ, so that predictions flip."""
    with torch.no_grad():
        tiny.fc.weight *= 20
        tiny.fc.bias -= tiny(labelled()[0][0]).mean(0)
    return tiny


def row_of(frame: pd.DataFrame, **values: object) -> pd.Series:
    found = frame[(frame[list(values)] == pd.Series(values)).all(axis=1)]
    assert len(found) == 1
    return found.iloc[0]


def expected(model: nn.Module, student: nn.Module) -> dict[str, float]:
    """The metrics by plain torch, over all images at once."""
    images, labels = (torch.cat(parts) for parts in zip(*labelled(), strict=True))
    with torch.no_grad():
        t, s = model(images).double(), torch.cat([student(x) for x, _ in labelled()]).double()
    p = t.softmax(1)
    was, right = t.argmax(1) == labels, s.argmax(1) == labels
    return {
        "kl": (p * (p.log() - s.softmax(1).log())).sum(1).mean().item(),
        "agreement": 100 * (t.argmax(1) == s.argmax(1)).double().mean().item(),
        "sqnr_db": 10 * torch.log10(t.square().sum() / (t - s).square().sum()).item(),
        "top1": 100 * right.double().mean().item(),
        "lost": 100 * (was.double() - right.double()).mean().item(),
        "right_to_wrong": (was & ~right).sum().item(),
        "wrong_to_right": (right & ~was).sum().item(),
    }


def check(row: pd.Series, model: nn.Module, student: nn.Module) -> None:
    for name, value in expected(model, student).items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    assert row.lost_low <= row.lost <= row.lost_high


# weights of foldable are in units of steps that the student here has not: the next test
@pytest.mark.parametrize(
    ("scheme", "part"), [pair for pair in itertools.product(("strict", "foldable"), PARTS) if pair != FOLDED]
)
def test_alone_and_all_but_are_students_that_skip(scheme: str, part: str, sharp: nn.Module) -> None:
    frame = measure_sensitivity(sharp, labelled(), scheme, [2, 3], kinds=["alone", "all_but"], parts=[part])
    assert list(frame.layer.unique()) == list(LAYERS) and len(frame) == 2 * 2 * 4
    for kind, name, bits in itertools.product(("alone", "all_but"), LAYERS, (2, 3)):
        skip = tuple(n for n in LAYERS if (n != name) == (kind == "alone"))
        changes: dict[str, object] = {"skip": skip}
        if part == "weights":
            changes |= dict(activations=None, tracked=False, fold=False)
        elif part == "activations":
            changes |= dict(weights=None, fold=False)
        student = quantize_model(sharp, SCHEMES[scheme].model_copy(update=changes), bits, bits)
        if SCHEMES[scheme].tracked and "activations" not in changes:
            full = quantize_model(sharp, SCHEMES[scheme].model_copy(update={"skip": ()}), bits, bits)
            calibrate(full, [labelled()[0][0]])
            student.load_state_dict(full.state_dict(), strict=False)  # the ranges of the whole network
            for place in activation_places(student).values():
                place.fold = True
        check(row_of(frame, kind=kind, layer=name, bits=bits), sharp, student)


def test_weights_of_a_foldable_layer_are_quantized_in_steps_of_its_input(sharp: nn.Module) -> None:
    frame = measure_sensitivity(sharp, labelled(), "foldable", 3, kinds=["alone"], parts=["weights"])
    student = quantize_model(sharp, "foldable", 3, 3)
    calibrate(student, [labelled()[0][0]])
    other = copy.deepcopy(sharp)
    with torch.no_grad():
        other.conv2.weight.copy_(student.conv2.weight)
    check(row_of(frame, layer="conv2"), sharp, other)


def test_a_patched_layer_reads_what_it_reads_in_full_precision(sharp: nn.Module) -> None:
    frame = measure_sensitivity(sharp, labelled(), "strict", 2, kinds=["patched"], parts=["both"])
    student = quantize_model(sharp, "strict", 2, 2)
    clean: list[torch.Tensor] = []
    for name in LAYERS:
        with_input = copy.deepcopy(student)
        sharp.get_submodule(name).register_forward_pre_hook(lambda _, args: clean.append(args[0].clone()))
        with_input.get_submodule(name).register_forward_pre_hook(lambda *_: (clean.pop(0),))

        def patched(x: torch.Tensor, net: nn.Module = with_input) -> torch.Tensor:
            clean.clear()
            sharp(x)
            return net(x)

        row, known = row_of(frame, layer=name), expected(sharp, patched)
        assert row.kl == pytest.approx(known["kl"], rel=1e-4)
        whole = expected(sharp, student)["kl"]
        assert row.recovered == pytest.approx(1 - known["kl"] / whole, rel=1e-3, abs=1e-6)
        sharp.get_submodule(name)._forward_pre_hooks.clear()


def test_values_changed_in_place_and_layers_called_twice() -> None:
    """What a sum changes in place is there already when the layer of the shortcut is reached; ``a`` is called twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3))
            self.fc = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.b(F.relu(self.a(x)))
            out = out.add_(self.c(x.sin()))
            out = self.a(F.relu(out, inplace=True))
            return self.fc(30 * out.mean((2, 3)))

    torch.manual_seed(0)
    model = Block().eval()
    frame = measure_sensitivity(model, labelled(), "strict", 2, kinds=["alone", "all_but"], parts=["both"])
    names = ("a", "b", "c", "fc")
    for kind, name in itertools.product(("alone", "all_but"), names):
        skip = tuple(n for n in names if (n != name) == (kind == "alone"))
        student = quantize_model(model, SCHEMES["strict"].model_copy(update={"skip": skip}), 2, 2)
        check(row_of(frame, kind=kind, layer=name), model, student)
    patched = measure_sensitivity(model, labelled(), "strict", 2, kinds=["patched"], parts=["activations"])
    assert row_of(patched, layer="fc").kl == 0, "whatever was lost comes back at the last layer"
    macs = row_of(frame, kind="alone", layer="a")[["weights", "macs"]].tolist()
    assert macs == [81, 2 * 81 * 64]


def test_relu_schemes_leave_what_belongs_to_no_layer(sharp: nn.Module) -> None:
    """``granq`` quantizes after a ReLU: conv1 reads the image as it is."""
    frame = measure_sensitivity(sharp, labelled(), "granq", 2, kinds=["alone"], parts=["activations"])
    assert row_of(frame, layer="conv1")[["kl", "place"]].tolist() == [pytest.approx(0, abs=1e-12), ""]
    assert row_of(frame, layer="conv2").kl > 0


def test_images_without_labels_and_the_state_of_the_model(sharp: nn.Module) -> None:
    before = {k: v.clone() for k, v in sharp.state_dict().items()}
    frames = [measure_sensitivity(sharp, [x for x, _ in labelled()], "strict", 2) for _ in range(2)]
    pd.testing.assert_frame_equal(*frames)
    assert "top1" not in frames[0] and {*frames[0].kind} == {*KINDS} and {*frames[0].part} == {*PARTS}
    assert frames[0][frames[0].kind == "alone"].recovered.isna().all()
    assert all(torch.equal(v, before[k]) for k, v in sharp.state_dict().items())
    assert not any(m._forward_hooks for m in sharp.modules())


def test_interval_of_the_loss_is_paired(sharp: nn.Module) -> None:
    """40 of 1,000 images get worse, 20 better: variance of a difference of shares, (b + c - (b - c)^2 / n) / n^2."""
    row = sensitivity._metrics(torch.tensor([0, 940, 1, 1, 500, 40, 20], dtype=torch.float64), 1000, True)
    half = 1.96 * 100 * (60 - 20**2 / 1000) ** 0.5 / 1000
    assert row["lost"] == 2 and (row["right_to_wrong"], row["wrong_to_right"]) == (40, 20)
    assert row["lost_low"] == pytest.approx(2 - half, abs=0.1) and row["lost_high"] == pytest.approx(2 + half, abs=0.1)


def test_resumes_with_what_is_missing(sharp: nn.Module, tmp_path, monkeypatch) -> None:
    out, how = tmp_path / "s.csv", dict(kinds=["alone", "all_but"], parts=["weights", "both"])
    whole = measure_sensitivity(sharp, labelled(), "strict", [2, 3], **how, facts={"dataset": "x"})
    compare, count = sensitivity.compare, []

    def fails_at_the_third(*args: object) -> pd.DataFrame:
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("killed")
        return compare(*args)

    monkeypatch.setattr(sensitivity, "compare", fails_at_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        measure_sensitivity(sharp, labelled(), "strict", [2, 3], **how, facts={"dataset": "x"}, out=out)
    measure_sensitivity(sharp, labelled(), "strict", [2, 3], **how, facts={"dataset": "x"}, out=out)
    assert len(count) == 3 + 6
    pd.testing.assert_frame_equal(pd.read_csv(out), whole, check_dtype=False)
    with pytest.raises(UserError, match="measured with scheme strict, not granq"):
        measure_sensitivity(sharp, labelled(), "granq", 2, out=out)


def test_bad_input_is_one_sentence(sharp: nn.Module) -> None:
    for call, sentence in (
        (
            lambda: measure_sensitivity(sharp, labelled(), "strict", 9),
            "bits must be an integer from 2 to 8, got 9",
        ),
        (lambda: measure_sensitivity(sharp, labelled(), "strict", 3, kinds=["x"]), "unknown kind 'x'; known: alone"),
        (lambda: measure_sensitivity(sharp, labelled(), "strict", 3, parts=["x"]), "unknown part 'x'; known: weights"),
        (lambda: measure_sensitivity(sharp, [], "strict", 3), "no image"),
        (lambda: measure_sensitivity(sharp, torch.zeros(2, 3, 8, 8), "strict", 3), "batches must hold images"),
        (lambda: measure_remedies(sharp, labelled(), "strict", 3, ["conv9"]), "unknown layer 'conv9'; known: conv1"),
        (
            lambda: measure_sensitivity(sharp, [(x, F.one_hot(y, 3)) for x, y in labelled()], "strict", 3),
            "one number for",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            call()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_networks_that_others_quantized(sharp: nn.Module) -> None:
    """torch's own fake quantization, as modules: weights by channel, inputs by tensor, in the layers themselves."""
    from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver, QConfig, prepare_qat

    acts = FakeQuantize.with_args(observer=MinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8)
    weights = FakeQuantize.with_args(observer=PerChannelMinMaxObserver, quant_min=-4, quant_max=3, dtype=torch.qint8,
                                     qscheme=torch.per_channel_symmetric)  # fmt: skip
    other = copy.deepcopy(sharp).train()
    other.qconfig = QConfig(activation=acts, weight=weights)
    prepare_qat(other, inplace=True)
    other(labelled()[0][0])
    other.apply(torch.ao.quantization.disable_observer)
    other.train()  # as a trainer may hand it over
    assert type(other.conv2) is not nn.Conv2d
    frame = measure_sensitivity(sharp, labelled(), other, kinds=["alone"])
    assert {*frame.part} == {"both"}  # its layers round their inputs themselves
    mixed = copy.deepcopy(sharp)
    mixed.conv2 = other.conv2
    check(row_of(frame, layer="conv2"), sharp, mixed)
    error = measure_layer_error(sharp, [x for x, _ in labelled()], {"torch.ao": other}, modes=["local"])
    x = torch.cat([sharp.relu(sharp.bn1(sharp.conv1(x))) for x, _ in labelled()])
    with torch.no_grad():
        mse = (other.conv2(x) - sharp.conv2(x)).double().square().mean().item()
    assert row_of(error, layer="conv2").mse == pytest.approx(mse, rel=1e-4)
    assert {*error.scheme} == {"torch.ao"}


def test_flips_by_class(sharp: nn.Module) -> None:
    student = quantize_model(sharp, "strict", 2, 2)
    frame, (images, labels) = measure_flips(sharp, student, labelled()), map(torch.cat, zip(*labelled(), strict=True))
    with torch.no_grad():
        before, after = (network(images).argmax(1) == labels for network in (sharp, student))
    for row in frame.itertuples():
        own = labels == row.label
        counts = (own.sum(), (own & before).sum(), (own & before & ~after).sum(), (own & ~before & after).sum())
        assert tuple(row)[2:] == tuple(map(int, counts))
    assert frame.images.sum() == len(labels) and frame.right_to_wrong.sum() > 0
    drawn = DataLoader(TensorDataset(images, labels), 4, shuffle=True)  # another order each time
    assert not measure_flips(sharp, sharp, drawn)[["right_to_wrong", "wrong_to_right"]].to_numpy().any()


def test_networks_that_torchao_quantized(sharp: nn.Module) -> None:
    """Weights of torchao are tensors of a class of its own; it leaves convolutions as they are."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(other := copy.deepcopy(sharp), torchao.Int8WeightOnlyConfig())
    frame = measure_sensitivity(sharp, labelled(), other, kinds=["alone"], parts=["both"])
    check(row_of(frame, layer="fc"), sharp, other)
    assert 0 < row_of(frame, layer="fc").kl and row_of(frame, layer="conv2").kl < 1e-12
    error = measure_layer_error(sharp, [x for x, _ in labelled()], {"torchao": other}, modes=["local"])
    assert row_of(error, layer="fc").mse > 0 == row_of(error, layer="conv2").mse


def test_a_student_of_one_s_own_is_measured_as_it_is(sharp: nn.Module) -> None:
    student = quantize_model(sharp, "strict", 3, 3)
    ours = measure_sensitivity(sharp, labelled(), student, 3).drop(columns=["scheme", "logit_norm", "start"])
    other = measure_sensitivity(sharp, labelled(), "strict", 3).drop(columns=["scheme", "logit_norm", "start"])
    pd.testing.assert_frame_equal(ours, other)


def test_remedies_are_tried(sharp: nn.Module) -> None:
    frame = measure_remedies(sharp, labelled(), "foldable", 2, layers=["conv2"])
    assert {"none", "left out", "weights per_kernel", "activations per_sample_channel", "range cut",
            "weights 4 bits", "activations 3 bits"} <= {*frame.remedy}  # fmt: skip
    assert {*frame.recovered[frame.remedy == "none"]} == {0.0} == {*frame.gained[frame.remedy == "none"]}
    left_out = row_of(frame, remedy="left out", where="alone")
    assert (left_out.kl, left_out.recovered) == pytest.approx((0, 1), abs=1e-9), "full precision"
    row = row_of(frame, remedy="left out", where="whole")
    found = measure_sensitivity(sharp, labelled(), "foldable", 2, kinds=["all_but"], parts=["both"])
    assert row.kl == pytest.approx(row_of(found, layer="conv2").kl)
    assert row.recovered == pytest.approx(row_of(found, layer="conv2").recovered)
    with torch.no_grad():
        x = sharp.relu(sharp.bn1(sharp.conv1(labelled()[0][0])))
    spread = np.ptp(x.transpose(0, 1).flatten(1).numpy(), 1)
    assert row.channel_ratio == pytest.approx(np.sort(spread)[-1] / np.sort(spread)[1])  # torch's median: the lower
    assert row.input_range == pytest.approx((np.ptp(x.numpy()) / x.std()).item(), rel=1e-5)
    assert not row.depthwise and 1 <= row.levels <= 4


def test_a_remedy_is_the_layer_made_in_another_way(sharp: nn.Module) -> None:
    """Against a student whose conv2 has weights of 4 bits; and the guiltiest are those with the largest KL alone."""
    frame = measure_remedies(sharp, labelled(), "strict", 2, layers=2)
    alone = measure_sensitivity(sharp, labelled(), "strict", 2, kinds=["alone"], parts=["both"])
    assert list(frame.layer.unique()) == alone.sort_values("kl", ascending=False).layer[:2].tolist()
    name = frame.layer[0]
    student = quantize_model(sharp, "strict", 2, 2)
    student.get_submodule(name).parametrizations.weight[0].bits = 4
    check(row_of(frame, layer=name, remedy="weights 4 bits", where="whole"), sharp, student)


def table(seed: int = 0, layers: int = 4, widths: tuple[int, ...] = (2, 3, 4)) -> pd.DataFrame:
    """Losses that fall with the bits; layers 1 and 2 read one place, and no quantizer stands before the last."""
    rng, rows = np.random.default_rng(seed), []
    places = ["x", "y", "y", *(f"p{i}" for i in range(layers - 4)), ""]
    for i in range(layers):
        sizes = dict(
            layer=f"l{i}", place=places[i], grid="x", weights=int(rng.integers(10, 99)), macs=int(rng.integers(99, 999))
        )
        for part, k in itertools.product(("weights", "activations"), widths):
            kl = rng.uniform(0.5, 2) * 4.0**-k if places[i] or part == "weights" else 0.0
            rows.append(dict(kind="alone", part=part, bits=k, kl=kl) | sizes)
    return pd.DataFrame(rows)


def cost(rows: list[Any], bits: dict[str, tuple[int, int]]) -> tuple[float, float, float, float]:
    """The loss, the two averages and the bit operations of a choice, by hand."""
    sizes = {row.layer: row for row in rows}
    losses = {(row.layer, row.part, row.bits): row.kl for row in rows}
    weights, read = sum(s.weights for s in sizes.values()), sum(s.macs for s in sizes.values() if s.place)
    loss = sum(losses[n, "weights", w] + (losses[n, "activations", a] if a else 0) for n, (w, a) in bits.items())
    weight_bits = sum(w * sizes[n].weights for n, (w, _) in bits.items()) / weights
    act_bits = sum(a * sizes[n].macs for n, (_, a) in bits.items()) / read
    return loss, weight_bits, act_bits, sum(w * (a or 32) * sizes[n].macs for n, (w, a) in bits.items())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["average", "bit_operations"])
def test_allocation_is_the_best_of_all_choices(seed: int, kind: str) -> None:
    frame = table(seed)
    every = [
        dict(l0=(w0, a0), l1=(w1, a), l2=(w2, a), l3=(w3, 0))
        for w0, w1, w2, w3, a0, a in itertools.product((2, 3, 4), repeat=6)
    ]
    rows = [*frame.itertuples()]
    costs = [cost(rows, bits) for bits in every]
    middle = float(np.median([c[3] for c in costs]))
    for budget in (2.4, 3.0) if kind == "average" else (middle * 0.8, middle):
        fits = [c[0] for c in costs if (max(c[1:3]) if kind == "average" else c[3]) <= budget + 1e-9]
        chosen = allocate_bits(frame, budget, kind)
        loss, weight_bits, act_bits, operations = cost(rows, chosen)
        assert loss == pytest.approx(min(fits), rel=1e-6)
        assert chosen == allocate_bits(frame.assign(kl=frame.kl * 1e-7), budget, kind)
        assert (max(weight_bits, act_bits) if kind == "average" else operations) <= budget * (1 + 1e-6)
        assert list(chosen) == ["l0", "l1", "l2", "l3"] and chosen["l1"][1] == chosen["l2"][1] and chosen["l3"][1] == 0


def test_allocation_of_a_measured_table_read_from_csv(sharp: nn.Module, tmp_path) -> None:
    out = tmp_path / "s.csv"
    how = dict(kinds=["alone"], parts=["weights", "activations"])
    measured = measure_sensitivity(sharp, labelled(), "granq", [2, 3, 4], **how, out=out)
    chosen = allocate_bits(pd.read_csv(out), 3.0)
    assert chosen == allocate_bits(measured, 3.0)
    assert chosen["conv1"][1] == 0 and chosen["conv2"][1] == chosen["point"][1] > 0
    uniform = {name: (3, 3 if a else 0) for name, (_, a) in chosen.items()}
    assert cost(rows := [*measured.itertuples()], chosen)[0] <= cost(rows, uniform)[0] + 1e-12
    # point, 1x1, is not quantized by granq: every width is the best
    assert allocate_bits(measured, 2.0) == {name: (2, 2 if a else 0) for name, (_, a) in chosen.items()}
    most = allocate_bits(measured, 4.0)
    assert most == {name: (4, 4 if a else 0) for name, (_, a) in chosen.items()} | {"point": most["point"]}


def test_a_budget_that_nothing_meets() -> None:
    for budget, kind, sentence in (
        (1.9, "average", "a budget of 1.9 is not within what the table's bits can give, 2 to 4"),
        (4.1, "average", "not within"),
        (10.0, "bit_operations", "not within"),
        (3.0, "x", "unknown kind of budget 'x'; known: average, bit_operations"),
    ):
        with pytest.raises(UserError, match=sentence):
            allocate_bits(table(), budget, kind)
    several = pd.concat([table().assign(scheme=scheme) for scheme in ("granq", "strict")])
    for wrong in (several, table().assign(bits=0)):
        with pytest.raises(UserError, match="a table of one scheme at several widths"):
            allocate_bits(wrong, 3.0)
    shuffled = table().set_axis([0] * len(table()))  # as pd.concat leaves it
    assert allocate_bits(shuffled, 3.0) == allocate_bits(table(), 3.0)
    lacking = table()
    with pytest.raises(UserError, match="of every layer"):
        allocate_bits(lacking[(lacking.layer != "l1") | (lacking.part == "weights")], 3.0)


def test_a_network_of_a_hundred_layers_takes_a_moment() -> None:
    frame = table(layers=100, widths=(2, 3, 4, 5, 6, 8))
    loss, weight_bits, act_bits, _ = cost(rows := [*frame.itertuples()], allocate_bits(frame, 3.0))
    assert max(weight_bits, act_bits) <= 3 + 1e-6
    assert loss < cost(rows, {n: (3, 3 if n != "l99" else 0) for n in frame.layer.unique()})[0]


def test_the_plot_holds_the_values(sharp: nn.Module) -> None:
    frame = measure_sensitivity(sharp, labelled(), "strict", [2, 3], kinds=["alone", "all_but"])
    for metric, kind in itertools.product(("kl", "lost", "recovered"), ("alone", "all_but")):
        ax = plot_sensitivity(frame, metric=metric, kind=kind, bits=3)
        rows = frame[(frame.kind == kind) & (frame.bits == 3) & (frame.part == "weights")]
        np.testing.assert_allclose(np.asarray(ax.lines[0].get_ydata(), float), rows[metric])
        ax.clear()


def test_layers_that_are_numbers_come_back_as_names(tmp_path) -> None:
    """A Sequential's layers are called "0" and "3": a CSV would make numbers of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    model, parts, images = model.eval(), ["weights", "activations"], [torch.randn(4, 3, 8, 8)]
    how = dict(kinds=["alone"], out=tmp_path / "t.csv", facts={"source": "3"})
    measure_sensitivity(model, images, "strict", [2, 4], parts=parts[:1], **how)
    found = measure_sensitivity(model, iter(images), "strict", [2, 4], parts=parts, **how)
    whole = measure_sensitivity(model, images, "strict", [2, 4], parts=parts, kinds=["alone"])
    assert allocate_bits(found, 3.0) == allocate_bits(whole, 3.0) == allocate_bits(pd.read_csv(tmp_path / "t.csv"), 3.0)
    assert {*allocate_bits(found, 3.0)} == {"0", "3"}
    pd.DataFrame({"layer": ["0"]}).to_csv(tmp_path / "t.csv")
    with pytest.raises(UserError, match="lacks the columns images, logit_norm, scheme, source"):
        measure_sensitivity(model, images, "strict", [2, 4], parts=parts, **how)


def test_a_student_in_training_mode_stays_as_it_is(sharp: nn.Module) -> None:
    student = quantize_model(sharp, "strict", 3, 3)
    how = dict(kinds=["alone"], parts=["activations"])
    wanted = measure_sensitivity(sharp, labelled(), student, **how)
    before = copy.deepcopy(student.train().state_dict())
    pd.testing.assert_frame_equal(measure_sensitivity(sharp, labelled(), student, **how), wanted)
    assert student.training and all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_rows_of_another_network_are_not_continued(sharp: nn.Module, tmp_path) -> None:
    how = dict(kinds=["alone"], parts=["weights"], out=tmp_path / "s.csv")
    measure_sensitivity(sharp, labelled(), quantize_model(sharp, "strict", 2, 2), **how)
    with pytest.raises(UserError, match="was measured with (logit_norm|start)"):
        measure_sensitivity(sharp, labelled(), quantize_model(sharp, "strict", 8, 8), **how)


def test_rows_of_another_start_are_not_continued(sharp: nn.Module, tmp_path) -> None:
    """Students whose logits hardly differ, and images that set other ranges."""
    how = dict(kinds=["alone"], parts=["activations"])
    close = copy.deepcopy(sharp)
    with torch.no_grad():
        close.conv1.weight += 1e-6
    students = [quantize_model(network, "strict", 8, 8) for network in (sharp, close)]
    (images, _), *_ = labelled()
    for name, first, second in (
        ("students", {"scheme": students[0]}, {"scheme": students[1]}),
        ("ranges", *({"scheme": "layerwise", "calibration": [factor * images]} for factor in (1, 5))),
    ):
        given = dict(bits=3, out=tmp_path / f"{name}.csv", **how)
        found = measure_sensitivity(sharp, labelled(), **first, **given)
        assert measure_sensitivity(sharp, labelled(), **first, **given).kl.tolist() == pytest.approx(found.kl.tolist())
        with pytest.raises(UserError, match="was measured with start"):
            measure_sensitivity(sharp, labelled(), **second, **given)


class Same(nn.Conv2d):
    """Pads itself, as timm's Conv2dSame does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_a_patched_layer_that_pads_itself_reads_the_padded_map(sharp: nn.Module) -> None:
    twin = copy.deepcopy(sharp)
    twin.conv2 = Same(4, 4, 3)
    twin.conv2.load_state_dict(sharp.conv2.state_dict())
    frames = [measure_sensitivity(m, labelled(), "strict", 3, kinds=["patched"]) for m in (sharp, twin)]
    pd.testing.assert_frame_equal(*(frame.drop(columns=["logit_norm", "macs", "place"]) for frame in frames))


def test_images_of_a_generator_that_learns_are_taken(sharp: nn.Module) -> None:
    images = (labelled()[0][0] * nn.Parameter(torch.ones(()))).clone()
    assert len(measure_sensitivity(sharp, [images], "strict", 3, kinds=["alone"], parts=["both"])) == len(LAYERS)


def test_levels_of_rows_with_grids_of_their_own() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.end = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.mix(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    frame = measure_remedies(Mixer(), labelled(), "strict", 2, ["mix", "end"])
    assert frame.levels.max() <= 4


@pytest.mark.parametrize("end", [nn.Linear(4, 1), nn.Linear(4, 3).requires_grad_(False)])
def test_predictions_need_two_classes(tiny: nn.Module, end: nn.Module) -> None:
    tiny.fc = end
    if end.out_features == 1:
        with pytest.raises(UserError, match="two classes or more"):
            measure_sensitivity(tiny, [torch.randn(4, 3, 8, 8)], "strict", 2)
    else:
        assert len(measure_sensitivity(tiny, [torch.randn(4, 3, 8, 8)], "strict", 2, kinds=["alone"]))


def test_names_that_were_read_as_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="read as numbers"):
        allocate_bits(table().assign(layer=1.1), 3.0)


def test_alone_changes_a_layer_and_no_batchnorm(tiny: nn.Module) -> None:
    """A trained student's BatchNorm differs from the teacher's, which would hide what a layer does."""
    images = torch.randn(8, 3, 8, 8)
    student = quantize_model(tiny, "strict", 8, 8)
    clean = measure_sensitivity(tiny, [images], student, kinds=["alone"], parts=["both"])
    with torch.no_grad():
        student.bn1.running_var *= 4
    moved = measure_sensitivity(tiny, [images], student, kinds=["alone"], parts=["both"])
    pd.testing.assert_series_equal(moved.kl, clean.kl)
    rest = measure_sensitivity(tiny, [images], student, kinds=["all_but"], parts=["both"])
    assert (rest.kl > 10 * clean.kl.max()).all()


def test_bits_of_a_scheme_of_weights_alone(tiny: nn.Module) -> None:
    scheme, images = Scheme(weights="per_out_channel", activations=None), torch.randn(8, 3, 8, 8)
    table = measure_sensitivity(tiny, [images], scheme, (2, 4), kinds=["alone"], parts=["weights", "activations"])
    assert {*table.grid} == {"per_out_channel"}
    assert {*allocate_bits(table, 4.0).values()} == {(4, 0)}


def test_an_empty_fact_is_continued(tiny: nn.Module, tmp_path) -> None:
    for kinds in (["alone"], ["alone", "all_but"]):
        how: Any = {"kinds": kinds, "parts": ["both"], "facts": {"note": ""}, "out": tmp_path / "rows.csv"}
        table = measure_sensitivity(tiny, [torch.ones(2, 3, 8, 8)], "strict", 4, **how)
    assert {*table.kind} == {"alone", "all_but"}


class Rejoined(nn.Module):
    """``x`` is read twice, and in between by a concatenation that holds all of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 6, 3)
        self.d, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        y = self.c(torch.cat([x, self.b(x).relu()], 1))
        return self.fc((y + self.d(x)).relu().mean((2, 3)))


def test_places_are_those_of_the_graph() -> None:
    torch.manual_seed(0)
    model, images = Rejoined().eval(), torch.randn(4, 3, 8, 8)
    table = measure_sensitivity(model, [images], "strict", (2, 3, 4), kinds=["alone"], parts=PARTS[:2])
    places = table.drop_duplicates("layer").set_index("layer").place
    assert places["b"] == places["d"] != places["c"]
    quantize_model(model, "strict", 3, 3, bits=allocate_bits(table, 3.0))
