"""The report: what its page says is what plain torch says, for any network, and it needs nothing else to be read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import same_bits
from torch import nn

import granq
from granq.app.cli import main
from granq.errors import UserError


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def charts(page: Path) -> dict[str, Any]:
    """The specifications of the charts of a page."""
    found = re.findall(r'vegaEmbed\("#([\w-]+)", (\{.*\})\)</script>', page.read_text(encoding="utf-8"))
    return {name: json.loads(spec) for name, spec in found}


def rows_with(chart: dict[str, Any], *columns: str) -> pd.DataFrame:
    return next(pd.DataFrame(rows) for rows in chart["datasets"].values() if {*columns} <= {*rows[0]})


class Residual(nn.Module):
    """The image's convolution, a block of two with a shortcut of one, another block without: two sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a1, self.a2, self.skip = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4, 4))
        self.b1, self.b2, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.a2(self.a1(x).relu()) + self.skip(x)).relu()
        x = x + self.b2(self.b1(x).relu())
        return self.fc(x.mean((2, 3)).view(x.size(0), -1))


class Branching(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


def test_layers_are_placed_at_their_longest_path() -> None:
    layout = granq.network_layout(Residual())
    nodes = layout[layout.kind != "edge"].set_index("layer")
    depth = dict(x=0, stem=1, a1=2, skip=2, a2=3, add=4, b1=5, b2=6, add_1=7, fc=8)
    assert nodes.x.to_dict() == depth
    assert nodes.y.to_dict() == {name: -1.0 if name == "skip" else 0.0 for name in depth}  # all others are on one line
    edges = {("x", "stem"), ("stem", "a1"), ("stem", "skip"), ("a1", "a2"), ("a2", "add"), ("skip", "add")}
    edges |= {("add", "b1"), ("b1", "b2"), ("add", "add_1"), ("b2", "add_1"), ("add_1", "fc")}
    assert {tuple(name.split(" to ")) for name in layout[layout.kind == "edge"].layer} == edges
    for name, points in layout[layout.kind == "edge"].groupby("layer"):
        first, last = name.split(" to ")
        ends = points.iloc[[0, -1]][["x", "y"]].to_numpy()
        np.testing.assert_array_equal(ends, nodes.loc[[first, last], ["x", "y"]].to_numpy())
        between = nodes[(nodes.x > depth[first]) & (nodes.x < depth[last])]
        for x, y in between[["x", "y"]].to_numpy():  # no line runs through what it does not join
            assert not ((points.x == x) & (points.y == y)).any(), name


def test_a_deep_network_goes_on_in_the_next_row() -> None:
    layout = granq.network_layout(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(70))))
    nodes = layout[layout.kind == "layer"]
    assert nodes.x.between(0, 31).all() and nodes.row.tolist() == [i // 32 for i in range(1, 71)]
    assert nodes.groupby("row").y.nunique().tolist() == [1, 1, 1] and nodes.y.nunique() == 3


def test_ranges_are_those_of_channels_and_filters(tiny: nn.Module) -> None:
    table = granq.measure_ranges(tiny, [images(4), -images(4)]).set_index(["part", "layer"])
    both = torch.cat([images(4), -images(4)])
    seen = {"conv1": both, "conv2": tiny.relu(tiny.bn1(tiny.conv1(both)))}
    for name, x in seen.items():
        rows = table.loc[("activations", name)]
        np.testing.assert_array_equal(rows.low, x.detach().amin((0, 2, 3)))
        np.testing.assert_array_equal(rows.high, x.detach().amax((0, 2, 3)))
    for name in ("conv2", "fc"):
        weight = getattr(tiny, name).weight.detach().flatten(1)
        np.testing.assert_array_equal(table.loc[("weights", name)].high, weight.amax(1))


def test_the_page_says_what_torch_computes(tiny: nn.Module, tmp_path: Path) -> None:
    labels, page = torch.arange(6) % 3, tmp_path / "new/page.html"
    batches = [(images()[:4], labels[:4, None], torch.ones(4)), (images()[4:], labels[4:])]
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    found = granq.report(tiny, batches, out=page, scheme="strict", bits=2, facts={"made by": "<me>"})
    student = granq.quantize_model(tiny, "strict", 2, 2)
    same = tiny(images()).argmax(1) == student(images()).argmax(1)
    assert found["agreement"] == 100 * same.double().mean().item()
    for key, network in (("top1", student), ("full_precision_top1", tiny)):
        assert found[key] == 100 * (network(images()).argmax(1) == labels).float().mean().item()
    text = page.read_text(encoding="utf-8")
    assert found["bytes"] == page.stat().st_size < 5_000_000
    assert found["summary"] in text and f"{found['agreement']:.1f} %" in text and "&lt;me&gt;" in text
    assert not re.search(r"(src|href)=|@import|\$[a-z]+<", text.partition("</script>")[2])  # everything is in the file
    layers = rows_with(charts(page)["Which-layer-is-guilty"], "kl", "sqnr_db").set_index(["layer", "mode"])
    reference, names = tiny(images()).double().log_softmax(1), granq.layer_names(tiny)
    for name in names:
        others = tuple(other for other in names if other != name)
        alone = granq.quantize_model(tiny, granq.SCHEMES["strict"].model_copy(update={"skip": others}), 2, 2)
        kl = (reference.exp() * (reference - alone(images()).double().log_softmax(1))).sum(1).mean()
        assert np.isclose(layers.kl[name, "local"], kl.item(), rtol=1e-3)
    noise = student.conv1(granq.fake_quantize(images(), 2)) - tiny.conv1(images())
    sqnr = 10 * torch.log10(tiny.conv1(images()).double().square().sum() / noise.double().square().sum())
    assert np.isclose(layers.sqnr_db["conv1", "local"], sqnr.item(), rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    with pytest.raises(UserError, match="already exists"):
        granq.report(tiny, batches, out=page)


def test_without_images_it_draws_shapes_and_leaves_the_random_state(tiny: nn.Module, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("1", "2"):
        granq.report(tiny, out=tmp_path / f"{name}.html", images=4, image_size=8)
        torch.randn(1)
    assert torch.equal(torch.randn(3), torch.randn(5, generator=torch.Generator().set_state(state))[2:])
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    page = (tmp_path / "1.html").read_text(encoding="utf-8")
    assert "4 random shapes, seed 0" in page and "static ranges" not in page
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    with pytest.raises(granq.UserError, match=r"cannot take images \(16, 3, 224, 224\)"):
        granq.report(small, out=tmp_path / "4.html", images=16)


def test_what_cannot_be_traced_gets_the_rest(tmp_path: Path) -> None:
    found = granq.report(Branching().eval(), iter([images(40), images(40)]), out=tmp_path / "page.html", images=50)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert found.keys() == {"bytes", "images"} and "cannot trace Branching" in text and "50 images" in text
    assert {*charts(tmp_path / "page.html")} == {"How-far-apart-are-the-ranges", "What-do-few-bits-do-to-one-channel"}


def test_another_output_than_classes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    found = granq.report(network, [images()], out=tmp_path / "page.html")
    with pytest.raises(UserError, match="labels are one number for each image"):
        granq.report(network, [(images(), images()[:, 0] > 0)], out=tmp_path / "masks.html")
    layers = rows_with(charts(tmp_path / "page.html")["Which-layer-is-guilty"], "sqnr_db")
    assert "agreement" not in found and "kl" not in layers


def test_a_network_that_somebody_else_quantized(tiny: nn.Module, tmp_path: Path) -> None:
    rounded = type(tiny)().eval()
    rounded.load_state_dict({name: value.half().float() for name, value in tiny.state_dict().items()})
    found = granq.report(tiny, [images()], out=tmp_path / "page.html", scheme=rounded)
    layers = rows_with(charts(tmp_path / "page.html")["Which-layer-is-guilty"], "kl")
    assert found["agreement"] == 100 and layers.sqnr_db.between(50, 100).all()
    assert "Somebody else quantized it" in (tmp_path / "page.html").read_text()


def test_a_student_is_no_network_to_quantize(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(granq.UserError, match="this one as scheme"):
        granq.report(granq.quantize_model(tiny, "strict", 3, 3), [torch.randn(2, 3, 8, 8)], out=tmp_path / "r.html")


def test_what_folds(tiny: nn.Module, tmp_path: Path) -> None:
    granq.report(tiny, [images()], out=tmp_path / "page.html", scheme="foldable", bits=(4, 3))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "foldable W4A3</h1>" in text and "static ranges" in text and "do not fold" not in text
    assert "4 layers compute in integers with sums in int32; 2 of 2 BatchNorms" in text


def test_the_command(teacher: Path, folder: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """A network by name, and a packed student next to its teacher."""
    spec = granq.describe_data(folder, "resnet20_cifar10")
    model, spec = granq.load_teacher("resnet20_cifar10", spec, teacher)
    student, config = granq.quantize_model(model, "strict", 3, 3), granq.QATConfig(image_size=32, scheme="strict")
    saved = granq.SavedRun(student, config, spec, {"network": "resnet20_cifar10"}, 1)
    granq.save_packed(tmp_path / "s.safetensors", saved)
    page = tmp_path / "packed.html"
    given = f"--teacher {teacher} --data {folder} --images 4 --out {page}".split()
    assert main(["report", str(tmp_path / "s.safetensors"), *given]) == 0
    text = page.read_text(encoding="utf-8")
    assert "resnet20_cifar10: strict W3A3" in text and "t.safetensors" in text and "do not fold" in text
    assert str(tmp_path) not in text  # where things lay is nobody's business
    errors = rows_with(charts(page)["Which-layer-is-guilty"], "kl")
    assert (errors.sqnr_db < 59).all()  # against the teacher, not against weights that are rounded already
    capsys.readouterr()
    assert main(["report", str(tmp_path / "s.safetensors"), *given, "--bits", "8,8"]) == 2
    assert "has a scheme, bits and an image size of its own" in capsys.readouterr().err
    assert main(["report", "--network", "resnet20_cifar10", *given]) == 2
    assert "already exists" in capsys.readouterr().err
    seen: list[Any] = []
    monkeypatch.setattr(granq, "report", lambda *args, **how: seen.extend((args, how)) or {})
    assert main(["report", "--network", "resnet20_cifar10", *given]) == 0
    (found, drawn), how = seen
    labels = torch.cat([labels for _, labels in drawn]).tolist()
    assert same_bits(found, model) and labels != sorted(labels) and how["images"] == 4 and how["out"] == page
    assert (how["scheme"], how["bits"], how["facts"]["network"]) == ("granq", (3, 3), "resnet20_cifar10")


def test_a_layer_on_two_inputs_is_no_reason_to_give_up(tmp_path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(self.conv(x).relu()).mean((2, 3)))

    granq.report(Twice(), [images()], out=tmp_path / "r.html", scheme="granq")
    assert "do not fold" in (tmp_path / "r.html").read_text()


def test_a_packed_student_is_compared_with_its_teacher(tmp_path, monkeypatch) -> None:
    """Its own weights are rounded: against them nothing would be lost."""
    saved, seen, page = granq.load_student("cifar10-strict-w3a3"), [], tmp_path / "r.html"
    monkeypatch.setattr(granq, "report", lambda model, *_, **how: seen.append((model, how["facts"])) or {})
    assert main(["report", "cifar10-strict-w3a3", "--images", "2", "--out", str(page)]) == 0
    model, facts = seen[0]
    assert facts["teacher"] == "resnet20_cifar10.safetensors"
    assert max(len(f.unique()) for f in saved.student.output.weight) <= 32 < len(model.output.weight[0].unique())
    granq.save_packed(tmp_path / "s", saved._replace(facts=saved.facts | {"teacher": "x"}))
    assert main(["report", str(tmp_path / "s"), "--out", str(page)]) == 2
