"""A workbench makes each thing once, at first use, and the same from the same seed."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from granq.config import QATConfig
from granq.data import DataSpec, batches
from granq.errors import UserError
from granq.measure import workbench
from granq.measure.workbench import BUDGETS, Budget, Workbench
from granq.runs import train
from granq.schemes import SCHEMES

SPEC = DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
RUN = dict(epochs=2, iterations=1, warmup_epochs=1, batch_size=4)


@pytest.fixture
def bench(tiny: nn.Module, tmp_path: Path, monkeypatch) -> Workbench:
    """A workbench of 40 images, a tiny teacher and one step of training an epoch."""
    monkeypatch.setattr(Workbench, "_loaded", (tiny, SPEC))
    monkeypatch.setattr(Workbench, "top1", 12.5)
    monkeypatch.setattr(Workbench, "test", [(torch.full((3, 8, 8), i, dtype=torch.uint8), 0) for i in range(40)])
    monkeypatch.setitem(BUDGETS, "quick", Budget("digits", 16, 2, (2,), 1, (1, 2), RUN))
    return Workbench(device="cpu", out=tmp_path)


def test_synthetic_images_are_the_same_every_time(bench: Workbench, tmp_path: Path, monkeypatch) -> None:
    """Where gradients are off, too, the run is trained; as many images come as real ones."""
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path / "cache"))  # where no other test has made the run
    with torch.no_grad():
        first = list(bench.synthetic(batch_size=12))
    assert [len(batch) for batch in first] == [12, 4]
    assert sum(len(batch) for batch in bench.real()) == 16
    assert all(torch.equal(a, b) for a, b in zip(first, bench.synthetic(batch_size=12), strict=True))


def test_real_samples_are_disjoint(bench: Workbench) -> None:
    first, second = (torch.cat(list(bench.real(part))).flatten(1)[:, 0] for part in (0, 1))
    assert len(first) == len(second) == 16 and not set(first.tolist()) & set(second.tolist())


def test_the_zero_shot_run_keeps_snapshots(bench: Workbench) -> None:
    generator, history, drawn = bench.zero_shot
    assert history.epoch.tolist() == [1, 2] and set(history.bits) == {"W2A2"} and set(history.scheme) == {"granq"}
    assert drawn.groupby("epoch").label.apply(list).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert bench.zero_shot[0] is generator


def test_the_zero_shot_run_is_made_once(bench: Workbench, monkeypatch) -> None:
    first = next(bench.synthetic())
    monkeypatch.setattr(workbench, "train", None)  # whoever calls it fails
    again = Workbench(device="cpu")
    assert torch.equal(next(again.synthetic()), first)
    pd.testing.assert_frame_equal(again.zero_shot[2], bench.zero_shot[2])
    with pytest.raises(TypeError):
        _ = Workbench(device="cpu", seed=1).zero_shot


def test_finished_runs_are_read(bench: Workbench, tiny: nn.Module, tmp_path: Path) -> None:
    config = QATConfig(**RUN, image_size=8, scheme="strict", seed=3)
    train(tiny, config, out=tmp_path / "run", facts={"network": "resnet20_cifar10"})
    generator, history, drawn = Workbench(device="cpu", runs=[tmp_path / "run"]).zero_shot
    assert history[["scheme", "bits", "seed", "recipe"]].drop_duplicates().values.tolist() == [
        ["strict", "W3A3", 3, "adadfq"]
    ]
    assert len(drawn) == 9 and set(drawn.epoch) == {2} and generator.training
    with pytest.raises(UserError, match="is a run of resnet20_cifar10, not of resnet18"):
        Workbench(network="resnet18", runs=[tmp_path / "run"])


def test_real_images_are_prepared_as_they_were_in_the_run(tiny: nn.Module, tmp_path: Path) -> None:
    config = QATConfig(**RUN, image_size=8)
    spec = {"image_size": 8, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    facts = {"network": "resnet20_cifar10", "data": "digits", "spec": spec}
    train(tiny, config, out=tmp_path / "own", facts=facts)
    own = Workbench(device="cpu", teacher=tiny, runs=[tmp_path / "own"])
    assert own.spec.model_dump(include=set(spec)) == spec
    with pytest.raises(UserError, match="is a run on digits, not on cifar10"):
        Workbench(device="cpu", data="cifar10", runs=[tmp_path / "own"])


def test_a_run_with_another_teacher_is_refused(tiny: nn.Module, tmp_path: Path) -> None:
    facts = {"network": "resnet20_cifar10", "data": "digits", "teacher_top1": 98.4}
    train(tiny, QATConfig(**RUN, image_size=8), out=tmp_path / "run", facts=facts)
    other = Workbench(device="cpu", teacher=tiny, runs=[tmp_path / "run"], image_size=8)
    other.evaluate = lambda model: 12.5  # type: ignore[method-assign]
    with pytest.raises(UserError, match="had another teacher .*98.4, now 12.5"):
        other.facts()


def test_accuracy_has_a_row_for_every_scheme_and_seed(bench: Workbench) -> None:
    rows = bench.accuracy
    assert len(rows) == 2 * len(SCHEMES) and set(rows.bits) == {"W2A2"} and set(rows.budget) == {"quick"}
    assert set(rows.teacher_top1) == {12.5} and rows.test_images.eq(40).all()


def test_full_reads_long_runs_and_published_results(folder: str, tmp_path: Path) -> None:
    data, network = f"folder:{(tmp_path / 'data').rename(tmp_path / 'cifar10')}", "a/nets.py:resnet20"
    own = dict(dataset="cifar10", network="nets.py:resnet20", scheme="strict", bits="W3A3", seed=0, teacher_top1=91.7)
    rows = [own | {"method": "strict + match, 600 steps", "last_top1": 90.0}, own | {"network": "resnet20_cifar10"}]
    pd.DataFrame(rows).to_csv(tmp_path / "results_cifar10.csv")
    for out in (tmp_path, tmp_path / "variants"):
        table = Workbench("full", device="cpu", data=data, network=network, out=out).accuracy
        measured, published = table[table.source.isna()], table[table.source.notna()]
        assert measured.scheme.tolist() == ["strict + match, 600 steps"] and measured.last_top1.tolist() == [90.0]
        assert set(published.bits) == {"W3A3"} and {"GDFQ", "AdaDFQ"} <= set(published.scheme)
        assert len(published[published.scheme == "HAST"]) == 2  # two papers give two numbers


def test_bad_input_is_one_sentence() -> None:
    for call, sentence in (
        (dict(budget="huge"), "unknown budget 'huge'; known: quick, full"),
        (dict(runs=["nowhere"]), "nowhere/config.json is missing"),
        (dict(data="nonsense"), "unknown dataset"),
    ):
        with pytest.raises(UserError, match=sentence):
            Workbench(**call)


def test_a_network_itself_is_a_teacher(monkeypatch) -> None:
    images = TensorDataset(torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10)
    monkeypatch.setattr(workbench, "load_split", lambda spec, split: images)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    shared = Workbench(teacher=net, device="cpu")
    with torch.no_grad():
        top1 = [(net.eval()(x).argmax(1) == y).float().mean().item() for x, y in batches(images, shared.spec)]
    assert shared.top1 == pytest.approx(100 * sum(top1) / len(top1)) and shared.facts()["dataset"] == "digits"
    assert net.training is False and shared.teacher is not net


def test_a_short_run_on_other_data_is_another_run(bench: Workbench, tiny: nn.Module, monkeypatch) -> None:
    first = bench._short_run().path
    monkeypatch.setattr(Workbench, "_loaded", (tiny, SPEC.model_copy(update={"name": "folder:other"})))
    assert bench._short_run().path != first
